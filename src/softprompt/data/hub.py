"""Records through the `datasets` library: Parquet, folders it saved, and Hub data sets.

Local files leave no cache behind. A Hub set stays in the library's own cache, so that it is there when offline.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from softprompt.data.textfiles import Record
from softprompt.errors import DataError

_DEFAULT_SPLIT = "train"


def read_parquet(path: Path) -> list[Record]:
    """Records of a Parquet file. Raises DataError where it is none."""
    with _reading(str(path)) as datasets, tempfile.TemporaryDirectory() as cache:
        return _records(datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True))


def read_saved_folder(folder: Path, split: str | None) -> list[Record]:
    """Records of a folder that `save_to_disk` wrote; of its split, if it holds several.

    Raises DataError where the folder is broken or has no such split.
    """
    with _reading(str(folder)) as datasets:
        saved = datasets.load_from_disk(str(folder), keep_in_memory=True)
        if isinstance(saved, datasets.DatasetDict):
            wanted = split or _DEFAULT_SPLIT
            if wanted not in saved:
                raise DataError(f"{folder} has no split {wanted!r}; it has {', '.join(map(repr, saved))}")
            saved = saved[wanted]
        return _records(saved)


def read_hub_set(name: str, subset: str | None, split: str | None, *, offline: bool) -> list[Record]:
    """Records of one split of a Hub data set. Raises DataError where it cannot be had."""
    with _reading(f"Hub data set {name!r}") as datasets, _no_network(datasets) if offline else nullcontext():
        return _records(datasets.load_dataset(name, subset, split=split or _DEFAULT_SPLIT))


def _records(dataset: Any) -> list[Record]:  # Any: a datasets.Dataset, which has no types
    """Cells as stored: nothing decoded, so that an image column next to the text needs no image library."""
    stored: list[Record] = dataset.with_format("arrow")[:].to_pylist()
    return stored


@contextmanager
def _no_network(datasets: Any) -> Iterator[None]:
    """Only these two switches keep both libraries off the network; `local_files_only` still asks the Hub first."""
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextmanager
def _reading(what: str) -> Iterator[Any]:  # Any: the datasets module, which has no types
    """The library, silent, with its errors as one sentence."""
    import datasets

    shows_bars = not datasets.utils.are_progress_bars_disabled()
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        yield datasets
    except DataError:
        raise
    except Exception as error:  # the library lets through pyarrow's, fsspec's and the Hub client's errors alike
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{what} cannot be read: {reason[:300] or type(error).__name__}") from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
        if shows_bars:
            datasets.utils.enable_progress_bars()
