"""Huge pages for memory that is read from end to end again and again.

A product with few rows reads each weight once; with pages of 4 KiB the processor spends up to half of that time on
address translation (`docs/decisions/2026-11-29-huge-pages.md`).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

_HUGE_PAGE = 2**21
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # linux/mman.h; the second since Linux 6.1

Span = tuple[int, int]  # first address, and the one after the last


@contextlib.contextmanager
def on_huge_pages() -> Iterator[None]:
    """Ask Linux to put the anonymous memory that the block takes and keeps on pages of 2 MiB; elsewhere do nothing."""
    before = _anonymous_memory()
    yield
    for span in _anonymous_memory():
        for first, last in _without(span, before):
            _advise(-(-first // _HUGE_PAGE) * _HUGE_PAGE, last // _HUGE_PAGE * _HUGE_PAGE)


def _anonymous_memory() -> list[Span]:
    """This process's writable memory that belongs to no file."""
    if not sys.platform.startswith("linux"):
        return []
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [_span(line) for line in lines if _is_anonymous(line.split())]


def _is_anonymous(parts: list[str]) -> bool:
    """`parts`: addresses, permissions, offset, device, inode, and a name where there is one."""
    return parts[1].startswith("rw") and parts[4] == "0" and (len(parts) == 5 or parts[5] == "[heap]")


def _span(line: str) -> Span:
    first, last = line.split(maxsplit=1)[0].split("-")
    return int(first, 16), int(last, 16)


def _without(span: Span, taken: list[Span]) -> Iterator[Span]:
    """The parts of a span that lie in none of the others, which are in order."""
    first, last = span
    for other_first, other_last in taken:
        if other_last <= first or other_first >= last:
            continue
        if other_first > first:
            yield first, other_first
        first = max(first, other_last)
    if first < last:
        yield first, last


def _advise(first: int, last: int) -> None:
    if last <= first:
        return
    madvise = ctypes.CDLL(None).madvise
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
