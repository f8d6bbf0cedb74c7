"""The model card: what an adapter is and how to load it, for people and for the Hub.

It states numbers and settings from a fixed list. No text of the training data, no path and no label gets in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from softprompt.prompt import SoftPrompt
from softprompt.storage.record import PLAIN_WORD

_FACTS = (
    "virtual_tokens", "init", "epochs", "max_steps", "steps", "kept_step", "interrupted", "seconds", "batch_rows",
    "batch_tokens", "learning_rate", "relative_learning_rate", "schedule", "warmup_steps", "weight_decay",
    "max_grad_norm", "eos", "seed", "rows", "data_hash", "dtype", "softprompt", "torch", "transformers",
)  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


def model_card(prompt: SoftPrompt) -> str:
    """README.md of an adapter folder, in Markdown with the Hub's front matter."""
    return f"{_front_matter(prompt)}\n{_description(prompt)}\n{_loading(prompt)}\n{_training(prompt)}"


def _front_matter(prompt: SoftPrompt) -> str:
    base = prompt.record.base_name
    known = base is not None and _HUB_ID.fullmatch(base) is not None
    lines = ["---", "library_name: peft", "pipeline_tag: text-generation"]
    lines += [f"base_model: {json.dumps(base)}"] if known else []
    lines += ["tags:", "- prompt-tuning", "- soft-prompt", "- softprompt"]
    lines += [f"- {json.dumps(f'base_model:adapter:{base}')}"] if known else []
    return "\n".join([*lines, "---", ""])


def _description(prompt: SoftPrompt) -> str:
    base = "an unknown base" if prompt.record.base_name is None else f"`{_one_line(prompt.record.base_name)}`"
    lines = [
        f"# Soft prompt for {base}",
        "",
        f"{prompt.num_virtual_tokens} trained vectors of width {prompt.hidden_size} that are put before the tokens of "
        f"every input. The base, {base}, is unchanged and is not part of this folder.",
        "",
        f"- Content: sha256 `{prompt.content_hash}` over shape and values",
        f"- Input form: {prompt.record.form.kind}",
    ]
    if prompt.record.base_fingerprint is not None:
        lines.append(f"- Base fingerprint: `{_one_line(prompt.record.base_fingerprint)}`")
    if prompt.record.parent is not None:
        lines.append(f"- Trained on from: `{_one_line(prompt.record.parent)}`")
    return "\n".join([*lines, ""])


def _loading(prompt: SoftPrompt) -> str:
    base = json.dumps(prompt.record.base_name or "BASE")
    return f"""## Load it

With softprompt:

```python
from softprompt import load_base, load_prompt

base = load_base({base})
prompt = load_prompt("this/folder", base)
```

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "this/folder")
```
"""


def _training(prompt: SoftPrompt) -> str:
    facts: dict[str, str] = {}
    for name, text in _plain_facts(prompt.record.run):
        facts.setdefault(name, text)
    if not facts:
        return "## Training\n\nNothing is recorded.\n"
    lines = [f"- {name.replace('_', ' ')}: {facts[name]}" for name in _FACTS if name in facts]
    return "\n".join(["## Training", "", *lines, ""])


def _plain_facts(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Listed settings anywhere in the run, each a number, a yes or no, or one plain word."""
    for name, value in run.items():
        if isinstance(value, Mapping):
            yield from _plain_facts(value)
        elif name in _FACTS and isinstance(value, bool | int | float):
            yield name, f"{value:.6g}" if isinstance(value, float) else str(value)
        elif name in _FACTS and isinstance(value, str) and PLAIN_WORD.fullmatch(value):
            yield name, value


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())
