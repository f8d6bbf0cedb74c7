"""PEFT beside us, heads included: it loads ours, ours loads its folders, and where its numbers are wrong.

With the prompt in front of all tokens and the pooling "peft" both give the same numbers, row by row.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from support.encoders import ENCODERS, build_encoder
from support.headed_models import headed_model, outputs_of
from support.seq2seq_bases import build_seq2seq
from support.tiny_bases import build_base
from torch import Tensor
from torch.nn import functional

from softprompt.base import Base
from softprompt.errors import AdapterError
from softprompt.families import forward_of
from softprompt.families.task_head import task_head
from softprompt.loss import head_outputs
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row
from softprompt.storage import load_prompt, save_prompt
from softprompt.types import InputForm, PromptRecord, Task

P, LABELS = 4, ("bad", "fair", "good")
TASK_TYPES = {"classify": "SEQ_CLS", "tag": "TOKEN_CLS", "answer": "QUESTION_ANS", "embed": "FEATURE_EXTRACTION"}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
IDS = ((2, 7, 9, 33, 20, 3), (2, 40, 11, 3))  # [CLS] and [SEP] of most families; rows of two lengths


@pytest.fixture(autouse=True)
def quiet_peft() -> Any:
    """PEFT asks the Hub for the base's config when saving, and warns that it cannot."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft|transformers|huggingface_hub")
        warnings.filterwarnings("ignore", category=UserWarning, message=".*more could not be checked")
        yield


def base_of(family: str) -> Base:
    return build_encoder(family, part="bare") if family in ENCODERS else build_base(family)


def form_of(task: Task) -> InputForm:
    labels = LABELS if task in ("classify", "tag") else ()
    return InputForm(task=task, labels=labels, pooling="peft" if task in ("classify", "embed") else None)


def our_prompt(base: Base, task: Task, head: dict[str, Tensor] | None = None) -> SoftPrompt:
    made = task_head(base, form_of(task))
    if head is None:
        head = {} if made is None else made.start(seed=5)
    vectors = torch.randn(P, base.hidden_size, generator=torch.Generator().manual_seed(1))
    return SoftPrompt(vectors, PromptRecord(form=form_of(task)), head)


def pefts_adapter(model: Any, base: Base, task: Task, folder: Path) -> Any:
    """A model of PEFT's with a prompt and a head of random numbers, saved."""
    torch.manual_seed(3)
    config = PromptTuningConfig(
        task_type=TASK_TYPES[task], num_virtual_tokens=P, token_dim=base.hidden_size, num_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    wrapped = get_peft_model(model, config).eval()
    wrapped.save_pretrained(str(folder))
    return wrapped


def our_outputs(base: Base, prompt: SoftPrompt, ids: Sequence[Sequence[int]] = IDS) -> list[Tensor]:
    """With the prompt in front and PEFT's pooling."""
    pooled = (-1,) if base.kind == "encoder" else None
    rows = []
    for own in ids:
        is_pooled = prompt.record.form.pooling == "peft"
        rows.append(Row(own, 0, columns=(pooled or (len(own) - 1,)) if is_pooled else range(len(own))))
    return head_outputs(base, forward_of(base), rows, prompt)


def pefts_outputs(model: Any, base: Base, task: Task) -> list[Tensor]:
    """Row by row: each has no pads."""
    found = []
    for ids in IDS:
        output = outputs_of(model, input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))[0]
        if task == "embed":
            output = functional.normalize(output[0 if base.kind == "encoder" else -1], dim=0)
        found.append(output if task in ("classify", "embed") else output[P:])
    return found


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, **CLOSE)


QUICK = [
    ("bert", "classify"), ("roberta", "classify"), ("distilbert", "classify"), ("gpt2", "classify"),
    ("llama", "classify"), ("bert", "tag"), ("bert", "answer"), ("bert", "embed"),
]  # fmt: skip
FAMILIES = ("roberta", "albert", "electra", "deberta-v2", "modernbert", "xlm-roberta", "bloom", "llama")
HALF_SAVED = [("deberta-v2", "classify"), *(("modernbert", task) for task in ("classify", "tag", "answer"))]  # by PEFT


def cases(but: Sequence[tuple[str, str]] = ()) -> list[Any]:
    every = [(family, task) for family in FAMILIES for task in TASK_TYPES]
    more = [pytest.param(*case, marks=pytest.mark.medium) for case in every if case not in (*QUICK, *but)]
    return [*QUICK, *more]


@pytest.mark.parametrize(("family", "task"), cases())
def test_peft_loads_our_folder_and_gives_our_numbers(tmp_path: Path, family: str, task: Task) -> None:
    base = base_of(family)
    prompt = our_prompt(base, task)
    folder = save_prompt(prompt, tmp_path / "ours", base=base)
    model = headed_model(base, task)
    before = outputs_of(model, input_ids=torch.tensor([IDS[0]]))
    wrapped = PeftModel.from_pretrained(model, str(folder)).eval()
    found = pefts_outputs(wrapped, base, task)
    assert_same(found, our_outputs(base, prompt))
    wrong = our_outputs(base, SoftPrompt(-prompt.tensor, prompt.record, prompt.head))
    assert (wrong[0] - found[0]).abs().max() > 1e-2, "the control must fail"
    assert before.isfinite().all()


