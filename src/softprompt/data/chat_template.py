"""Chat templates: Jinja as transformers configures it, rendered within a budget so that every rendering ends.

A template is data that comes with a base, and its input comes from clients. So each rendering has a budget of steps and
characters in proportion to its messages: loops, calls, filters and whatever lengthens text are charged before they run.
Results equal those of `transformers.utils.chat_template_utils.render_jinja_template`.

A rendering can be traced: at which character each message was first read. From that follows what the template writes
for the first messages alone, without rendering them again; see `Trace`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from softprompt.data.messages import Message
from softprompt.data.template_budget import (
    JINJAS_OWN,
    LONG_NUMBER,
    Budget,
    BudgetError,
    MeteredFunctions,
    Span,
    check_growth,
    check_product,
)
from softprompt.data.template_trace import Trace, Watched, plain_loops
from softprompt.errors import DataError

# The assistant's turn ends with EOS in the history too, as it does when it is generated.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{% if messages %}{{ '\\n' }}{% endif %}Assistant:{% endif %}"
)
_LONGEST_REASON = 300


class RenderedChat(NamedTuple):
    """A conversation as text."""

    text: str
    marks: list[Span]  # written by `{% generation %}` blocks
    trace: Trace
    num_steps: int  # charged to the budget


class ChatTemplate:
    """A template's source with the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:  # Any: text, or a list of texts
        self.source = source
        self._special_tokens = special_tokens

    def render(
        self, messages: Sequence[Message], where: str, *, generation_prompt: bool = False, is_traced: bool = True
    ) -> RenderedChat:
        """The messages as text. Without `is_traced` the trace is empty, and rendering a little faster.

        Raises DataError, opening with `where`, where the template refuses, fails or does not end.
        """
        budget = Budget(messages)
        try:
            return self._rendered(budget, messages, generation_prompt, is_traced)
        except Exception as error:
            if error is budget.interruption:
                raise
            raise DataError(f"{where}: the tokenizer's chat template {_reason(error)}") from error

    def _rendered(
        self, budget: Budget, messages: Sequence[Message], generation_prompt: bool, is_traced: bool
    ) -> RenderedChat:
        compiled = _compile(self.source)
        environment = _Environment(budget)
        template = environment.template_class.from_code(environment, compiled.code, environment.make_globals(None))
        plain = [_plain_message(message) for message in messages]
        given: object = Watched(plain, budget.log, 0) if is_traced and compiled.plain_loops else plain
        try:
            text = self._text(template, budget, given, generation_prompt)
        except Exception as error:  # perhaps from a use of the messages that `Watched` does not support
            if given is plain or isinstance(error, BudgetError) or error is budget.interruption:
                raise
            budget.restart()
            text = self._text(template, budget, plain, generation_prompt)
            budget.log.reads = []
        trace = Trace(text, budget.log, compiled.plain_loops, len(messages))
        return RenderedChat(text, budget.marks, trace, budget.num_steps)

    def _text(self, template: jinja2.Template, budget: Budget, messages: object, generation_prompt: bool) -> str:
        parts = template.generate(
            messages=messages, tools=None, documents=None, add_generation_prompt=generation_prompt,
            **self._special_tokens,
        )  # fmt: skip
        written = []
        for part in parts:
            budget.charge_output(part)
            written.append(part)
        return "".join(written)


