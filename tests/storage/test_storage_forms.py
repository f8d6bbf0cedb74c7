"""Adapters of other tasks than generation, and of encoder-decoders: what is written and read, PEFT apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.encoders import build_encoder
from support.tiny_bases import build_base

from softprompt.base import Base
from softprompt.errors import AdapterError
from softprompt.families.task_head import task_head
from softprompt.prompt import SoftPrompt
from softprompt.storage import Library, UnknownBaseWarning, load_prompt, save_prompt
from softprompt.types import InputForm, PromptRecord

LABELS = ("bad", "fair", "good")
CLASSIFY = InputForm(task="classify", labels=LABELS, pooling="cls", placement="after-cls")
CONFIG, RECORD, WEIGHTS = "adapter_config.json", "softprompt.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def bert() -> Base:
    return build_encoder("bert", part="bare")


def headed(base: Base, form: InputForm = CLASSIFY, seed: int = 1) -> SoftPrompt:
    head = task_head(base, form)
    vectors = torch.randn(4, base.hidden_size, generator=torch.Generator().manual_seed(seed))
    return SoftPrompt(vectors, PromptRecord(form=form), {} if head is None else head.start(seed))


def edit(folder: Path, name: str, **changes: Any) -> None:
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**found, **changes}))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    found = {**load_file(folder / WEIGHTS), **{name.replace("__", "."): new for name, new in changes.items()}}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, folder / WEIGHTS)


def stated(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / CONFIG).read_text()))


class TestHeads:
    def test_a_head_survives_folder_library_and_export(self, tmp_path: Path, bert: Base) -> None:
        prompt = headed(bert)
        folder = save_prompt(prompt, tmp_path / "ours", base=bert)
        library = Library(tmp_path / "library")
        library.import_folder(folder, "reviews", base=bert)
        exported = library.export("reviews", tmp_path / "exported")
        for path in (folder, library.path("reviews"), exported):
            loaded = load_prompt(path, bert)
            assert loaded.content_hash == prompt.content_hash
            assert list(loaded.head) == ["classifier.bias", "classifier.weight"]
            assert loaded.record.form == CLASSIFY
            assert loaded.record.base_kind == "encoder"
        assert library.list()[0].task == "classify"
        assert library.list()[0].problem is None

    @pytest.mark.parametrize(
        ("family", "task", "modules"),
        [
            ("roberta", "classify", ["classifier"]),
            ("distilbert", "classify", ["classifier", "pre_classifier"]),
            ("deberta-v2", "classify", ["classifier", "pooler"]),
            ("modernbert", "answer", ["classifier", "head"]),
            ("bert", "tag", ["classifier"]),
        ],
    )
    def test_every_trained_module_is_named_for_peft(
        self, tmp_path: Path, family: str, task: Any, modules: list[str]
    ) -> None:
        base = build_encoder(family)
        form = InputForm(task=task, labels=() if task == "answer" else LABELS)
        folder = save_prompt(headed(base, form), tmp_path / "ours", base=base)
        assert stated(folder)["modules_to_save"] == modules
        keys = set(load_file(folder / WEIGHTS)) - {"prompt_embeddings"}
        assert {key.split(".")[1] for key in keys} == set(modules)
        assert all(key.startswith("base_model.") for key in keys)

    def test_a_pooler_that_the_base_lacks_is_trained_and_named(self, tmp_path: Path) -> None:
        base = build_encoder("bert")  # a masked language model has none
        folder = save_prompt(headed(base), tmp_path / "ours", base=base)
        assert stated(folder)["modules_to_save"] == ["bert.pooler", "classifier"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"base_model__classifier__weight": torch.ones(3, 15)}, r"classifier.weight of the shape \[3, 15\]"),
            ({"base_model__classifier__bias": None}, "lacks the weight 'classifier.bias'.*modules_to_save"),
            ({"base_model__score__weight": torch.ones(3, 16)}, "has the weight 'score.weight', but the classify head"),
            ({"base_model__classifier__bias": torch.ones(3, 1, 1)}, r"shape \[3, 1, 1\]; it must be a matrix or a v"),
            ({"base_model__classifier__bias": torch.full((3,), float("nan"))}, "3 of 3 are NaN"),
            ({"base_model__classifier__bias": torch.full((3,), 1e20)}, r"values up to 1e\+20"),
            ({"base_model__classifier__bias": torch.ones(3, dtype=torch.int64)}, "torch.int64"),
            ({"base_model__../x": torch.ones(3)}, "is no name of a head's weight"),
            ({"lm_head__weight": torch.ones(3)}, "holds 4 tensors"),
        ],
    )
    def test_a_head_that_the_base_does_not_have_is_refused(
        self, tmp_path: Path, bert: Base, changes: Mapping[str, Any], message: str
    ) -> None:
        folder = save_prompt(headed(bert), tmp_path / "ours", base=bert)
        (folder / RECORD).unlink()
        edit_weights(folder, **changes)
        with pytest.raises(AdapterError, match=message):
            load_prompt(folder, bert, force=True)

    def test_a_head_is_part_of_the_content(self, tmp_path: Path, bert: Base) -> None:
        folder = save_prompt(headed(bert), tmp_path / "ours", base=bert)
        edit_weights(folder, base_model__classifier__bias=torch.ones(3))
        with pytest.raises(AdapterError, match="they were changed later"):
            load_prompt(folder, bert)

    def test_too_many_tensors_are_refused(self, tmp_path: Path, bert: Base) -> None:
        folder = save_prompt(headed(bert), tmp_path / "ours", base=bert)
        edit_weights(folder, **{f"base_model__a{i}__w": torch.ones(1) for i in range(40)})
        with pytest.raises(AdapterError, match="42 tensors of a head; the limit is 32"):
            load_prompt(folder)

    def test_too_many_labels_are_refused_before_they_are_named(self, tmp_path: Path, bert: Base) -> None:
        folder = save_prompt(headed(bert), tmp_path / "ours", base=bert)
        (folder / RECORD).unlink()
        edit_weights(folder, base_model__classifier__weight=torch.ones(100_001, 1))
        with pytest.raises(AdapterError, match="100,001 labels; the limit is 100,000"):
            load_prompt(folder)

    def test_another_number_of_labels_is_refused(self, tmp_path: Path, bert: Base) -> None:
        prompt = headed(bert)
        record = replace(prompt.record, form=replace(CLASSIFY, labels=("bad", "good")))
        folder = save_prompt(replace(prompt, record=record), tmp_path / "ours")
        with pytest.raises(AdapterError, match=r"\[3, 16\]; the classify head .* has \[2, 16\] there for 2 labels"):
            load_prompt(folder, bert, force=True)

    def test_a_task_with_a_head_needs_its_weights(self, tmp_path: Path, bert: Base) -> None:
        folder = save_prompt(SoftPrompt(headed(bert).tensor, PromptRecord(form=CLASSIFY)), tmp_path / "ours")
        with pytest.raises(AdapterError, match="has no weights of a head"):
            load_prompt(folder)

    def test_a_task_without_a_head_may_have_none(self, tmp_path: Path, bert: Base) -> None:
        prompt = replace(headed(bert), record=PromptRecord())
        with pytest.raises(AdapterError, match=r"'classifier\.bias' first; the task 'generate' has no head"):
            load_prompt(save_prompt(prompt, tmp_path / "ours"))

    def test_a_base_without_such_a_head_is_refused(self, tmp_path: Path, bert: Base) -> None:
        folder = save_prompt(headed(bert), tmp_path / "ours")
        with pytest.raises(AdapterError, match=r"has the weight 'classifier.bias', but the classify head .*score"):
            load_prompt(folder, build_base("llama"), force=True)


class TestForms:
    @pytest.mark.parametrize(
        ("form", "task_type"),
        [
            (InputForm(task="cloze", labels=("no", "yes"), label_words=(("w5",), ("w6", "w7"))), "FEATURE_EXTRACTION"),
            (InputForm(task="embed", pooling="mean", placement="after-cls"), "FEATURE_EXTRACTION"),
        ],
    )
    def test_tasks_without_a_head_keep_their_form(
        self, tmp_path: Path, bert: Base, form: InputForm, task_type: str
    ) -> None:
        folder = save_prompt(headed(bert, form), tmp_path / "ours", base=bert)
        assert stated(folder)["task_type"] == task_type
        assert stated(folder)["modules_to_save"] is None
        assert load_prompt(folder, bert).record.form == form

    @pytest.mark.parametrize(
        ("form", "message"),
        [
            ({"task": "sing"}, "task is 'sing'; it must be one of generate, cloze"),
            ({"task": ["tag"]}, "task is"),
            ({"placement": "behind"}, "placement is 'behind'; it must be one of front, after-cls"),
            ({"pooling": "max"}, "pooling is 'max'; it must be one of None, cls"),
            ({"task": "cloze", "labels": ["a", "b"], "label_words": [["x"]]}, "a list of words for each label"),
            ({"label_words": [[1]]}, "a list of words"),
            ({"has_decoder_prompt": 1}, "has_decoder_prompt is 1"),
            ({"task": "embed", "has_decoder_prompt": True}, "no decoder's half"),
        ],
    )
    def test_a_form_of_other_values_is_refused(
        self, tmp_path: Path, bert: Base, form: Mapping[str, Any], message: str
    ) -> None:
        folder = save_prompt(headed(bert, InputForm()), tmp_path / "ours")
        edit(folder, RECORD, form=form)
        with pytest.raises(AdapterError, match=message):
            load_prompt(folder)

    def test_an_unknown_kind_of_base_is_refused(self, tmp_path: Path, bert: Base) -> None:
        folder = save_prompt(headed(bert, InputForm()), tmp_path / "ours")
        edit(folder, RECORD, base_kind="oracle")
        with pytest.raises(AdapterError, match="base_kind is 'oracle'"):
            load_prompt(folder)

    def test_a_plain_record_has_no_fields_that_earlier_releases_do_not_know(self, tmp_path: Path, bert: Base) -> None:
        folder = save_prompt(headed(bert, InputForm()), tmp_path / "ours")
        assert set(json.loads((folder / RECORD).read_text())["form"]) == {"kind", "template", "completion", "labels"}


class TestEncoderDecoders:
    """[P, H] with one submodule, or with a decoder's prompt [2P, H] with two; PEFT's own [2P, H] is half read."""

    def of(self, num_rows: int, **form: Any) -> SoftPrompt:
        vectors = torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(0))
        return SoftPrompt(vectors, PromptRecord(form=InputForm(**form), base_kind="seq2seq"))

    def test_a_prompt_for_the_encoder_is_p_vectors(self, tmp_path: Path) -> None:
        prompt = self.of(4)
        folder = save_prompt(prompt, tmp_path / "ours")
        config = stated(folder)
        assert (config["task_type"], config["num_transformer_submodules"], config["num_virtual_tokens"]) == (
            "SEQ_2_SEQ_LM", 1, 4,
        )  # fmt: skip
        loaded = load_prompt(folder)
        assert (loaded.content_hash, loaded.num_decoder_tokens) == (prompt.content_hash, 0)
        assert loaded.record.base_kind == "seq2seq"

    def test_a_prompt_for_both_is_2p_vectors(self, tmp_path: Path) -> None:
        prompt = self.of(8, has_decoder_prompt=True)
        folder = save_prompt(prompt, tmp_path / "ours")
        config = stated(folder)
        assert (config["num_transformer_submodules"], config["num_virtual_tokens"]) == (2, 4)
        loaded = load_prompt(folder)
        assert torch.equal(loaded.tensor, prompt.tensor)
        assert (loaded.num_virtual_tokens, loaded.num_decoder_tokens) == (4, 4)

    @pytest.mark.parametrize("parts", [2, None])
    def test_of_pefts_2p_vectors_the_half_is_kept_that_peft_reads(self, tmp_path: Path, parts: int | None) -> None:
        prompt = self.of(8, has_decoder_prompt=True)
        folder = save_prompt(prompt, tmp_path / "ours")
        (folder / RECORD).unlink()
        edit(folder, CONFIG, num_transformer_submodules=parts)
        loaded = load_prompt(folder)
        assert torch.equal(loaded.tensor, prompt.tensor[:4])
        again = stated(save_prompt(loaded, tmp_path / "again"))
        assert (again["num_transformer_submodules"], again["num_virtual_tokens"]) == (1, 4)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"num_virtual_tokens": 8},
                r"is 8, for encoder and decoder each, but the tensor is \[8",
            ),
            ({"num_transformer_submodules": 3}, "num_transformer_submodules is 3; an encoder-decoder has 1 or 2"),
            ({"num_transformer_submodules": True}, "num_transformer_submodules is True"),
        ],
    )
    def test_a_config_that_disagrees(self, tmp_path: Path, changes: Mapping[str, Any], message: str) -> None:
        folder = save_prompt(self.of(8, has_decoder_prompt=True), tmp_path / "ours")
        edit(folder, CONFIG, **changes)
        with pytest.raises(AdapterError, match=message):
            load_prompt(folder)

    def test_a_base_of_another_kind_is_refused(self, tmp_path: Path) -> None:
        folder = save_prompt(self.of(4), tmp_path / "ours")
        with pytest.raises(AdapterError, match="base of kind 'seq2seq'; 'tiny-llama' is of kind 'causal'"):
            load_prompt(folder, build_base("llama"), force=True)

    def test_a_record_of_another_kind_is_refused(self, tmp_path: Path) -> None:
        folder = save_prompt(replace(self.of(4), record=PromptRecord(base_kind="causal")), tmp_path / "ours")
        edit(folder, CONFIG, task_type="SEQ_2_SEQ_LM")
        with pytest.raises(AdapterError, match="do not belong together"):
            load_prompt(folder)


def test_a_causal_prompt_without_a_record_warns_and_loads_as_before(tmp_path: Path) -> None:
    base = build_base("llama")
    folder = save_prompt(SoftPrompt(torch.ones(4, 16)), tmp_path / "ours")
    (folder / RECORD).unlink()
    with pytest.warns(UnknownBaseWarning):
        loaded = load_prompt(folder, base)
    assert loaded.record.base_kind == "causal"
    assert loaded.record.form == InputForm()
