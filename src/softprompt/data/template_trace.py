"""Derives, from one rendering of a conversation, the renderings of its first messages alone.

Each access of a template to a message is logged with the number of characters written by then. Until it reads message
k, it does what it would do for the first k messages alone. Where that read lies between two iterations of its only loop
over the messages, it would leave the loop there and write the rest; the rest is known if it cannot depend on what the
loop did. Every other case is unknown and has to be rendered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jinja2 import nodes

_READS, _READS_PER_MESSAGE = 1_000, 30  # logged at most


class _Read(NamedTuple):
    """One access to the messages, or one iteration of a loop."""

    kind: str  # begins or ends: a loop's body; next or last: an iterator; item: one message; all: how many there are
    number: int  # of the loop, of the iterator, or of the message
    position: int  # characters written before
    message: int = -1  # that an iterator gave


class ReadLog:
    """The accesses of a template to the messages, in order."""

    def __init__(self, num_messages: int) -> None:
        self._most = _READS + _READS_PER_MESSAGE * num_messages
        self.restart()

    def restart(self) -> None:
        self.position = 0  # characters written
        self.reads: list[_Read] = []
        self._is_full = False
        self._num_iterators = 0

    def note(self, kind: str, number: int, message: int = -1) -> None:
        """Add an entry. A log that exceeds its limit is of no use: it is emptied and stays empty."""
        if not self._is_full:
            self.reads.append(_Read(kind, number, self.position, message))
            if len(self.reads) > self._most:
                self._is_full, self.reads = True, []

    def new_iterator(self) -> int:
        self._num_iterators += 1
        return self._num_iterators


class Watched:
    """The list of messages, logging each access. It raises TypeError for a use that it cannot log."""

    def __init__(self, items: list[dict[str, Any]], log: ReadLog, offset: int) -> None:  # Any: a template's own
        self._items, self._log, self._offset = items, log, offset  # the offset of the first among all messages

    __hash__ = None  # type: ignore[assignment]  # as a list

    def _note(self, kind: str, number: int = -1, message: int = -1) -> None:
        self._log.note(kind, number, message)

    def __iter__(self) -> Iterator[dict[str, Any]]:  # Any: as above
        number = self._log.new_iterator()
        self._note("item", self._offset - 1)
        for index, item in enumerate(self._items, start=self._offset):
            self._note("next", number, index)
            yield item
        self._note("last", number)

    def __len__(self) -> int:
        self._note("all")
        return len(self._items)

    def __bool__(self) -> bool:
        self._note("item", self._offset) if self._items else self._note("all")
        return bool(self._items)

    def __getitem__(self, key: Any) -> Any:  # Any: as above
        if isinstance(key, slice):
            return self._slice(key)
        if type(key) is int and 0 <= key < len(self._items):
            self._note("item", self._offset + key)
        else:
            self._note("all")
        return self._items[key]

    def _slice(self, key: slice) -> Any:  # Any: as above
        start = 0 if key.start is None else key.start
        if type(start) is int and 0 <= start <= len(self._items) and key.stop is None and key.step in (None, 1):
            self._note("item", self._offset + start - 1)
            return Watched(self._items[start:], self._log, self._offset + start)
        self._note("all")
        return self._items[key]

    def __reversed__(self) -> Iterator[dict[str, Any]]:  # Any: as above
        self._note("all")
        return iter(self._items[::-1])

    def __contains__(self, item: object) -> bool:
        self._note("all")
        return item in self._items

    def _refuse(self, *_: object) -> Any:  # Any: never comes back
        raise TypeError("the messages are used as a whole")

    __eq__ = __ne__ = __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __str__ = __repr__ = __format__ = _refuse


class Trace:
    """The rendering of the first messages alone, as a part of a whole rendering and a rest."""

    def __init__(self, text: str, log: ReadLog, loops: frozenset[int], num_messages: int) -> None:
        """`loops` are those of `plain_loops`."""
        self._text = text
        self._ends: dict[int, int] = {}  # characters that the first k messages share with the whole
        self._rest = ""
        self._read(log.reads, loops, num_messages)

    def first(self, num_messages: int) -> tuple[int, str] | None:
        """The rendering of the first messages alone: how much of the whole text, and what follows. None if unknown."""
        end = self._ends.get(num_messages)
        return None if end is None else (end, self._rest)

    def _read(self, reads: Sequence[_Read], loops: frozenset[int], num_messages: int) -> None:
        loop, iterator = _loop_and_iterator(reads)
        if loop not in loops:
            return
        num_seen, is_open, end = 0, False, None
        ends: dict[int, int] = {}
        for read in reads:
            if read.kind in ("begins", "ends"):
                is_open = read.kind == "begins" if read.number == loop else is_open
            elif end is not None and not (read.kind == "item" and read.number <= 0):
                return  # the rest looks at the messages again
            elif read.kind == "next":
                if read.message >= num_seen and read.number == iterator and not is_open:
                    ends[read.message] = read.position
                num_seen = max(num_seen, read.message + 1)
            elif read.kind == "item":
                num_seen = max(num_seen, read.number + 1)
            elif read.kind == "all":
                num_seen = num_messages + 1
            elif read.number == iterator and num_seen == num_messages and not is_open:
                end = read.position
        if end is not None:
            self._ends, self._rest = {**ends, num_messages: end}, self._text[end:]


def _loop_and_iterator(reads: Sequence[_Read]) -> tuple[int, int]:
    """The iterator that was exhausted last, and the loop that it drives."""
    iterator = next((read.number for read in reversed(reads) if read.kind == "last"), -1)
    has_begun = False
    for read in reads:
        has_begun |= read.kind == "next" and read.number == iterator
        if has_begun and read.kind == "begins":
            return read.number, iterator
    return -1, iterator


# Which loops are plain ------------------------------------------------------------------------------------------------

_LAZY_FILTERS = ("select", "reject", "selectattr", "rejectattr")


def plain_loops(tree: nodes.Template) -> frozenset[int]:
    """The loops over the messages that run once, at the top level, and that nothing after them can depend on."""
    order = list(_in_order(tree))
    loops = [node for node in order if isinstance(node, nodes.For)]
    names = _Names(tree, order)
    return frozenset(number for number, loop in enumerate(loops) if names.is_plain(loop))


def _in_order(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _in_order(child)


class _Names:
    """The assignments of a template."""

    def __init__(self, tree: nodes.Template, order: Sequence[nodes.Node]) -> None:
        self._order = order
        self._place = {id(node): index for index, node in enumerate(order)}
        self._straight = {id(node) for node in _straight(tree)}  # executed at most once, and not within a block
        self._stores: dict[str, list[nodes.Node]] = {}
        for node in order:
            for name in _stored_names(node):
                self._stores.setdefault(name, []).append(node)
        self._values = {
            id(node.target): node
            for node in order
            if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name) and id(node) in self._straight
        }

    def is_plain(self, loop: nodes.For) -> bool:
        if id(loop) not in self._straight or loop.recursive or loop.else_:
            return False
        start = self._place[id(loop)]
        rest = self._order[start + sum(1 for _ in _in_order(loop)) :]
        read = {node.name for node in rest if isinstance(node, nodes.Name) and node.ctx == "load"}
        return self._is_lazy(loop.iter, frozenset()) and all(
            self._is_constant(name, start, frozenset()) for name in read
        )

    def _is_lazy(self, node: nodes.Node, seen: frozenset[str]) -> bool:
        """Whether an expression yields the messages lazily, one by one."""
        if isinstance(node, nodes.Name):
            values = self._assigned(node.name)
            if node.name in seen:
                return True
            is_messages = node.name == "messages"
            return (
                values is not None
                and (is_messages or bool(values))
                and all(self._is_lazy(value.node, seen | {node.name}) for value in values)
            )
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Slice) and self._is_lazy(node.node, seen)
        return (
            isinstance(node, nodes.Filter)
            and node.name in _LAZY_FILTERS
            and node.node is not None
            and self._is_lazy(node.node, seen)
        )

    def _is_constant(self, name: str, start: int, seen: frozenset[str]) -> bool:
        """Whether a name keeps its value from `start` on: it was set before, and to an immutable value."""
        values = self._assigned(name)
        if values is None or name in seen:
            return values is not None
        for value in values:
            inner = list(_in_order(value.node))
            if self._place[id(value)] > start or any(isinstance(node, (nodes.Call, nodes.Filter)) for node in inner):
                return False
            names = {node.name for node in inner if isinstance(node, nodes.Name)}
            if not all(self._is_constant(each, start, seen | {name}) for each in names):
                return False
        return True

    def _assigned(self, name: str) -> list[nodes.Assign] | None:
        """The plain assignments to a name; None if it is set in other ways too."""
        stores = self._stores.get(name, [])
        values = [self._values[id(node)] for node in stores if id(node) in self._values]
        return values if len(values) == len(stores) else None


def _straight(node: nodes.Node) -> Iterator[nodes.Node]:
    for child in node.iter_child_nodes():
        yield child
        if isinstance(child, nodes.If):
            yield from _straight(child)


def _stored_names(node: nodes.Node) -> tuple[str, ...]:
    if isinstance(node, nodes.Name):
        return (node.name,) if node.ctx != "load" else ()
    if isinstance(node, (nodes.NSRef, nodes.Macro)):
        return (node.name,)
    if isinstance(node, nodes.Import):
        return (node.target,)
    if isinstance(node, nodes.FromImport):
        return tuple(each if isinstance(each, str) else each[1] for each in node.names)
    return ()
