"""Curves drawn in characters, by plotext where it is installed."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from softprompt.cli.console import stdout_is_unicode

MARKS = "abcdefgh"  # one per curve: they are told apart without colours too
MAX_CURVES = len(MARKS)
_HEIGHT = 16  # lines
_NUM_TICKS = 5

Points = Sequence[tuple[int, float]]  # (step, value)


def can_draw() -> bool:
    """Whether charts can be drawn on stdout."""
    return reason_against_charts() is None


def reason_against_charts() -> str | None:
    """Why curves are tables of numbers, and what to do; None where they can be drawn."""
    if find_spec("plotext") is None:
        return "plotext is not installed, so the curves are tables of numbers; pip install 'softprompt[plots]'"
    if not stdout_is_unicode():
        return (
            f"{sys.stdout.encoding} has no characters for charts, so the curves are tables of numbers; set PYTHONUTF8=1"
        )
    return None


def draw(title: str, curves: Mapping[str, Points], width: int) -> str:
    """A chart over steps as lines of text, `width` columns wide; of several curves each is drawn in its own letter.

    No more than `MAX_CURVES`, each with a point at least. Needs plotext.
    """
    import plotext

    assert 0 < len(curves) <= MAX_CURVES and all(curves.values()), list(curves)
    marks = MARKS if len(curves) > 1 else ("hd",)  # plotext's blocks, several points to a character
    plotext.terminal.limit(False, False)
    figure = plotext.figure  # the only one there is, so it is left as clean as it was found
    figure.clear()
    figure.plot_size(width, _HEIGHT)
    figure.title(title)
    figure.label("step")
    for mark, points in reversed(list(zip(marks, curves.values(), strict=False))):  # the first lies on top
        figure.draw(figure.signal([step for step, _ in points], [value for _, value in points], marker=mark).lines())
    ticks = _ticks(sorted({step for points in curves.values() for step, _ in points}))
    figure.ruler("x").ticks(ticks, [f"{step:,}" for step in ticks])
    drawn = str(figure.build().string(colorless=True))
    figure.clear()
    return "\n".join([*(line.rstrip() for line in drawn.rstrip().split("\n")), *legend(list(curves), width)])


def legend(names: Sequence[str], width: int) -> list[str]:
    """Lines that say which letter stands for which of several curves; none for a single one."""
    pairs = [f"{mark}={name}" for mark, name in zip(MARKS, names, strict=False)] if len(names) > 1 else []
    return textwrap.wrap("  ".join(pairs), width, break_long_words=False, break_on_hyphens=False)


def sampled(curves: Mapping[str, Points], max_rows: int = 10) -> list[list[str]]:
    """The same curves as rows of a table: a step, then each curve's value there, nothing where it has none."""
    steps = sorted({step for points in curves.values() for step, _ in points})
    chosen = _spread(steps, max_rows)
    values = [dict(points) for points in curves.values()]
    return [[f"{step:,}", *(f"{known[step]:.3f}" if step in known else "" for known in values)] for step in chosen]


def _ticks(steps: Sequence[int]) -> list[int]:
    first, last = steps[0], steps[-1]
    return sorted({first + round((last - first) * part / (_NUM_TICKS - 1)) for part in range(_NUM_TICKS)})


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly, the first and the last among them."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]
