"""`adapter_config.json` as PEFT 0.21 writes it for prompt tuning, and what is accepted of others' files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from softprompt.errors import AdapterError
from softprompt.prompt import SoftPrompt

if TYPE_CHECKING:
    from softprompt.base import Base

PEFT_FORMAT = "0.21.2"  # the release whose keys these are
PEFT_TYPE = "PROMPT_TUNING"
TASK_TYPE = "CAUSAL_LM"


def config_for(prompt: SoftPrompt, base: Base | None) -> dict[str, Any]:
    """Every key that PEFT writes. The start is always RANDOM: PEFT then loads it without asking for a tokenizer."""
    model_config = None if base is None else base.model.config.get_text_config()
    return {
        "auto_mapping": None,
        "base_model_name_or_path": prompt.record.base_source or prompt.record.base_name,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": getattr(model_config, "num_attention_heads", None),
        "num_layers": getattr(model_config, "num_hidden_layers", None),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "peft_type": PEFT_TYPE,
        "peft_version": PEFT_FORMAT,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": None,
        "task_type": TASK_TYPE,
        "token_dim": prompt.hidden_size,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }


def check_kind(config: dict[str, Any], task_type: str | None, where: str) -> None:
    """Only prompt tuning of a causal language model; `task_type` stands in where the config names none.

    Raises: AdapterError.
    """
    kind = config.get("peft_type")
    if kind != PEFT_TYPE:
        raise AdapterError(f"{where} has the peft_type {kind!r}; only {PEFT_TYPE} adapters are soft prompts")
    stated = config.get("task_type")
    if stated is not None and task_type is not None and stated != task_type:
        raise AdapterError(f"{where} has the task_type {stated!r} and {task_type!r} was given; leave it out")
    check_task(task_type if stated is None else stated, where)


def check_task(task: object, where: str) -> None:
    """Raises: AdapterError for every task but CAUSAL_LM."""
    if task is None:
        raise AdapterError(
            f"{where} names no task_type; if it was trained on a causal language model, "
            f"say so: task_type={TASK_TYPE!r} (--task-type {TASK_TYPE})"
        )
    if task == "SEQ_2_SEQ_LM":
        raise AdapterError(f"{where} is for an encoder-decoder base (2 x P rows); those come later, not yet supported")
    if task != TASK_TYPE:
        raise AdapterError(f"{where} has the task_type {task!r}; only {TASK_TYPE} is supported now")


def check_shape(config: dict[str, Any], tensor: Tensor, where: str) -> None:
    """What the config says of the tensor [P, H] must hold.

    Raises: AdapterError.
    """
    num_rows, hidden_size = tensor.shape
    parts = config.get("num_transformer_submodules")
    if parts not in (None, 1):
        raise AdapterError(f"{where}: num_transformer_submodules is {parts!r}; a causal language model has 1")
    if config.get("num_virtual_tokens") != num_rows:
        raise AdapterError(
            f"{where}: num_virtual_tokens is {config.get('num_virtual_tokens')!r}, but the tensor is "
            f"[{num_rows}, {hidden_size}]; the two files do not belong together"
        )
    if config.get("token_dim") not in (None, hidden_size):
        raise AdapterError(
            f"{where}: token_dim is {config['token_dim']!r}, but the tensor is [{num_rows}, {hidden_size}]; "
            "the two files do not belong together"
        )
