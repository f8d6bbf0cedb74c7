"""The model card: what an adapter is, how to use it and how good it is, for people and for the Hub.

It states the prompt's form with its template and labels, and numbers and settings from a fixed list. It contains no row
of the training data, and no path but that of a local base, which is left out of what is pushed to the Hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from softprompt.config import EMBEDDED_BASE, SMOLLM2_BASE
from softprompt.prompt import Judgement, SoftPrompt
from softprompt.types import InputForm

_SETTINGS = (
    "task", "loss", "virtual_tokens", "init", "reparameterisation", "epochs", "max_steps", "steps", "kept_step",
    "averaging", "interrupted", "seconds", "batch_rows", "batch_tokens", "learning_rate", "relative_learning_rate",
    "schedule", "warmup_steps", "weight_decay", "max_grad_norm", "eos", "seed", "rows", "data_hash", "dtype",
    "softprompt", "torch", "transformers",
)  # fmt: skip
PLAIN_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,79}")  # a setting or a version; no path, no sentence
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")  # as `softprompt.data.rows` reads a template


def model_card(prompt: SoftPrompt) -> str:
    """README.md of an adapter folder, in Markdown with the Hub's front matter."""
    parts = (_front_matter, _description, _form, _figures, _loading, _training)
    return "\n".join(text for part in parts if (text := part(prompt)))


def _front_matter(prompt: SoftPrompt) -> str:
    base = _base(prompt)
    known = base is not None and is_hub_id(base)
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


def _form(prompt: SoftPrompt) -> str:
    """The template before an answer, and the labels that answers are chosen from."""
    form = prompt.record.form
    lines = []
    if form.template is not None:
        lines += ["## Template", "", "An input is put into", "", _fenced(form.template), ""]
    if form.labels:
        lines += ["and the answer is one of", "", _fenced(json.dumps(form.labels, ensure_ascii=False)), ""]
    return "\n".join(lines)


def _figures(prompt: SoftPrompt) -> str:
    """Figures on held-out rows, where training measured them."""
    run = prompt.record.run
    judgement = Judgement.from_json(run.get("held_out"))
    judged = [] if judgement is None else [f"{judgement.text}.", ""]
    lines = [
        *judged,
        *_accuracy_lines(run.get("held_out")),
        *_loss_lines(run.get("validation_losses"), run.get("kept_step")),
    ]
    return "\n".join(["## On rows that it was not trained on", "", *lines, ""]) if lines else ""


def _accuracy_lines(found: Any) -> list[str]:  # Any: a record is JSON, and may be a stranger's
    try:
        low, high = found["interval"]
        shares = [found["accuracy"], low, high, found["majority"], found["bare_base"]]
        right, low, high, majority, bare = (f"{100 * float(share):.0f}" for share in shares)
        num_rows = int(found["rows"])
    except (TypeError, KeyError, ValueError):
        return []
    return [
        f"- Right {right} times in 100 ({low} to {high}), of {num_rows:,} rows; always answering the commonest label "
        f"would be {majority}, the bare base with the same template {bare}"
    ]


def _loss_lines(losses: Any, kept_step: Any) -> list[str]:  # Any: as above
    try:
        return [f"- Validation loss: {dict(losses)[kept_step]:.3f} nats per text token"]
    except (TypeError, KeyError, ValueError):
        return []


def _loading(prompt: SoftPrompt) -> str:
    base, form = _base(prompt) or "BASE", prompt.record.form
    return f"""## Use it

With softprompt, in this folder:

```python
from softprompt import generate, load_base, load_prompt

base = load_base({base!r})
prompt = load_prompt(".", base)
print(generate(base, [{_example_input(form)!r}], prompt)[0].text)
```

With PEFT:

```python
{_peft_model(base, form)}
{_peft_inputs(form)}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```
"""


def _example_input(form: InputForm) -> str | dict[str, str]:
    fields = _fields(form)
    return "TEXT" if len(fields) == 1 or form.template is None else dict.fromkeys(fields, "TEXT")


def _peft_model(base: str, form: InputForm) -> str:
    """The lines that make `model` and `tokenizer`; of a GGUF file the plain model that `load_base` makes of it."""
    if base == SMOLLM2_BASE or base.lower().endswith(".gguf"):
        return f"""from peft import PeftModel
from softprompt import load_base
{_peft_imports(base, form)}
base = load_base({base!r}, dtype="float32")
tokenizer = base.tokenizer
model = PeftModel.from_pretrained(base.model, ".")"""
    return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
{_peft_imports(base, form)}
base = {_peft_base(base)}
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ".")"""


def _peft_imports(base: str, form: InputForm) -> str:
    lines = ["from softprompt.embedded import base_folder"] if base == EMBEDDED_BASE else []
    lines += ["from softprompt.data import DEFAULT_CHAT_TEMPLATE"] if form.kind == "chat" else []
    return "\n".join(["", *sorted(lines), ""]) if lines else ""


def _peft_base(base: str) -> str:
    return "base_folder()" if base == EMBEDDED_BASE else repr(base)


def _peft_inputs(form: InputForm) -> str:
    if form.kind == "chat":
        return (
            "inputs = tokenizer.apply_chat_template(\n"
            '    [{"role": "user", "content": "TEXT"}], add_generation_prompt=True, return_dict=True, '
            'return_tensors="pt",\n'
            "    chat_template=tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE,\n"
            ")"
        )
    text = "TEXT" if form.template is None else _FIELD.sub(_filled, form.template)
    return f'inputs = tokenizer({text!r}, return_tensors="pt")'


def _filled(match: re.Match[str]) -> str:
    return "TEXT" if match[1] is not None else match[0][0]


def _fields(form: InputForm) -> list[str]:
    found = _FIELD.finditer(form.template or "")
    return list(dict.fromkeys(match[1] for match in found if match[1] is not None))


def _training(prompt: SoftPrompt) -> str:
    settings: dict[str, str] = {}
    for name, text in _plain_settings({key: value for key, value in prompt.record.run.items() if key != "held_out"}):
        settings.setdefault(name, text)
    if not settings:
        return "## Training\n\nNothing is recorded.\n"
    lines = [f"- {name.replace('_', ' ')}: {settings[name]}" for name in _SETTINGS if name in settings]
    return "\n".join(["## Training", "", *lines, ""])


def _plain_settings(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Listed settings anywhere in the run, outer ones first: numbers, booleans and single plain words."""
    for name, value in sorted(run.items(), key=lambda item: isinstance(item[1], Mapping)):
        if isinstance(value, Mapping):
            yield from _plain_settings(value)
        elif name in _SETTINGS and isinstance(value, bool | int | float):
            yield name, f"{value:.6g}" if isinstance(value, float) else str(value)
        elif name in _SETTINGS and isinstance(value, str) and PLAIN_WORD.fullmatch(value):
            yield name, value


def _base(prompt: SoftPrompt) -> str | None:
    """The Hub id or folder that the base was loaded from, else its name."""
    return prompt.record.base_source or prompt.record.base_name


def _fenced(text: str) -> str:
    """Text in a block of code whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def is_hub_id(name: str) -> bool:
    """Whether a base's name can be one of the Hub's, and is no path of this machine."""
    return _HUB_ID.fullmatch(name) is not None
