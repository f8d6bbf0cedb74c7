"""What the package carries: a base, soft prompts, data sets. How they were made: tools/embedded/README.md."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parent


def base_folder() -> Path:
    """The folder of the embedded base, a small Bloom in Hugging Face form."""
    return _ROOT / "base"


def prompts_folder() -> Path:
    """A library of three soft prompts for the embedded base: coach, quotes and reviews, as the demo trains them."""
    return _ROOT / "prompts"


def data_names() -> tuple[str, ...]:
    """The names of the data sets' files, sorted."""
    return tuple(sorted(path.name for path in (_ROOT / "data").iterdir() if path.suffix in {".csv", ".jsonl"}))


def data_file(name: str) -> Path:
    """The path of a data set's file; FileNotFoundError for a name that the package does not carry."""
    if name not in data_names():
        raise FileNotFoundError(f"the package carries no data set named {name!r}; it has {', '.join(data_names())}")
    return _ROOT / "data" / name
