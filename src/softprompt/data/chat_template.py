"""A chat template as a function from messages to text that ends: Jinja as transformers sets it up, within bounds.

A template is data that comes with a base, and what it is given comes from clients. So each rendering has a budget of
steps and of characters in proportion to its messages: loops, calls, filters and whatever makes text longer is counted
before it is done. Results are those of `transformers.utils.chat_template_utils.render_jinja_template`.

A rendering can be traced: where in the text each message was first asked for. That tells what the template writes for
the first messages alone, without rendering them again; see `Trace`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from types import CodeType
from typing import Any, NamedTuple, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from softprompt.compute_share import yield_point
from softprompt.data.messages import Message
from softprompt.data.template_trace import ReadLog, Trace, Watched, plain_loops
from softprompt.errors import DataError

_STEPS, _STEPS_PER_MESSAGE = 300_000, 300
_CHARACTERS, _CHARACTERS_PER_MESSAGE, _GROWTH = 2**20, 1_000, 16  # a template may write a message's words several times
_STEP_CHARACTERS, _STEP_ITEMS = 64, 16  # that are copied or searched in about the time of a step
_BREATH_STEPS = 5_000
_MOST_BITS = 10_000  # of a whole number
_LONGEST_REASON = 300


class Span(NamedTuple):
    """A stretch of a rendered conversation."""

    start: int  # characters
    end: int


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    marks: list[Span]  # what `{% generation %}` blocks wrote
    trace: Trace
    num_steps: int  # what it took


class ChatTemplate:
    """The source of a template with the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:  # Any: text, or a list of texts
        self.source = source
        self._special_tokens = special_tokens

    def render(
        self, messages: Sequence[Message], where: str, *, generation_prompt: bool = False, is_traced: bool = True
    ) -> Rendered:
        """The messages as text. A trace costs a little, and tells nothing where it is not asked for.

        Raises DataError, opening with `where`, where the template refuses, fails or does not end."""
        work = _Work(messages)
        try:
            return self._rendered(work, messages, generation_prompt, is_traced)
        except Exception as error:
            if error is work.interruption:
                raise
            raise DataError(f"{where}: the tokenizer's chat template {_reason(error)}") from error

    def _rendered(self, work: _Work, messages: Sequence[Message], generation_prompt: bool, is_traced: bool) -> Rendered:
        compiled = _compile(self.source)
        environment = _Environment(work)
        template = environment.template_class.from_code(environment, compiled.code, environment.make_globals(None))
        plain = [_plain_message(message) for message in messages]
        given: object = Watched(plain, work.log, 0) if is_traced and compiled.plain_loops else plain
        try:
            text = self._text(template, work, given, generation_prompt)
        except Exception as error:  # perhaps because what the messages are used for cannot be watched
            if given is plain or isinstance(error, _TooMuchError) or error is work.interruption:
                raise
            work.restart()
            text = self._text(template, work, plain, generation_prompt)
            work.log.reads = []
        trace = Trace(text, work.log, compiled.plain_loops, len(messages))
        return Rendered(text, work.marks, trace, work.num_steps)

    def _text(self, template: jinja2.Template, work: _Work, messages: object, generation_prompt: bool) -> str:
        parts = template.generate(
            messages=messages, tools=None, documents=None, add_generation_prompt=generation_prompt,
            **self._special_tokens,
        )  # fmt: skip
        written = []
        for part in parts:
            work.wrote(part)
            written.append(part)
        return "".join(written)


def _reason(error: Exception) -> str:
    said = str(error)
    shown = said if len(said) <= _LONGEST_REASON else f"{said[: _LONGEST_REASON - 3]}..."
    if isinstance(error, _TooMuchError):
        return f"does not end: {shown}"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"cannot be read: {shown}"
    if isinstance(error, RecursionError):
        return "does not end: it calls itself too deeply, or a message is nested too deeply"
    if isinstance(error, (jinja2.TemplateError, TypeError, ValueError)):
        return f"refuses the messages: {shown}"
    return f"fails: {type(error).__name__}: {shown}"


# Bounds ---------------------------------------------------------------------------------------------------------------


class _TooMuchError(Exception):
    """A rendering is longer than any conversation needs."""


