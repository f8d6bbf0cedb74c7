"""How packed rows are cut for attention: runs of queries, and groups of like runs that are multiplied at once.

A row of a training set is short, so its scores are few and the calls around them cost more than they do: like rows are
padded into one group, for the attention alone. A row too long for that is cut into blocks of queries, each over the
keys that it can see.

S packed tokens, E prefix tokens of an earlier pass, G runs of a group, n most queries of a run, m most keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.families.packed import PackedBatch

_BLOCK = 256  # queries of a long row that are worked on at once
_MOST_SCORES = {"cpu": 2**15, "cuda": 2**22}  # of one head in a group: what fits the caches of a CPU
_MOST_WASTE = 2**16  # of these over pads


@dataclass(frozen=True)
class Run:
    """Consecutive queries of one segment, and the keys that they see: its prefix, and its own up to the last query."""

    first_query: int  # among the packed tokens
    num_queries: int
    first_position: int  # of the first query
    prefix: tuple[int, int]  # (first, length) among the keys; keys count the E prefix tokens first
    first_own: int  # among the keys

    @property
    def num_keys(self) -> int:
        return self.first_position + self.num_queries


@dataclass(frozen=True)
class Group:
    """Runs padded to one shape. Pads repeat a real token; no query sees them, and nobody reads what they get."""

    shape: tuple[int, int, int]  # G, n, m
    queries: Tensor  # [G * n] packed tokens
    keys: Tensor  # [G * m] keys
    is_real_Gn: Tensor  # False at the pads among the queries
    query_positions_Gn: Tensor
    key_positions_Gm: Tensor  # beyond every query's position at pads


@dataclass(frozen=True)
class Grouping:
    """All of a pass."""

    groups: tuple[Group, ...]
    places_S: Tensor  # of each packed token among the queries of all groups, one group behind the other


def grouping_of(rows: PackedBatch, num_before: int, device: torch.device) -> Grouping:
    """Groups for rows behind E = `num_before` prefix tokens of an earlier pass."""
    runs = sorted(_runs(rows, num_before), key=lambda run: (run.num_keys, run.num_queries))
    batches = _batches(runs, _MOST_SCORES.get(device.type, _MOST_SCORES["cuda"]))
    groups = tuple(_group(batch, device) for batch in batches)
    num_tokens = sum(segment.length for segment in rows.segments)
    places, offset = torch.empty(num_tokens, dtype=torch.long), 0
    for batch, group in zip(batches, groups, strict=True):
        for index, run in enumerate(batch):
            first = offset + index * group.shape[1]
            places[run.first_query : run.first_query + run.num_queries] = torch.arange(first, first + run.num_queries)
        offset += group.shape[0] * group.shape[1]
    return Grouping(groups, places.to(device))


def _runs(rows: PackedBatch, num_before: int) -> Iterator[Run]:
    for segment in rows.segments:
        prefix = segment.prefix or (0, 0)
        for first in range(0, segment.length, _BLOCK):
            yield Run(
                first_query=segment.first + first,
                num_queries=min(_BLOCK, segment.length - first),
                first_position=prefix[1] + first,
                prefix=prefix,
                first_own=num_before + segment.first,
            )


def _batches(runs: Sequence[Run], most_scores: int) -> list[list[Run]]:
    """Neighbours by size together, as long as little is pads."""
    batches: list[list[Run]] = []
    real = 0
    for run in runs:
        scores = run.num_queries * run.num_keys
        if batches:
            longest = max(run.num_queries, max(other.num_queries for other in batches[-1]))
            padded = (len(batches[-1]) + 1) * longest * run.num_keys
            if padded <= most_scores and padded - real - scores <= _MOST_WASTE:
                batches[-1].append(run)
                real += scores
                continue
        batches.append([run])
        real = scores
    return batches


def _group(runs: Sequence[Run], device: torch.device) -> Group:
    num_queries, num_keys = max(run.num_queries for run in runs), max(run.num_keys for run in runs)
    own_query, key = torch.arange(num_queries), torch.arange(num_keys)
    queries = [run.first_query + own_query.clamp(max=run.num_queries - 1) for run in runs]
    query_positions = [run.first_position + own_query.clamp(max=run.num_queries - 1) for run in runs]
    key_positions = [torch.where(key < run.num_keys, key, num_keys + _BLOCK) for run in runs]
    return Group(
        shape=(len(runs), num_queries, num_keys),
        queries=torch.cat(queries).to(device),
        keys=torch.cat([_keys(run, key) for run in runs]).to(device),
        is_real_Gn=torch.stack([own_query < run.num_queries for run in runs]).to(device),
        query_positions_Gn=torch.stack(query_positions).to(device),
        key_positions_Gm=torch.stack(key_positions).to(device),
    )


def _keys(run: Run, key: Tensor) -> Tensor:
    first_prefix, num_prefix = run.prefix
    key = key.clamp(max=run.num_keys - 1)
    return torch.where(key < num_prefix, first_prefix + key, run.first_own + key - num_prefix)