@pytest.mark.parametrize(("family", "task"), cases(but=HALF_SAVED))
def test_pefts_folder_loads_here_and_gives_pefts_numbers(tmp_path: Path, family: str, task: Task) -> None:
    base = base_of(family)
    wrapped = pefts_adapter(headed_model(base, task), base, task, tmp_path / "theirs")
    prompt = load_prompt(tmp_path / "theirs", base)
    assert (prompt.record.form.task, prompt.record.form.placement) == (task, "front")
    assert len(prompt.record.form.labels) == (3 if task in ("classify", "tag") else 0)
    assert_same(our_outputs(base, prompt), pefts_outputs(wrapped, base, task))


def test_a_headed_prompt_survives_our_folder_peft_and_back(tmp_path: Path) -> None:
    base = base_of("distilbert")
    prompt = our_prompt(base, "classify")
    folder = save_prompt(prompt, tmp_path / "ours", base=base)
    PeftModel.from_pretrained(headed_model(base, "classify"), str(folder)).save_pretrained(str(tmp_path / "again"))
    assert load_prompt(tmp_path / "again", base).content_hash == prompt.content_hash


class TestWherePeftIsWrong:
    def test_it_reads_a_pads_state_of_a_decoders_row_with_right_padding(self, tmp_path: Path) -> None:
        base = base_of("llama")
        prompt = our_prompt(base, "classify")
        wrapped = PeftModel.from_pretrained(headed_model(base, "classify"),
                                            str(save_prompt(prompt, tmp_path / "x", base=base))).eval()  # fmt: skip
        short, pads = IDS[1], [0] * (len(IDS[0]) - len(IDS[1]))
        padded = {
            "input_ids": torch.tensor([IDS[0], [*short, *pads]]),
            "attention_mask": torch.tensor([[1] * len(IDS[0]), [1] * len(short) + [0] * len(pads)]),
        }
        theirs, alone = outputs_of(wrapped, **padded), pefts_outputs(wrapped, base, "classify")
        torch.testing.assert_close(theirs[0], alone[0], **CLOSE)
        assert (theirs[1] - alone[1]).abs().max() > 1e-2
        assert_same(our_outputs(base, prompt), alone)  # ours ran as one batch

    def test_it_reads_the_first_virtual_token_of_an_encoder_and_not_cls(self, tmp_path: Path) -> None:
        base = base_of("bert")
        prompt = our_prompt(base, "classify")
        wrapped = PeftModel.from_pretrained(headed_model(base, "classify"),
                                            str(save_prompt(prompt, tmp_path / "x", base=base))).eval()  # fmt: skip
        theirs = pefts_outputs(wrapped, base, "classify")
        rows = [Row(ids, 0, columns=(0,)) for ids in IDS]
        for own, other in zip(head_outputs(base, forward_of(base), rows, prompt), theirs, strict=True):
            assert (own - other).abs().max() > 1e-2
        assert_same(our_outputs(base, prompt), theirs)

    def test_it_does_not_shift_the_span_of_an_answer_by_the_virtual_tokens(self, tmp_path: Path) -> None:
        base = base_of("bert")
        wrapped = pefts_adapter(headed_model(base, "answer"), base, "answer", tmp_path / "theirs")
        inputs = {"input_ids": torch.tensor([IDS[0]]), "attention_mask": torch.ones(1, len(IDS[0]))}
        start, end = torch.tensor([1]), torch.tensor([3])
        with torch.no_grad():
            theirs = float(wrapped(**inputs, start_positions=start, end_positions=end).loss)
        logits = outputs_of(wrapped, **inputs)[0].T[:, None]  # [2, 1, P + T]

        def loss(by: int) -> float:
            return float(
                sum(functional.cross_entropy(own, at + by) for own, at in zip(logits, (start, end), strict=True)) / 2
            )

        assert theirs == pytest.approx(loss(0), rel=1e-5)  # of the virtual tokens 1 and 3
        assert theirs != pytest.approx(loss(P), rel=1e-2)

    def test_its_labels_of_tokens_do_not_cover_the_virtual_tokens(self, tmp_path: Path) -> None:
        base = base_of("bert")
        wrapped = pefts_adapter(headed_model(base, "tag"), base, "tag", tmp_path / "theirs")
        with pytest.raises(ValueError, match="Expected input batch_size"):
            wrapped(input_ids=torch.tensor([IDS[0]]), labels=torch.tensor([[0, 1, 2, 0, 1, 2]]))

    @pytest.mark.parametrize(
        ("family", "task", "lacking"),
        [
            ("deberta-v2", "classify", "pooler.dense.bias"),
            ("modernbert", "classify", "head.dense.weight"),
            pytest.param("modernbert", "tag", "head.dense.weight", marks=pytest.mark.medium),
        ],
    )
    def test_it_saves_a_part_of_some_heads(self, tmp_path: Path, family: str, task: Task, lacking: str) -> None:
        """Loaded again beside another model of the same base its numbers are other ones, so it is refused here."""
        base = base_of(family)
        wrapped = pefts_adapter(headed_model(base, task), base, task, tmp_path / "theirs")
        again = PeftModel.from_pretrained(headed_model(base, task, seed=9), str(tmp_path / "theirs")).eval()
        before, after = pefts_outputs(wrapped, base, task), pefts_outputs(again, base, task)
        assert (before[0] - after[0]).abs().max() > 1e-2
        with pytest.raises(AdapterError, match=f"lacks the weight '{lacking}'.*modules_to_save"):
            load_prompt(tmp_path / "theirs", base)

    def test_it_saves_no_head_of_modernberts_that_answers(self, tmp_path: Path) -> None:
        base = base_of("modernbert")
        pefts_adapter(headed_model(base, "answer"), base, "answer", tmp_path / "theirs")
        assert list(load_file(tmp_path / "theirs" / "adapter_model.safetensors")) == ["prompt_embeddings"]
        with pytest.raises(AdapterError, match="has no weights of a head"):
            load_prompt(tmp_path / "theirs", base)


