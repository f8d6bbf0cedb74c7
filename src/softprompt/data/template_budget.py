"""The budget of one rendering of a chat template: steps and characters, charged before they are spent."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, NamedTuple

from softprompt.compute_share import yield_point
from softprompt.data.messages import Message
from softprompt.data.template_trace import ReadLog

_STEPS, _STEPS_PER_MESSAGE = 300_000, 300
_CHARACTERS, _CHARACTERS_PER_MESSAGE, _GROWTH = 2**20, 1_000, 16  # a template may write a message's words several times
_STEP_CHARACTERS, _STEP_ITEMS = 64, 16  # copied or searched in about the time of one step
_BREATH_STEPS = 5_000
_MOST_BITS = 10_000  # of a whole number


class Span(NamedTuple):
    """A span of a rendered conversation."""

    start: int  # characters
    end: int


class BudgetError(Exception):
    """A rendering is longer than any conversation needs."""


class Budget:
    """What one rendering has used so far, and its limits."""

    def __init__(self, messages: Sequence[Message] = ()) -> None:
        size = sum(len(value) for message in messages for value in message.values() if isinstance(value, str))
        self._most_steps = _STEPS + _STEPS_PER_MESSAGE * len(messages) + size // 2
        self.most_characters = _CHARACTERS + _CHARACTERS_PER_MESSAGE * len(messages) + _GROWTH * size
        self.num_steps, self._next_breath = 0, _BREATH_STEPS
        self.interruption: Exception | None = None  # raised at a yield point to stop this thread
        self.log = ReadLog(len(messages))
        self.restart()

    def restart(self) -> None:
        self.log.restart()
        self.marks: list[Span] = []

    def charge_output(self, part: str) -> None:
        self.log.position += len(part)
        self.charge_copy(len(part))
        self.check_length(self.log.position)

    def charge_copy(self, num_characters: int) -> None:
        self.charge(1 + num_characters // _STEP_CHARACTERS)

    def charge(self, count: int = 1) -> None:
        self.num_steps += count
        if self.num_steps > self._most_steps:
            raise BudgetError(f"it has taken {self._most_steps:,} steps, more than these messages need")
        if self.num_steps >= self._next_breath:
            self._next_breath = self.num_steps + _BREATH_STEPS
            try:
                yield_point()
            except Exception as error:
                self.interruption = error
                raise

    def check_length(self, num_characters: int) -> None:
        if num_characters > self.most_characters:
            raise BudgetError(f"it makes more than {self.most_characters:,} characters of these messages")

    def charge_value(self, value: object) -> int:
        """Charge for a value as text; returns the characters that it has at least."""
        total, rest = 0, [value]
        while rest:
            each = rest.pop()
            self.charge()
            if isinstance(each, str):
                total += len(each)
                self.charge_copy(len(each))
            elif isinstance(each, Mapping):
                rest += each.keys()
                rest += each.values()
            elif isinstance(each, (list, tuple, set, frozenset, range)):
                self.charge(len(each))
                rest += each
            total += 1
        self.check_length(total)
        return total

    def as_list(self, value: object) -> object:
        """The items of an iterator as a list, whose size is known; other values as they are."""
        return self._listed(value) if isinstance(value, Iterator) else value

    def _listed(self, items: Iterator[object]) -> list[object]:
        found = []
        for item in items:
            self.charge()
            found.append(item)
        return found

    def charge_scan(self, value: object) -> None:
        """Charge for a pass over a value, but not into its items."""
        if isinstance(value, str):
            self.charge_copy(len(value))
        elif isinstance(value, (list, tuple, set, frozenset, dict, range)):
            self.charge(1 + len(value) // _STEP_ITEMS)


# Functions that inspect values without making text of them, and functions whose text is no longer than their input.
_LOOKING = frozenset({
    "length", "count", "first", "last", "list", "map", "select", "reject", "selectattr", "rejectattr", "default", "d",
    "items", "attr", "random", "reverse", "defined", "undefined", "none", "boolean", "false", "true", "mapping",
    "number", "integer", "float", "sequence", "iterable", "callable", "sameas", "odd", "even", "divisibleby", "filter",
    "test", "get", "keys", "values",
})  # fmt: skip
_SHORTENING = frozenset({
    "string", "lower", "upper", "trim", "strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "startswith",
    "endswith", "find", "rfind", "index", "rindex", "title", "capitalize", "isdigit", "isalpha", "isalnum", "isspace",
    "isupper", "islower", "partition", "rpartition", "removeprefix", "removesuffix", "swapcase", "casefold",
})  # fmt: skip
_WIDE = frozenset({"center", "ljust", "rjust", "zfill", "indent", "batch", "slice", "tojson", "expandtabs", "wordwrap"})
_FORMATTING = frozenset({"format", "format_map"})
JINJAS_OWN = ("_loop_vars", "_block_vars")  # passed by Jinja to every call
LONG_NUMBER = re.compile(r"\d{6}")


def check_growth(budget: Budget, name: str, values: Sequence[Any]) -> None:  # Any: a template's own
    """Charge for a filter, a test or a method, by its arguments."""
    if name in _LOOKING or (name in _SHORTENING and all(isinstance(value, str) for value in values)):
        for value in values:
            budget.charge_scan(value)
        return
    sizes = [budget.charge_value(value) for value in values]
    numbers = [abs(value) for value in values if type(value) is int]
    if name in _WIDE and numbers:
        lines = values[0].count("\n") + values[0].count("\t") if isinstance(values[0], str) else sizes[0]
        budget.check_length((1 + lines) * max(numbers))
    if name == "replace" and len(values) > 2:
        budget.check_length((1 + str(values[0]).count(str(values[1]))) * sizes[2])
    if name == "join" and len(values) > 1:
        text, parts = (0, 1) if isinstance(values[0], str) and not isinstance(values[1], str) else (1, 0)
        budget.check_length(sizes[parts] + _length(values[parts]) * sizes[text])
    if name == "sum" and len(values) > 1:
        budget.check_length(sizes[0] * _length(values[0]))
    if name in _FORMATTING:
        _check_format(budget, str(values[0]), sizes[1:], numbers)


def _length(value: Any) -> int:  # Any: a template's own
    return len(value) if hasattr(value, "__len__") else 1


def _check_format(budget: Budget, pattern: str, sizes: Sequence[int], numbers: Sequence[int]) -> None:
    """Refuse very wide fields, and many fields of long values."""
    if LONG_NUMBER.search(pattern) or max(numbers, default=0) >= 10**5:
        raise BudgetError("it formats text to a width of more than 100,000 characters")
    budget.check_length(len(pattern) + (pattern.count("%") + pattern.count("{")) * (sum(sizes) + 10**5 // 64))


class MeteredFunctions(dict[str, Callable[..., Any]]):  # Any: Jinja's own filters and tests
    """Filters or tests that charge the budget when they are called."""

    def __init__(self, known: Mapping[str, Callable[..., Any]], budget: Budget) -> None:  # Any: as above
        super().__init__(known)
        self._budget = budget

    def __getitem__(self, name: str) -> Callable[..., Any]:  # Any: as above
        return self._metered(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:  # Any: as above
        known = super().get(name)
        return default if known is None else self._metered(name, known)

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:  # Any: as above
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or the environment comes first

        @wraps(function)
        def metered(*args: Any, **named: Any) -> Any:  # Any: as above
            if name in ("join", "sum"):
                args = tuple(self._budget.as_list(value) for value in args)
            check_growth(self._budget, name, (*args[first:], *named.values()))
            return self._counted(function(*args, **named))

        return metered

    def _counted(self, result: Any) -> Any:  # Any: as above
        if not isinstance(result, Iterator):
            self._budget.charge_scan(result)
            return result
        return self._steps(result)

    def _steps(self, items: Iterator[Any]) -> Iterator[Any]:  # Any: as above
        for item in items:
            self._budget.charge()
            yield item


def check_product(budget: Budget, operator: str, left: Any, right: Any) -> None:  # Any: a template's own
    if type(left) in (int, bool) and type(right) in (int, bool):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MOST_BITS:
            raise BudgetError("it computes a whole number of thousands of digits")
    for one, other in ((left, right), (right, left)):
        if hasattr(one, "__len__") and isinstance(other, int):
            budget.check_length(len(one) * max(other, 0))