def _reason(error: Exception) -> str:
    text = str(error)
    shown = text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 3]}..."
    if isinstance(error, BudgetError):
        return f"does not end: {shown}"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"cannot be read: {shown}"
    if isinstance(error, RecursionError):
        return "does not end: it calls itself too deeply, or a message is nested too deeply"
    if isinstance(error, (jinja2.TemplateError, TypeError, ValueError)):
        return f"refuses the messages: {shown}"
    return f"fails: {type(error).__name__}: {shown}"


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, for one rendering with its budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, budget: Budget) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols])
        self.budget = budget
        self.finalize = self._written
        self.concat = self._concatenated  # type: ignore[assignment]  # how Jinja joins a block's output
        self.filters["tojson"] = _to_json
        known: Any = self.filters, self.tests  # Any: Jinja has them as dicts of "function"
        filters, tests = (MeteredFunctions(each, budget) for each in known)
        self.filters, self.tests = cast(Any, filters), cast(Any, tests)
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise, strftime_now=_now, dict=_Dictionaries(), namespace=_Namespace)

    def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:  # noqa: N805  # Any: Jinja's
        if getattr(__obj, "__self__", None) is __self:
            return __obj(*args)
        target = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # str.format comes wrapped
        if getattr(__obj, "__name__", "") == "join":
            args = tuple(__self.budget.as_list(value) for value in args)
        values = (*args, *(value for name, value in named.items() if name not in JINJAS_OWN))
        if isinstance(target, (str, list, tuple, dict)):
            check_growth(__self.budget, __obj.__name__, (target, *values))
        else:
            for value in values:
                __self.budget.charge_scan(value)
        __self.budget.charge()
        result = super().call(__context, __obj, *args, **named)
        __self.budget.charge_scan(result)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # Any: a template's own
        if operator == "%" and isinstance(left, str):
            check_growth(self.budget, "format", (left, *(right if isinstance(right, tuple) else (right,))))
        elif operator == "+":
            if hasattr(left, "__len__") and hasattr(right, "__len__"):
                self.budget.check_length(len(left) + len(right))
        elif operator in ("*", "**"):
            check_product(self.budget, operator, left, right)
        result = super().call_binop(context, operator, left, right)
        self.budget.charge_scan(result)
        return result

    def _written(self, value: object) -> object:
        if not isinstance(value, str):
            self.budget.charge_value(value)
        return value

    def _concatenated(self, parts: Sequence[str]) -> str:
        known = list(parts)
        size = sum(map(len, known))
        self.budget.charge_copy(size)
        self.budget.check_length(size)
        return "".join(known)

    # Called by what `_Bounded` inserts into a template:

    def begins(self, loop: int) -> bool:
        self.budget.charge()
        if loop >= 0:
            self.budget.log.note("begins", loop)
        return True

    def ends(self, loop: int) -> None:
        if loop >= 0:
            self.budget.log.note("ends", loop)

    def tests_item(self) -> bool:
        self.budget.charge()
        return True

    def joined(self, *values: object) -> str:
        for value in values:
            self.budget.check_length(len(value)) if isinstance(value, str) else self.budget.charge_value(value)
        return self._concatenated([str(value) for value in values])

    def skimmed(self, value: object) -> object:
        self.budget.charge_scan(value)
        return value

    def weighed(self, value: object) -> object:
        if not isinstance(value, Watched):
            self.budget.charge_value(value) if not isinstance(value, str) else self.budget.charge_scan(value)
        return value


class _Generation(Extension):
    """`{% generation %}`: marks the text of the assistant while it is written."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja has it

    def parse(self, parser: Any) -> nodes.Node:  # Any: Jinja's parser
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("generated"), [], [], body).set_lineno(line)

    def generated(self, caller: Callable[[], str]) -> str:
        text = caller()
        budget: Budget = cast(_Environment, self.environment).budget
        position = budget.log.position
        budget.marks.append(Span(position, position + len(text)))
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
    if LONG_NUMBER.search(pattern):
        raise BudgetError("it formats a date to a width of more than 100,000 characters")
    return datetime.now().strftime(pattern)


class _Dictionaries:
    """`dict` without access to the class."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:  # Any: a template's own
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:  # Any: as above
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with _, which could reach into Python."""

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
    """JSON types only, so that a template never gets an object with methods of its own."""
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
    """A message with its reasoning under every name that templates use, and without `weight`, which is ours."""
    plain = {key: _plain(value) for key, value in message.items() if key != "weight"}
    text = next((plain[key] for key in _REASONING_KEYS if plain.get(key) is not None), None)
    return plain if text is None else {"thinking": text, **plain, "reasoning_content": text}


# Compiling ------------------------------------------------------------------------------------------------------------


class _Compiled(NamedTuple):
    """A template's code, and the loops that a trace can be derived from."""

    code: CodeType
    plain_loops: frozenset[int]


@lru_cache(maxsize=16)
def _compile(source: str) -> _Compiled:
    environment = _Environment(Budget())
    tree = environment.parse(source)
    plain = plain_loops(tree)
    bounded = _Bounded(environment, plain).visit(tree)
    return _Compiled(environment.compile(bounded), plain)


class _Bounded(NodeTransformer):
    """Makes every loop, copy and comparison of a template charge the budget. Loops are numbered in source order; those
    that no trace is derived from are all -1.
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