def test_a_head_with_what_peft_leaves_out_loads_where_it_was_named(tmp_path: Path) -> None:
    base = base_of("deberta-v2")
    model = headed_model(base, "classify")
    torch.manual_seed(3)
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P, modules_to_save=["pooler"])
    wrapped = get_peft_model(model, config).eval()
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    prompt = load_prompt(tmp_path / "theirs", base)
    assert_same(our_outputs(base, prompt), pefts_outputs(wrapped, base, "classify"))


def test_the_masked_language_model_behind_a_cloze_prompt_runs_in_peft(tmp_path: Path) -> None:
    base = build_encoder("bert")
    form = InputForm(task="cloze", labels=("no", "yes"), label_words=(("w10",), ("w11", "w12")))
    vectors = torch.randn(P, base.hidden_size, generator=torch.Generator().manual_seed(1))
    prompt = SoftPrompt(vectors, PromptRecord(form=form))
    folder = save_prompt(prompt, tmp_path / "ours", base=base)
    model = hf.BertForMaskedLM(base.model.config)
    model.load_state_dict(base.model.state_dict())
    wrapped = PeftModel.from_pretrained(model.eval(), str(folder)).eval()
    ids = (2, 7, base.mask_id, 9, 3)
    logits = outputs_of(wrapped, input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))[0, P + 2]
    theirs = torch.stack([logits[10], logits[[11, 12]].mean()])
    row = Row(ids, 0, columns=(2,))
    torch.testing.assert_close(head_outputs(base, forward_of(base), [row], prompt)[0], theirs, **CLOSE)


class TestEncoderDecoders:
    """The logits of a row: [prompt, source] for the encoder, the start and [target] for the decoder."""

    def plain(self, base: Base, vectors: Tensor, source: Tensor, target: Tensor) -> Tensor:
        embeds = torch.cat([vectors[None], base.embed(source)], dim=1)
        with torch.no_grad():
            logits: Tensor = base.model(inputs_embeds=embeds, labels=target).logits
        return logits

    @pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.medium)])
    @pytest.mark.parametrize("has_decoder_prompt", [False, True])
    def test_peft_reads_the_encoders_half_of_our_folder(
        self, tmp_path: Path, family: str, has_decoder_prompt: bool
    ) -> None:
        base = build_seq2seq(family)
        rows = 2 * P if has_decoder_prompt else P
        vectors = torch.randn(rows, base.hidden_size, generator=torch.Generator().manual_seed(1))
        record = PromptRecord(form=InputForm(has_decoder_prompt=has_decoder_prompt))
        folder = save_prompt(SoftPrompt(vectors, record), tmp_path / "ours", base=base)
        source, target = torch.tensor([[7, 9, 33, 20]]), torch.tensor([[5, 6, 8]])
        truth = self.plain(base, vectors[:P], source, target)
        wrapped = PeftModel.from_pretrained(base.model, str(folder)).eval()
        with torch.no_grad():
            theirs = wrapped(input_ids=source, attention_mask=torch.ones_like(source), labels=target).logits
        torch.testing.assert_close(theirs, truth, **CLOSE)

    def test_of_pefts_own_folder_the_half_is_kept_that_it_reads(self, tmp_path: Path) -> None:
        base = build_seq2seq("t5")
        torch.manual_seed(3)
        wrapped = get_peft_model(base.model, PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)).eval()
        wrapped.save_pretrained(str(tmp_path / "theirs"))
        prompt = load_prompt(tmp_path / "theirs", base)
        whole = wrapped.prompt_encoder["default"].embedding.weight.detach()
        assert (len(whole), len(prompt.tensor)) == (2 * P, P)
        source, target = torch.tensor([[7, 9, 33, 20]]), torch.tensor([[5, 6, 8]])
        with torch.no_grad():
            theirs = wrapped(input_ids=source, attention_mask=torch.ones_like(source), labels=target).logits
        torch.testing.assert_close(theirs, self.plain(base, prompt.tensor, source, target), **CLOSE)