class _Work:
    """What one rendering has done so far, and may do."""

    def __init__(self, messages: Sequence[Message] = ()) -> None:
        size = sum(len(value) for message in messages for value in message.values() if isinstance(value, str))
        self._most_steps = _STEPS + _STEPS_PER_MESSAGE * len(messages) + size // 2
        self.most_characters = _CHARACTERS + _CHARACTERS_PER_MESSAGE * len(messages) + _GROWTH * size
        self.num_steps, self._next_breath = 0, _BREATH_STEPS
        self.interruption: Exception | None = None  # raised by whoever stops this thread's work
        self.log = ReadLog(len(messages))
        self.restart()

    def restart(self) -> None:
        self.log.restart()
        self.marks: list[Span] = []

    def wrote(self, part: str) -> None:
        self.log.position += len(part)
        self.copied(len(part))
        self.check_length(self.log.position)

    def copied(self, num_characters: int) -> None:
        self.step(1 + num_characters // _STEP_CHARACTERS)

    def step(self, count: int = 1) -> None:
        self.num_steps += count
        if self.num_steps > self._most_steps:
            raise _TooMuchError(f"it has taken {self._most_steps:,} steps, more than these messages need")
        if self.num_steps >= self._next_breath:
            self._next_breath = self.num_steps + _BREATH_STEPS
            try:
                yield_point()
            except Exception as error:
                self.interruption = error
                raise

    def check_length(self, num_characters: int) -> None:
        if num_characters > self.most_characters:
            raise _TooMuchError(f"it makes more than {self.most_characters:,} characters of these messages")

    def weigh(self, value: object) -> int:
        """Characters that a value takes as text, at least; each of them is paid for."""
        total, rest = 0, [value]
        while rest:
            each = rest.pop()
            self.step()
            if isinstance(each, str):
                total += len(each)
                self.copied(len(each))
            elif isinstance(each, Mapping):
                rest += each.keys()
                rest += each.values()
            elif isinstance(each, (list, tuple, set, frozenset, range)):
                self.step(len(each))
                rest += each
            total += 1
        self.check_length(total)
        return total

    def unrolled(self, value: object) -> object:
        """A list of what an iterator gives, whose size can be known."""
        return self._listed(value) if isinstance(value, Iterator) else value

    def _listed(self, items: Iterator[object]) -> list[object]:
        found = []
        for item in items:
            self.step()
            found.append(item)
        return found

    def skim(self, value: object) -> None:
        """Pays for walking over a value, not into it."""
        if isinstance(value, str):
            self.copied(len(value))
        elif isinstance(value, (list, tuple, set, frozenset, dict, range)):
            self.step(1 + len(value) // _STEP_ITEMS)


# What looks at values without turning them into text, and what gives a text that is no longer than its own.
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
_JINJAS_OWN = ("_loop_vars", "_block_vars")  # what it passes to every call
_LONG_NUMBER = re.compile(r"\d{6}")


def _check_growth(work: _Work, name: str, values: Sequence[Any]) -> None:  # Any: a template's own
    """Pays for a filter, a test or a method, by what it is called on and with."""
    if name in _LOOKING or (name in _SHORTENING and all(isinstance(value, str) for value in values)):
        for value in values:
            work.skim(value)
        return
    sizes = [work.weigh(value) for value in values]
    numbers = [abs(value) for value in values if type(value) is int]
    if name in _WIDE and numbers:
        lines = values[0].count("\n") + values[0].count("\t") if isinstance(values[0], str) else sizes[0]
        work.check_length((1 + lines) * max(numbers))
    if name == "replace" and len(values) > 2:
        work.check_length((1 + str(values[0]).count(str(values[1]))) * sizes[2])
    if name == "join" and len(values) > 1:
        text, parts = (0, 1) if isinstance(values[0], str) and not isinstance(values[1], str) else (1, 0)
        work.check_length(sizes[parts] + _length(values[parts]) * sizes[text])
    if name == "sum" and len(values) > 1:
        work.check_length(sizes[0] * _length(values[0]))
    if name in _FORMATTING:
        _check_format(work, str(values[0]), sizes[1:], numbers)


def _length(value: Any) -> int:  # Any: a template's own
    return len(value) if hasattr(value, "__len__") else 1


def _check_format(work: _Work, pattern: str, sizes: Sequence[int], numbers: Sequence[int]) -> None:
    """Fields that are very wide, or many of something long."""
    if _LONG_NUMBER.search(pattern) or max(numbers, default=0) >= 10**5:
        raise _TooMuchError("it formats text to a width of more than 100,000 characters")
    work.check_length(len(pattern) + (pattern.count("%") + pattern.count("{")) * (sum(sizes) + 10**5 // 64))


class _Paid(dict[str, Callable[..., Any]]):  # Any: Jinja's own filters and tests
    """Filters or tests that pay for what they do."""

    def __init__(self, known: Mapping[str, Callable[..., Any]], work: _Work) -> None:  # Any: as above
        super().__init__(known)
        self._work = work

    def __getitem__(self, name: str) -> Callable[..., Any]:  # Any: as above
        return self._paid(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:  # Any: as above
        known = super().get(name)
        return default if known is None else self._paid(name, known)

    def _paid(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:  # Any: as above
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or the environment comes first

        @wraps(function)
        def paid(*args: Any, **named: Any) -> Any:  # Any: as above
            if name in ("join", "sum"):
                args = tuple(self._work.unrolled(value) for value in args)
            _check_growth(self._work, name, (*args[first:], *named.values()))
            return self._counted(function(*args, **named))

        return paid

    def _counted(self, result: Any) -> Any:  # Any: as above
        if not isinstance(result, Iterator):
            self._work.skim(result)
            return result
        return self._steps(result)

    def _steps(self, items: Iterator[Any]) -> Iterator[Any]:  # Any: as above
        for item in items:
            self._work.step()
            yield item


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, made for one rendering, with what that may cost."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, work: _Work) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols])
        self.work = work
        self.finalize = self._written
        self.concat = self._concatenated  # type: ignore[assignment]  # Jinja's way to join what a block wrote
        self.filters["tojson"] = _to_json
        known: Any = self.filters, self.tests  # Any: Jinja has them as dicts of "function"
        filters, tests = (_Paid(each, work) for each in known)
        self.filters, self.tests = cast(Any, filters), cast(Any, tests)
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise, strftime_now=_now, dict=_Dictionaries(), namespace=_Namespace)

    def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:  # noqa: N805  # Any: Jinja's
        if getattr(__obj, "__self__", None) is __self:
            return __obj(*args)
        target = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # str.format comes wrapped
        if getattr(__obj, "__name__", "") == "join":
            args = tuple(__self.work.unrolled(value) for value in args)
        values = (*args, *(value for name, value in named.items() if name not in _JINJAS_OWN))
        if isinstance(target, (str, list, tuple, dict)):
            _check_growth(__self.work, __obj.__name__, (target, *values))
        else:
            for value in values:
                __self.work.skim(value)
        __self.work.step()
        result = super().call(__context, __obj, *args, **named)
        __self.work.skim(result)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # Any: a template's own
        if operator == "%" and isinstance(left, str):
            _check_growth(self.work, "format", (left, *(right if isinstance(right, tuple) else (right,))))
        elif operator == "+":
            if hasattr(left, "__len__") and hasattr(right, "__len__"):
                self.work.check_length(len(left) + len(right))
        elif operator in ("*", "**"):
            _check_product(self.work, operator, left, right)
        result = super().call_binop(context, operator, left, right)
        self.work.skim(result)
        return result

    def _written(self, value: object) -> object:
        if not isinstance(value, str):
            self.work.weigh(value)
        return value

    def _concatenated(self, parts: Sequence[str]) -> str:
        known = list(parts)
        size = sum(map(len, known))
        self.work.copied(size)
        self.work.check_length(size)
        return "".join(known)

    # What `_Bounded` writes into a template:

    def begins(self, loop: int) -> bool:
        self.work.step()
        if loop >= 0:
            self.work.log.note("begins", loop)
        return True

    def ends(self, loop: int) -> None:
        if loop >= 0:
            self.work.log.note("ends", loop)

    def tests_item(self) -> bool:
        self.work.step()
        return True

    def joined(self, *values: object) -> str:
        for value in values:
            self.work.check_length(len(value)) if isinstance(value, str) else self.work.weigh(value)
        return self._concatenated([str(value) for value in values])

    def skimmed(self, value: object) -> object:
        self.work.skim(value)
        return value

    def weighed(self, value: object) -> object:
        if not isinstance(value, Watched):
            self.work.weigh(value) if not isinstance(value, str) else self.work.skim(value)
        return value


def _check_product(work: _Work, operator: str, left: Any, right: Any) -> None:  # Any: a template's own
    if type(left) in (int, bool) and type(right) in (int, bool):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MOST_BITS:
            raise _TooMuchError("it computes a whole number of thousands of digits")
    for one, other in ((left, right), (right, left)):
        if hasattr(one, "__len__") and isinstance(other, int):
            work.check_length(len(one) * max(other, 0))


class _Generation(Extension):
    """`{% generation %}`: what the assistant says, noted while it is written."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja has it

    def parse(self, parser: Any) -> nodes.Node:  # Any: Jinja's parser
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("generated"), [], [], body).set_lineno(line)

    def generated(self, caller: Callable[[], str]) -> str:
        text = caller()
        work: _Work = cast(_Environment, self.environment).work
        position = work.log.position
        work.marks.append(Span(position, position + len(text)))
        return text


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _now(pattern: str) -> str:
    if _LONG_NUMBER.search(pattern):
        raise _TooMuchError("it formats a date to a width of more than 100,000 characters")
    return datetime.now().strftime(pattern)


class _Dictionaries:
    """`dict` without the class behind it."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:  # Any: a template's own
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:  # Any: as above
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """Without underscored names, which could reach into Python."""

    def __init__(*args: Any, **named: Any) -> None:  # Any: a template's own
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **named)
        for name in attributes:
            _check_public(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:  # Any: as above
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}, a name that begins with _")


def _plain(value: Any) -> Any:  # Any: what a row holds
    """JSON's types alone: nothing that a template is given has methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


def _plain_message(message: Message) -> dict[str, Any]:  # Any: as above
    """Reasoning under all of the names that templates read it by; `weight` is no business of theirs."""
    plain = {key: _plain(value) for key, value in message.items() if key != "weight"}
    said = next((plain[key] for key in _REASONING_KEYS if plain.get(key) is not None), None)
    return plain if said is None else {"thinking": said, **plain, "reasoning_content": said}


# Compiling ------------------------------------------------------------------------------------------------------------


class _Compiled(NamedTuple):
    """A template's code, and its loops that a trace can be read by."""

    code: CodeType
    plain_loops: frozenset[int]


@lru_cache(maxsize=16)
def _compile(source: str) -> _Compiled:
    environment = _Environment(_Work())
    tree = environment.parse(source)
    plain = plain_loops(tree)
    bounded = _Bounded(environment, plain).visit(tree)
    return _Compiled(environment.compile(bounded), plain)


class _Bounded(NodeTransformer):
    """Every loop, copy and comparison of a template pays for itself. Loops are numbered in the order of the text; those
    that no trace is read by are all -1.
    """

    def __init__(self, environment: _Environment, traced: frozenset[int]) -> None:
        self._environment, self._traced = environment, traced
        self._num_loops = 0

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802  # Jinja's name for it
        number, self._num_loops = self._num_loops, self._num_loops + 1
        self.generic_visit(node)
        number = number if number in self._traced else -1
        begins, ends = (self._statement(name, node, number) for name in ("begins", "ends"))
        node.body = [begins, *node.body, ends]
        if node.test is not None:
            node.test = self._known(nodes.And(self._call("tests_item", node), node.test), node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._call("joined", node, *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._call("skimmed", node, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const) and (
                operand.op in ("in", "notin") or not isinstance(node.expr, nodes.Const)
            ):
                operand.expr = self._call("weighed", node, operand.expr)
        return node

    def _statement(self, name: str, node: nodes.Node, number: int) -> nodes.Node:
        call = self._call(name, node, self._known(nodes.Const(number), node))
        made: nodes.Node = self._known(nodes.ExprStmt(call), node)
        return made

    def _call(self, name: str, node: nodes.Node, *args: nodes.Node) -> nodes.Expr:
        function = self._known(nodes.EnvironmentAttribute(name), node)
        return cast(nodes.Expr, self._known(nodes.Call(function, list(args), [], None, None), node))

    def _known(self, made: Any, node: nodes.Node) -> Any:  # Any: the kind of node that was made
        return made.set_lineno(node.lineno).set_environment(self._environment)
