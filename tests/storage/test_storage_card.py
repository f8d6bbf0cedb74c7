"""Cards of prompts with heads, label words and decoders' halves: snippets run, and it is said where PEFT differs.

Cards of prompts that generate are tested where they are trained, with the command line.
"""

from __future__ import annotations

import re
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from support.encoders import build_encoder, save_encoder
from support.headed_models import headed_model
from support.seq2seq_bases import build_seq2seq
from support.tiny_bases import build_base

from softprompt import predict
from softprompt.base import Base, load_base
from softprompt.families.task_head import task_head
from softprompt.prompt import SoftPrompt
from softprompt.storage import load_prompt, save_prompt
from softprompt.types import InputForm, PromptRecord

LABELS = ("bad", "good")
TEXT = {"kind": "template", "template": "{text}", "completion": "{label}", "labels": LABELS}
FORMS = {
    "classify": InputForm(task="classify", pooling="cls", placement="after-cls", **TEXT),
    "cloze": InputForm(
        task="cloze", placement="after-cls", label_words=(("w20",), ("w21", "w22")),
        **{**TEXT, "template": "{text} w9 [MASK] w8"},
    ),
    "tag": InputForm(
        task="tag", placement="after-cls", labels=LABELS, kind="template", template="{words}", completion="{tags}"
    ),
    "answer": InputForm(
        task="answer", placement="after-cls", kind="template", template="{question}\n{context}", completion="{answers}"
    ),
    "embed": InputForm(task="embed", pooling="mean", kind="template", template="{text}", completion="{positive}"),
}  # fmt: skip


def made(base: Base, form: InputForm, num_rows: int = 4) -> SoftPrompt:
    head = task_head(base, form)
    vectors = torch.randn(num_rows, base.hidden_size, generator=torch.Generator().manual_seed(1))
    return SoftPrompt(vectors, PromptRecord(form=form, base_source=base.source), {} if head is None else head.start(1))


def card_of(prompt: SoftPrompt, base: Base, folder: Path) -> str:
    return (save_prompt(prompt, folder, base=base) / "README.md").read_text()


def said_by(code: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.chdir(folder)
    said = StringIO()
    with redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, {})  # the card is ours
    return said.getvalue().strip()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(save_encoder("bert", tmp_path_factory.mktemp("base") / "bert")), dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("task", "pipeline", "answer"),
    [
        ("classify", "text-classification", "label='(bad|good)'"),
        ("cloze", "text-classification", "label='(bad|good)'"),
        ("tag", "token-classification", "bad|good"),
        ("answer", "question-answering", "Prediction"),
        ("embed", "feature-extraction", "Prediction"),
    ],
)
def test_both_snippets_run(
    task: str, pipeline: str, answer: str, bert: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = card_of(made(bert, FORMS[task]), bert, tmp_path / "x")
    assert f"pipeline_tag: {pipeline}\n" in card
    assert f"- Task: {task}; placement {FORMS[task].placement}\n" in card
    ours, theirs = (code.replace("TEXT", "w7") for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    assert re.search(answer, said_by(ours, monkeypatch, tmp_path / "x"))
    assert said_by(theirs, monkeypatch, tmp_path / "x")


def test_it_says_where_peft_differs(bert: Base, tmp_path: Path) -> None:
    card = card_of(made(bert, FORMS["classify"]), bert, tmp_path / "cls")
    assert "PEFT puts the vectors before [CLS] instead of behind it and reads the state of the first vector" in card
    assert "put behind the first token ([CLS]) of every input" in card
    same = replace(FORMS["classify"], pooling="peft", placement="front")
    assert "PEFT gives the numbers of softprompt, row by row" in card_of(made(bert, same), bert, tmp_path / "peft")
    tagged = card_of(made(bert, FORMS["tag"]), bert, tmp_path / "tag")
    assert "The first 4 outputs of PEFT are those of the vectors." in tagged


def test_it_says_what_peft_reads_of_decoders(tmp_path: Path) -> None:
    base = build_base("llama")
    form = replace(FORMS["classify"], placement="front", pooling="last")
    assert "PEFT gives the numbers of softprompt, row by row" in card_of(made(base, form), base, tmp_path / "last")
    mean = card_of(made(base, replace(form, pooling="mean")), base, tmp_path / "mean")
    assert "PEFT reads the last token's state, so its numbers are not" in mean


def test_it_has_labels_words_and_head(bert: Base, tmp_path: Path) -> None:
    card = card_of(made(bert, FORMS["cloze"]), bert, tmp_path / "cloze")
    assert '{"bad": ["w20"], "good": ["w21", "w22"]}' in card
    card = card_of(made(bert, FORMS["classify"]), bert, tmp_path / "head")
    assert "- Head, trained beside the vectors: `bert.pooler.dense.bias` [16], " in card
    assert "- Pooling: cls\n" in card


def test_its_figures_of_a_head_have_no_bare_base_and_are_per_label(bert: Base, tmp_path: Path) -> None:
    run = {
        "held_out": {"interval": [0.4, 0.8], "accuracy": 0.65, "majority": 0.5, "bare_base": 0.5, "rows": 20},
        "validation_losses": [[6, 0.625]],
        "kept_step": 6,
    }
    prompt = made(bert, FORMS["classify"])
    card = card_of(replace(prompt, record=replace(prompt.record, run=run)), bert, tmp_path / "x")
    assert "- Right 65 times in 100 (40 to 80), of 20 rows; always answering the commonest label would be 50\n" in card
    assert "- Validation loss: 0.625 nats per label\n" in card


def test_of_an_encoder_decoder_it_says_that_peft_ignores_the_decoders_half(tmp_path: Path) -> None:
    base = build_seq2seq("t5")
    both = card_of(made(base, InputForm(has_decoder_prompt=True), num_rows=8), base, tmp_path / "both")
    assert "pipeline_tag: text2text-generation\n" in both
    assert "before the tokens that the encoder reads, and 4 more before those that the decoder writes" in both
    assert "PEFT reads the first 4 vectors, the encoder's, and ignores the 4 of the decoder" in both
    one = card_of(made(base, InputForm()), base, tmp_path / "one")
    assert "AutoModelForSeq2SeqLM.from_pretrained" in one
    assert "ignores" not in one


@pytest.mark.parametrize(
    ("task", "task_type", "row"),
    [
        ("classify", "SEQ_CLS", "w7 w8"),
        ("tag", "TOKEN_CLS", {"words": ["w7", "w8"]}),
        ("answer", "QUESTION_ANS", {"question": "w7", "context": "w8 w9"}),
        ("embed", "FEATURE_EXTRACTION", "w7 w8"),
    ],
)
def test_an_adapter_of_peft_answers_without_our_record(task: str, task_type: Any, row: Any, tmp_path: Path) -> None:
    base = build_encoder("roberta", part="bare")
    config = PromptTuningConfig(task_type=task_type, num_virtual_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(headed_model(base, task), config).save_pretrained(str(tmp_path / "theirs"))
        prompt = load_prompt(tmp_path / "theirs", base)
    (answer,) = predict(base, prompt, [row])
    assert answer.error is None
    assert (answer.label or "LABEL_0").startswith("LABEL_")
