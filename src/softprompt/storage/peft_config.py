"""`adapter_config.json` as PEFT writes it: what it states of a soft prompt, and what is written for one of ours.

PEFT knows no masked language models. A cloze prompt is FEATURE_EXTRACTION, in which PEFT runs any model behind the
virtual tokens, one with a masked-LM head too; without a task_type it would ignore the prompt.

For encoder-decoders PEFT writes 2P vectors (`num_transformer_submodules` 2) and reads the first P of them.

P prompt length, H embedding width, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from softprompt.base import Base
from softprompt.errors import AdapterError
from softprompt.prompt import SoftPrompt
from softprompt.storage.files import parse_object
from softprompt.types import BaseKind, InputForm, Pooling, PromptRecord, Task

PEFT_TYPE = "PROMPT_TUNING"
TASK_TYPE = "CAUSAL_LM"
HEAD_PREFIX = "base_model."  # of a head's weights, beside the prompt's

_FORMAT = "0.21.2"  # the release whose keys these are
_SEQ_2_SEQ = "SEQ_2_SEQ_LM"
_TASKS: Mapping[str, Task] = {
    TASK_TYPE: "generate",
    _SEQ_2_SEQ: "generate",
    "SEQ_CLS": "classify",
    "TOKEN_CLS": "tag",
    "QUESTION_ANS": "answer",
    "FEATURE_EXTRACTION": "embed",
}
_TASK_TYPES: dict[Task, str] = {task: name for name, task in _TASKS.items()} | {"cloze": "FEATURE_EXTRACTION"}
MAX_LABELS = 100_000
_LABELLED: tuple[Task, ...] = ("classify", "tag")
# Of an adapter without our record: the columns of a row, as a template and a completion.
_COLUMNS: Mapping[Task, tuple[str, str]] = {
    "classify": ("{text}", "{label}"),
    "tag": ("{words}", "{tags}"),
    "answer": ("{question}\n{context}", "{answers}"),
    "embed": ("{text}", "{positive}"),
}
# The weights [C, D] that give the logits of the labels; the first that a head has.
_OUTPUTS = ("classifier.out_proj.weight", "classifier.weight", "score.weight")


class Stated(NamedTuple):
    """What an adapter_config.json states, checked."""

    task_type: str
    num_virtual_tokens: int  # P
    num_parts: int  # of P vectors each: 2 where a second half is for the decoder
    base_name: str | None

    @property
    def task(self) -> Task:
        return _TASKS[self.task_type]

    @property
    def base_kind(self) -> BaseKind | None:
        """None where several kinds of bases can do the task."""
        return {TASK_TYPE: "causal", _SEQ_2_SEQ: "seq2seq"}.get(self.task_type)  # type: ignore[return-value]  # two kinds


def parse_config(data: bytes, task_type: str | None, where: str) -> dict[str, Any]:
    """The config of a soft prompt; `task_type` stands in where it names none. Raises: AdapterError."""
    config = parse_object(data, where)
    kind = config.get("peft_type")
    if kind != PEFT_TYPE:
        raise AdapterError(f"{where} has the peft_type {kind!r}; only {PEFT_TYPE} adapters are soft prompts")
    stated = config.get("task_type")
    if stated is not None and task_type is not None and stated != task_type:
        raise AdapterError(f"{where} has the task_type {stated!r} and {task_type!r} was given; leave it out")
    check_task_type(task_type if stated is None else stated, where)
    return {**config, "task_type": task_type if stated is None else stated}


def check_task_type(task_type: object, where: str) -> None:
    """Raises: AdapterError for a task of which there are no soft prompts, and where none is known."""
    if task_type is None:
        raise AdapterError(
            f"{where} names no task_type; if it was trained on a causal language model, "
            f"say so: task_type={TASK_TYPE!r} (--task-type {TASK_TYPE})"
        )
    if not isinstance(task_type, str) or task_type not in _TASKS:
        raise AdapterError(f"{where} has the task_type {task_type!r}; it must be one of {', '.join(_TASKS)}")


def stated_by(config: Mapping[str, Any], tensor: Tensor, where: str) -> Stated:
    """What a config states, which has to agree with the vectors [rows, H]. Raises: AdapterError."""
    num_rows, hidden_size = tensor.shape
    task_type, num_virtual_tokens = config["task_type"], config.get("num_virtual_tokens")
    num_parts = _num_parts(config, num_rows, where)
    if num_virtual_tokens is True or num_virtual_tokens != num_rows / num_parts:
        rows = f"{num_virtual_tokens!r}" if num_parts == 1 else f"{num_virtual_tokens!r}, for encoder and decoder each"
        raise AdapterError(
            f"{where}: num_virtual_tokens is {rows}, but the tensor is [{num_rows}, {hidden_size}]; "
            "the two files do not belong together"
        )
    if config.get("token_dim") not in (None, hidden_size):
        raise AdapterError(
            f"{where}: token_dim is {config['token_dim']!r}, but the tensor is [{num_rows}, {hidden_size}]; "
            "the two files do not belong together"
        )
    named = config.get("base_model_name_or_path") or None
    if named is not None and not isinstance(named, str):
        raise AdapterError(f"{where}: base_model_name_or_path is {named!r}; it must be text")
    return Stated(task_type, num_rows // num_parts, num_parts, named)


def _num_parts(config: Mapping[str, Any], num_rows: int, where: str) -> int:
    parts = config.get("num_transformer_submodules")
    if config["task_type"] == _SEQ_2_SEQ:
        if parts is None:
            return 1 if config.get("num_virtual_tokens") == num_rows else 2
        if parts not in (1, 2) or parts is True:
            raise AdapterError(f"{where}: num_transformer_submodules is {parts!r}; an encoder-decoder has 1 or 2")
        return int(parts)
    if parts not in (None, 1):
        kind = "causal language model" if config["task_type"] == TASK_TYPE else "model with one stack of layers"
        raise AdapterError(f"{where}: num_transformer_submodules is {parts!r}; a {kind} has 1")
    return 1


def check_record(record: PromptRecord, stated: Stated, where: str) -> None:
    """Raises: AdapterError where our record is not of what PEFT's config states."""
    kind = stated.base_kind
    if task_type_of(record) == stated.task_type or (record.base_kind is None and record.form.task == stated.task):
        return
    raise AdapterError(
        f"{where}: adapter_config.json has the task_type {stated.task_type!r}, and softprompt.json is of the task "
        f"{record.form.task!r}{'' if kind is None else f' on a base of kind {record.base_kind!r}'}; the two files do "
        "not belong together"
    )


