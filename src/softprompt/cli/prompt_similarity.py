"""What `softprompt prompts similarity` shows: how alike the prompts of a library are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import click

from softprompt.base import Base
from softprompt.cli.console import print_table, say
from softprompt.errors import ConfigError, SoftpromptError
from softprompt.prompt import SimilarPair, SoftPrompt
from softprompt.storage import Library

_LARGEST_MATRIX = 10  # prompts
_MOST_PAIRS = 20

Groups = Mapping[Any, Sequence[str]]  # Any: a width or a hash -> the names that share it


def prompts_of(library: Library, names: Sequence[str], base: Base | None, *, force: bool) -> dict[str, SoftPrompt]:
    """The prompts named, or all of a library; without names, those that cannot be loaded are said and left out.

    Raises StorageError and what `load_prompt` raises for prompts named, ConfigError for fewer than two.
    """
    prompts = {name: library.load(name, base, force=force) for name in names}
    for name in library.names() if not names else ():
        try:
            prompts[name] = library.load(name, base, force=force)
        except SoftpromptError as error:
            say(f"skipped {name}: {error}")
    if len(prompts) < 2:
        there = ", ".join(prompts) or "none"
        raise ConfigError(f"similarity needs two prompts of {library.folder}, and has {there}; import or name others")
    return prompts


def say_other_bases(prompts: Mapping[str, SoftPrompt]) -> None:
    """A note where the prompts come from different bases."""
    known = {prompt.record.base_fingerprint for prompt in prompts.values()} - {None}
    if len(known) > 1:
        say(f"note: these prompts were trained on {len(known)} different bases; across bases a similarity says little")


def similarity_json(
    prompts: Mapping[str, SoftPrompt], pairs: Sequence[SimilarPair], base: Base | None
) -> dict[str, Any]:  # Any: JSON
    """The similarities as JSON values, most similar first."""
    compared = {frozenset((pair.one, pair.other)) for pair in pairs}
    return {
        "centred_on": base.name if base is not None else None,
        "prompts": {
            name: {"shape": list(prompt.tensor.shape), "content_hash": prompt.content_hash}
            for name, prompt in prompts.items()
        },
        "pairs": [asdict(pair) for pair in pairs],
        "not_comparable": [list(two) for two in combinations(prompts, 2) if frozenset(two) not in compared],
    }


def show_similarity(prompts: Mapping[str, SoftPrompt], pairs: Sequence[SimilarPair], base: Base | None) -> None:
    """A matrix of few prompts, or the most similar pairs of many, on stdout."""
    if len(prompts) <= _LARGEST_MATRIX:
        _show_matrix(f"Similarity of {len(prompts)} prompts", list(prompts), pairs)
    else:
        _show_pairs(f"Most similar of {len(prompts):,} prompts", pairs)
    if base is not None:
        click.echo(f"Cosines after subtracting the mean embedding of {base.name}'s vocabulary")
    widths = _grouped({name: prompt.hidden_size for name, prompt in prompts.items()})
    if len(widths) > 1:
        groups = "; ".join(f"{width}: {', '.join(names)}" for width, names in widths.items())
        click.echo(f"Not comparable, being of different widths: {groups}")
    for names in _grouped({name: prompt.content_hash for name, prompt in prompts.items()}).values():
        if len(names) > 1:
            click.echo(f"Identical (the same content hash): {', '.join(names)}")


def _show_matrix(title: str, names: Sequence[str], pairs: Sequence[SimilarPair]) -> None:
    known = {frozenset((pair.one, pair.other)): f"{pair.similarity:.3f}" for pair in pairs}
    known |= {frozenset((name,)): f"{1:.3f}" for name in names}
    numbers = [str(number) for number in range(1, len(names) + 1)]
    rows = [
        [f"{number} {one}", *(known.get(frozenset((one, other)), "-") for other in names)]
        for number, one in zip(numbers, names, strict=True)
    ]
    print_table(title, ["prompt", *numbers], rows, figures=True)


def _show_pairs(title: str, pairs: Sequence[SimilarPair]) -> None:
    rows = [[pair.one, pair.other, f"{pair.similarity:.3f}"] for pair in pairs[:_MOST_PAIRS]]
    print_table(title, ["prompt", "and", "similarity"], rows)
    click.echo(f"{len(rows)} of {len(pairs):,} pairs")


def _grouped(keys: Mapping[str, Any]) -> Groups:
    groups: dict[Any, list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return groups
