"""The part of a model card that shows how an adapter is used: with softprompt, with PEFT, and where the two differ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from softprompt.config import EMBEDDED_BASE, MINILM_BASE, SMOLLM2_BASE
from softprompt.prompt import SoftPrompt
from softprompt.types import InputForm, PromptRecord, Task

_FOLDERS = {  # of named bases: the function of ours that knows where it lies
    EMBEDDED_BASE: ("softprompt.embedded", "base_folder"),
    MINILM_BASE: ("softprompt.base.source", "minilm_folder"),
}
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")  # as `softprompt.data.rows` reads a template
_AUTO: Mapping[Task, str] = {
    "cloze": "AutoModelForMaskedLM",
    "classify": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
    "answer": "AutoModelForQuestionAnswering",
    "embed": "AutoModel",
}
_OUTPUT: Mapping[Task, str] = {
    "generate": "tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])",
    "answer": "model(**inputs).start_logits, model(**inputs).end_logits",
    "embed": "model(**inputs).last_hidden_state",
}


def usage(prompt: SoftPrompt) -> str:
    """Markdown with a snippet for each of the two, to be run in the adapter's folder."""
    base, record = prompt.record.base_source or prompt.record.base_name or "BASE", prompt.record
    snippets = f"""## Use it

With softprompt, in this folder:

```python
{_ours(base, record.form)}
```
"""
    if record.form.task != "generate" and _is_gguf(base):  # transformers has no headed model of a GGUF file
        return snippets
    theirs = f"""
With PEFT:

```python
{_peft_model(base, record)}
{_peft_inputs(record.form)}
print({_OUTPUT.get(record.form.task, "model(**inputs).logits")})
```
"""
    note = _difference(prompt)
    return snippets + theirs + (f"\n{note}\n" if note else "")


def fields_of(form: InputForm) -> list[str]:
    """The columns that a template names."""
    found = _FIELD.finditer(form.template or "")
    return list(dict.fromkeys(match[1] for match in found if match[1] is not None))


def _ours(base: str, form: InputForm) -> str:
    verb = "generate" if form.task == "generate" else "predict"
    answer = f"generate(base, [{_example_input(form)!r}], prompt)[0].text"
    if form.task != "generate":
        answer = f"next(predict(base, prompt, [{_example_input(form)!r}]))"
    imports = ", ".join(sorted((verb, "load_base", "load_prompt")))
    return f"""from softprompt import {imports}

base = load_base({base!r})
prompt = load_prompt(".", base)
print({answer})"""


def _example_input(form: InputForm) -> str | dict[str, Any]:  # Any: a text or words
    fields = fields_of(form)
    if form.task == "tag":
        return {field: ["TEXT"] for field in fields or ["words"]}
    return "TEXT" if len(fields) == 1 or form.template is None else dict.fromkeys(fields, "TEXT")


def _is_gguf(base: str) -> bool:
    return base == SMOLLM2_BASE or base.lower().endswith(".gguf")


def _peft_model(base: str, record: PromptRecord) -> str:
    """The lines that make `model` and `tokenizer`; of a GGUF file the plain model that `load_base` makes of it."""
    form = record.form
    if _is_gguf(base):
        return f"""from peft import PeftModel
from softprompt import load_base
{_peft_imports(base, form)}
base = load_base({base!r}, dtype="float32")
tokenizer = base.tokenizer
model = PeftModel.from_pretrained(base.model, ".")"""
    is_seq2seq = record.base_kind == "seq2seq" or form.has_decoder_prompt
    auto = _AUTO.get(form.task, "AutoModelForSeq2SeqLM" if is_seq2seq else "AutoModelForCausalLM")
    labels = f", num_labels={len(form.labels)}" if form.task in ("classify", "tag") else ""
    return f"""from peft import PeftModel
from transformers import {auto}, AutoTokenizer
{_peft_imports(base, form)}
base = {f"{_FOLDERS[base][1]}()" if base in _FOLDERS else repr(base)}
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained({auto}.from_pretrained(base{labels}), ".")"""


def _peft_imports(base: str, form: InputForm) -> str:
    module, function = _FOLDERS.get(base, ("", ""))
    lines = [f"from {module} import {function}"] if function else []
    lines += ["from softprompt.data import DEFAULT_CHAT_TEMPLATE"] if form.kind == "chat" else []
    return "\n".join(["", *sorted(lines), ""]) if lines else ""


def _peft_inputs(form: InputForm) -> str:
    if form.kind == "chat":
        return (
            "inputs = tokenizer.apply_chat_template(\n"
            '    [{"role": "user", "content": "TEXT"}], add_generation_prompt=True, return_dict=True, '
            'return_tensors="pt",\n'
            "    chat_template=tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE,\n"
            ")"
        )
    if form.task == "answer":
        return 'inputs = tokenizer("TEXT", "TEXT", return_tensors="pt")  # question and context'
    written = form.template is not None and form.task not in ("tag", "embed")
    text = _FIELD.sub(_filled, form.template or "") if written else "TEXT"
    mask = '.replace("[MASK]", tokenizer.mask_token)' if form.task == "cloze" and "[MASK]" in text else ""
    return f'inputs = tokenizer({text!r}{mask}, return_tensors="pt")'


def _filled(match: re.Match[str]) -> str:
    return "TEXT" if match[1] is not None else match[0][0]


def _difference(prompt: SoftPrompt) -> str:
    """Why PEFT's numbers are not those of softprompt; empty where they are."""
    form, count = prompt.record.form, prompt.num_virtual_tokens
    if form.has_decoder_prompt:
        return (
            f"PEFT reads the first {count} vectors, the encoder's, and ignores the {prompt.num_decoder_tokens} of the "
            "decoder, so it answers otherwise than softprompt."
        )
    if form.task == "generate":
        return ""
    reasons = []
    if form.placement == "after-cls":
        reasons.append("puts the vectors before [CLS] instead of behind it")
    if form.task in ("classify", "embed") and form.pooling != "peft":
        reasons += _pooling_reasons(prompt.record)
    shifted = form.task in ("cloze", "tag", "answer", "embed")
    place = f" The first {count} outputs of PEFT are those of the vectors." if shifted else ""
    if reasons:
        return f"PEFT {' and '.join(reasons)}, so its numbers are not those of softprompt.{place}"
    return f"PEFT gives the numbers of softprompt, row by row without pads.{place}"


def _pooling_reasons(record: PromptRecord) -> list[str]:
    if record.form.task == "embed":
        return ["leaves it to you which of the states to read"]
    if record.base_kind == "causal":
        return [] if record.form.pooling == "last" else ["reads the last token's state"]
    return ["reads the state of the first vector instead of [CLS]'s or the mean over the text"]