def pefts_form(task: Task, head: Mapping[str, Tensor], where: str) -> InputForm:
    """The form of an adapter without our record: PEFT puts the prompt in front, and has poolings of its own.

    Labels have the names that transformers gives to labels without any. Raises: AdapterError.
    """
    labels: tuple[str, ...] = ()
    if task in _LABELLED:
        output = next((head[name] for name in _OUTPUTS if name in head), None)
        if output is None:
            found = ", ".join(head) or "no weights"
            raise AdapterError(f"{where}: its head has {found}; it must have one of {', '.join(_OUTPUTS)}")
        if len(output) > MAX_LABELS:
            raise AdapterError(f"{where}: its head has {len(output):,} labels; the limit is {MAX_LABELS:,}")
        labels = tuple(f"LABEL_{number}" for number in range(len(output)))
    if task == "generate":
        return InputForm()
    template, completion = _COLUMNS[task]
    pooling: Pooling | None = "peft" if task in ("classify", "embed") else None
    return InputForm(
        kind="template", template=template, completion=completion, labels=labels, task=task, pooling=pooling
    )


def task_type_of(record: PromptRecord) -> str:
    """PEFT's name for what a prompt was trained for."""
    if record.form.task == "generate":
        return _SEQ_2_SEQ if record.base_kind == "seq2seq" or record.form.has_decoder_prompt else TASK_TYPE
    return _TASK_TYPES[record.form.task]


def modules_to_save(head: Mapping[str, Tensor]) -> list[str] | None:
    """The modules of transformers' headed model that PEFT has to wrap to load the head; None without a head.

    PEFT wraps what ends in one of these names: of a pooler inside the backbone, its name there too ("bert.pooler").
    """
    names = {".".join(name.split(".")[: 2 if ".pooler." in name else 1]) for name in head}
    return sorted(names) or None


def config_of(prompt: SoftPrompt, base: Base | None) -> dict[str, Any]:
    """Every key that PEFT writes. The start is always RANDOM: PEFT then loads it without asking for a tokenizer."""
    model_config = None if base is None else base.model.config.get_text_config()
    return {
        "auto_mapping": None,
        "base_model_name_or_path": prompt.record.base_source or prompt.record.base_name,
        "inference_mode": True,
        "modules_to_save": modules_to_save(prompt.head),
        "num_attention_heads": getattr(model_config, "num_attention_heads", None),
        "num_layers": getattr(model_config, "num_hidden_layers", None),
        "num_transformer_submodules": 2 if prompt.num_decoder_tokens else 1,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "peft_type": PEFT_TYPE,
        "peft_version": _FORMAT,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": None,
        "task_type": task_type_of(prompt.record),
        "token_dim": prompt.hidden_size,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
