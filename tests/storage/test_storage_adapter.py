"""What a saved folder keeps, and every way in which a folder is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from softprompt.base.model import Base
from softprompt.errors import AdapterError, ExistsError, PromptError, StorageError, WrongBaseError
from softprompt.prompt import SoftPrompt
from softprompt.storage import UnknownBaseWarning, files, load_prompt, save_prompt
from softprompt.types import InputForm

MakePrompt = Callable[..., SoftPrompt]
MakeBase = Callable[..., Base]
Damaged = Callable[[Callable[[Path], object]], Path]
WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "softprompt.json"


def edit(name: str, **changes: Any) -> Callable[[Path], object]:
    """Change keys of one of the folder's JSON files."""
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))


def weights(tensors: dict[str, torch.Tensor]) -> Callable[[Path], object]:
    return lambda folder: save_file(tensors, folder / WEIGHTS)


def pickled(value: object, **settings: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(value, folder / "adapter_model.bin", **settings)

    return spoil


def refused(folder: Path, message: str, **settings: Any) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        load_prompt(folder, **settings)
    assert "\n" not in str(caught.value)


class TestKept:
    def test_vectors_and_record_are_kept(self, tmp_path: Path, base: Base, prompt: SoftPrompt) -> None:
        folder = save_prompt(prompt, tmp_path / "deep" / "coach")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load_prompt(folder, base)
        assert torch.equal(loaded.tensor, prompt.tensor)
        assert loaded.record == prompt.record
        assert sorted(os.listdir(folder)) == ["README.md", CONFIG, WEIGHTS, RECORD]

    def test_base_fills_in_what_the_record_lacks(self, tmp_path: Path, base: Base, make_prompt: MakePrompt) -> None:
        save_prompt(make_prompt(), tmp_path / "x", base=base)
        record = load_prompt(tmp_path / "x").record
        assert (record.base_name, record.base_fingerprint) == (base.name, base.fingerprint)

    def test_a_base_that_is_not_the_records_is_refused_when_saving(
        self, tmp_path: Path, prompt: SoftPrompt, make_base: MakeBase
    ) -> None:
        with pytest.raises(WrongBaseError):
            save_prompt(prompt, tmp_path / "x", base=make_base(seed=9))
        assert not (tmp_path / "x").exists()

    def test_not_a_number_in_the_run_stays_json(self, tmp_path: Path, make_prompt: MakePrompt) -> None:
        save_prompt(make_prompt(run={"curve": [float("nan"), 1.0]}), tmp_path / "x")
        json.loads((tmp_path / "x" / RECORD).read_text(), parse_constant=pytest.fail)
        assert load_prompt(tmp_path / "x").record.run == {"curve": [None, 1.0]}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_float_dtypes_become_float32(
        self, tmp_path: Path, damaged: Damaged, dtype: torch.dtype, make_prompt: MakePrompt
    ) -> None:
        values = make_prompt(seed=5).tensor.to(dtype)
        folder = damaged(lambda folder: (weights({"prompt_embeddings": values})(folder), (folder / RECORD).unlink()))
        loaded = load_prompt(folder)
        assert loaded.tensor.dtype == torch.float32
        assert torch.equal(loaded.tensor, values.float())

    def test_extra_metadata_and_unknown_config_keys_are_tolerated(self, damaged: Damaged, prompt: SoftPrompt) -> None:
        def spoil(folder: Path) -> None:
            save_file({"prompt_embeddings": prompt.tensor}, folder / WEIGHTS, metadata={"format": "pt", "more": "x"})
            edit(CONFIG, from_the_future=[1])(folder)

        assert torch.equal(load_prompt(damaged(spoil)).tensor, prompt.tensor)

    def test_the_card_describes_the_prompt(self, tmp_path: Path, prompt: SoftPrompt) -> None:
        save_prompt(prompt, tmp_path / "x")
        card = (tmp_path / "x" / "README.md").read_text()
        front = card.split("---\n")[1]
        assert "library_name: peft\n" in front
        assert 'base_model: "tiny/llama"\n' in front
        assert all(part in card for part in ("PeftModel.from_pretrained", "load_prompt(", "- epochs: 6", "- seed: 0",
                                             "- torch: 2.13.0", prompt.content_hash))  # fmt: skip
        assert "secret" not in card
        assert "Review: {text}" in card
        assert "good" in card

    def test_a_template_and_labels_cannot_end_their_block_in_the_card(
        self, tmp_path: Path, make_prompt: MakePrompt
    ) -> None:
        form = InputForm(kind="template", template="```\n# Evil {text}", completion="{x}", labels=("````", "b"))
        save_prompt(make_prompt(form=form), tmp_path / "x")
        blocks = MarkdownIt().parse((tmp_path / "x" / "README.md").read_text())
        assert "Evil {text}" not in "".join(token.content for token in blocks if token.type == "inline")
        assert "```\n# Evil {text}\n" in [token.content for token in blocks if token.type == "fence"]

    def test_the_base_is_named_as_it_was_given(self, tmp_path: Path, make_prompt: MakePrompt) -> None:
        prompt = make_prompt(base_name="llama", base_source="/models/llama")
        save_prompt(prompt, tmp_path / "x")
        config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "/models/llama"
        assert load_prompt(tmp_path / "x").record.base_source == "/models/llama"
        card = (tmp_path / "x" / "README.md").read_text()
        assert "load_base('/models/llama')" in card
        assert "base_model:" not in card

    def test_a_bases_name_cannot_write_into_the_card(self, tmp_path: Path, make_prompt: MakePrompt) -> None:
        save_prompt(make_prompt(base_name='x"\n---\n# Evil `code`'), tmp_path / "x")
        card = (tmp_path / "x" / "README.md").read_text()
        assert "base_model" not in card
        assert "\n# Evil" not in card
        assert card.count("---\n") == 2


class TestOverwriting:
    def test_an_existing_adapter_is_kept_unless_asked(self, tmp_path: Path, make_prompt: MakePrompt) -> None:
        save_prompt(make_prompt(seed=1), tmp_path / "x")
        with pytest.raises(ExistsError, match="exists and is not empty"):
            save_prompt(make_prompt(seed=2), tmp_path / "x")
        assert torch.equal(load_prompt(tmp_path / "x").tensor, make_prompt(seed=1).tensor)
        save_prompt(make_prompt(seed=2), tmp_path / "x", overwrite=True)
        assert torch.equal(load_prompt(tmp_path / "x").tensor, make_prompt(seed=2).tensor)

    @pytest.mark.parametrize("others", [["thesis.txt"], ["thesis.txt", CONFIG], ["README.md"]])
    def test_a_users_folder_is_never_overwritten(
        self, tmp_path: Path, others: list[str], make_prompt: MakePrompt
    ) -> None:
        (tmp_path / "x").mkdir()
        for name in others:
            (tmp_path / "x" / name).write_text("mine")
        with pytest.raises(ExistsError, match=f"holds .*{re.escape(others[0])}.* not overwritten"):
            save_prompt(make_prompt(), tmp_path / "x", overwrite=True)
        assert sorted(os.listdir(tmp_path / "x")) == sorted(others)

    def test_a_file_at_the_folders_path_is_refused(self, tmp_path: Path, make_prompt: MakePrompt) -> None:
        (tmp_path / "x").write_text("mine")
        with pytest.raises(ExistsError, match="is a file"):
            save_prompt(make_prompt(), tmp_path / "x", overwrite=True)

    def test_overwriting_removes_an_older_bin(self, tmp_path: Path, make_prompt: MakePrompt) -> None:
        save_prompt(make_prompt(seed=1), tmp_path / "x")
        (tmp_path / "x" / "adapter_model.bin").write_bytes(b"old")
        save_prompt(make_prompt(seed=2), tmp_path / "x", overwrite=True)
        assert "adapter_model.bin" not in os.listdir(tmp_path / "x")


class TestBase:
    def test_another_base_is_refused_with_both_names(
        self, tmp_path: Path, base: Base, prompt: SoftPrompt, make_base: MakeBase
    ) -> None:
        other = make_base(seed=9, name="tiny/other")
        save_prompt(prompt, tmp_path / "x")
        with pytest.raises(WrongBaseError) as caught:
            load_prompt(tmp_path / "x", other)
        said = str(caught.value)
        for part in (base.name, other.name, base.fingerprint[:12], other.fingerprint[:12], "force"):
            assert part in said
        assert torch.equal(load_prompt(tmp_path / "x", other, force=True).tensor, prompt.tensor)

    @pytest.mark.parametrize("force", [False, True])
    def test_another_width_is_refused_even_by_force(
        self, tmp_path: Path, prompt: SoftPrompt, force: bool, make_base: MakeBase
    ) -> None:
        save_prompt(prompt, tmp_path / "x")
        wide = make_base(hidden=32, name="tiny/wide")
        refused(
            tmp_path / "x", r"is \[4, 16\], made for tiny/llama; .* tiny/wide are \[64, 32\]", base=wide, force=force
        )

    def test_no_fingerprint_warns_once_at_the_callers_line(
        self, tmp_path: Path, base: Base, make_prompt: MakePrompt
    ) -> None:
        save_prompt(make_prompt(base_name="someone/else"), tmp_path / "x")
        with pytest.warns(UnknownBaseWarning, match=r"'someone/else' without a fingerprint; its width 16 fits") as told:
            load_prompt(tmp_path / "x", base)
        assert len(told) == 1
        assert told[0].filename == __file__


class TestRefused:
    def test_a_missing_folder_is_refused(self, tmp_path: Path) -> None:
        refused(tmp_path / "absent", "absent is not there; give an adapter's folder")
        (tmp_path / "file").write_text("")
        refused(tmp_path / "file", "file is a file; give an adapter's folder")
        refused(tmp_path, r"has no adapter_config\.json and no adapter_model\.safetensors; it is not an adapter")

    def test_an_unfinished_runs_checkpoints_are_named(self, tmp_path: Path, make_prompt: MakePrompt) -> None:
        save_prompt(make_prompt(), tmp_path / "checkpoints" / "step-2")
        save_prompt(make_prompt(), tmp_path / "checkpoints" / "step-4")
        refused(tmp_path, r"these folders below it have: checkpoints/step-2, checkpoints/step-4")

    def test_a_folder_without_weights_is_refused(self, damaged: Damaged) -> None:
        refused(damaged(lambda folder: (folder / WEIGHTS).unlink()), r"but neither adapter_model\.safetensors nor")

    def test_weights_without_a_config_need_the_task(self, damaged: Damaged, prompt: SoftPrompt) -> None:
        folder = damaged(lambda folder: (folder / CONFIG).unlink())
        refused(folder, r"no adapter_config\.json, so .* its weights are \[4, 16\]\. .*--task-type CAUSAL_LM")
        assert torch.equal(load_prompt(folder, task_type="CAUSAL_LM").tensor, prompt.tensor)
        refused(folder, "SEQ_2|encoder-decoder", task_type="SEQ_2_SEQ_LM")

    @pytest.mark.parametrize("kind", ["LORA", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", None, 7])
    def test_foreign_kinds_are_named(self, damaged: Damaged, kind: object) -> None:
        refused(damaged(edit(CONFIG, peft_type=kind)), f"has the peft_type {kind!r}; only PROMPT_TUNING")

    def test_a_lora_adapter_is_refused(self, damaged: Damaged) -> None:
        def spoil(folder: Path) -> None:
            edit(CONFIG, peft_type="LORA")(folder)
            weights({"q.lora_A.weight": torch.ones(2, 2), "q.lora_B.weight": torch.ones(2, 2)})(folder)

        refused(damaged(spoil), "LORA")

    @pytest.mark.parametrize(
        ("task", "message"),
        [
            ("MASKED_LM", "task_type 'MASKED_LM'; it must be one of CAUSAL_LM, SEQ_2_SEQ_LM"),
            ("SEQ_CLS", "task_type 'SEQ_CLS', and softprompt.json is of the task 'generate'"),
            (None, "names no task_type"),
            (["CAUSAL_LM"], "it must be one of CAUSAL_LM"),
        ],
    )
    def test_another_task_is_refused(self, damaged: Damaged, task: object, message: str) -> None:
        refused(damaged(edit(CONFIG, task_type=task)), message)

    def test_a_task_or_base_that_contradicts_the_folder_is_refused(self, damaged: Damaged) -> None:
        folder = damaged(lambda folder: None)
        refused(folder, "'CAUSAL_LM' and 'SEQ_CLS' was given", task_type="SEQ_CLS")
        refused(folder, "names its base 'tiny/llama' and 'gpt2' was given", base_name="gpt2")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_virtual_tokens": 8}, r"num_virtual_tokens is 8, but the tensor is \[4, 16\]"),
            ({"num_virtual_tokens": None}, "num_virtual_tokens is None"),
            ({"token_dim": 32}, r"token_dim is 32, but the tensor is \[4, 16\]"),
            ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2"),
        ],
    )
    def test_a_config_that_disagrees(self, damaged: Damaged, changes: dict[str, Any], message: str) -> None:
        refused(damaged(edit(CONFIG, **changes)), message)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "not valid JSON"),
            (b"{", "not valid JSON"),
            (b"\xff\xfe{}", "not valid JSON"),
            (b"[" * 100_000, "not valid JSON"),
            (b"[1]", "holds a JSON list; it must be an object"),
            (b"null", "holds a JSON NoneType"),
            (b" " * (files.MAX_RECORD_BYTES + 1), "the limit is 1"),
        ],
    )
    @pytest.mark.parametrize("name", [CONFIG, RECORD])
    def test_malformed_json_is_refused(self, damaged: Damaged, name: str, data: bytes, message: str) -> None:
        refused(damaged(lambda folder: (folder / name).write_bytes(data)), f"{re.escape(name)}.*{message}")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format_version": 2}, "reads up to 1: upgrade softprompt"),
            ({"format_version": "1"}, "format_version '1'"),
            ({"format_version": True}, "format_version True"),
            ({"content_hash": None}, "no content_hash"),
            ({"content_hash": "0" * 64}, "they were changed later"),
            ({"base_fingerprint": 7}, "base_fingerprint is 7; it must be text or null"),
            ({"base_name": ["x"]}, "base_name is"),
            ({"form": [1]}, "malformed"),
            ({"form": {"kind": "plain", "unknown": 1}}, "malformed"),
            ({"run": 5}, "malformed"),
        ],
    )
    def test_a_malformed_record_is_refused(self, damaged: Damaged, changes: dict[str, Any], message: str) -> None:
        refused(damaged(edit(RECORD, **changes)), message)

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"prompt_embeddings": torch.ones(4, 16), "more": torch.ones(1)}, r"holds 2 tensors \(more, prompt_emb"),
            ({"prompt_embedding": torch.ones(4, 16)}, "holds 1 tensors .*exactly one, 'prompt_embeddings'"),
            ({"prompt_embeddings": torch.ones(64)}, r"shape \[64\]"),
            ({"prompt_embeddings": torch.ones(1, 4, 16)}, r"shape \[1, 4, 16\]"),
            ({"prompt_embeddings": torch.ones(0, 16)}, r"shape \[0, 16\]"),
            ({"prompt_embeddings": torch.ones(4, 16, dtype=torch.int64)}, "torch.int64"),
            ({"prompt_embeddings": torch.full((4, 16), float("nan"))}, "64 of 64 are NaN or infinite"),
            ({"prompt_embeddings": torch.full((4, 16), float("inf"))}, "NaN or infinite"),
            ({"prompt_embeddings": torch.full((4, 16), 1e300, dtype=torch.float64)}, "NaN or infinite"),
            (
                {"prompt_embeddings": torch.full((4, 16), -3e38)},
                r"values up to 3e\+38; a base computes NaN",
            ),
        ],
    )
    def test_unusable_tensors_are_refused(
        self, damaged: Damaged, tensors: dict[str, torch.Tensor], message: str
    ) -> None:
        refused(damaged(weights(tensors)), message)

    @pytest.mark.parametrize("name", [WEIGHTS, CONFIG, RECORD])
    def test_a_git_lfs_pointer_is_named(self, damaged: Damaged, name: str) -> None:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:9c0e\nsize 1044992\n"
        folder = damaged(lambda folder: (folder / name).write_bytes(pointer))
        refused(folder, rf"{name} is a Git LFS pointer, .* git lfs pull")

    @pytest.mark.parametrize("keep", [0, 4, 8, 40, 100, -1])
    def test_truncated_safetensors_are_refused(self, damaged: Damaged, keep: int) -> None:
        folder = damaged(lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep]))
        refused(folder, r"adapter_model\.safetensors is (cut off|not a sound)")

    def test_a_huge_header_is_not_parsed(self, damaged: Damaged) -> None:
        size = files.MAX_TEXT_BYTES + 1
        folder = damaged(lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + b" " * size))
        refused(folder, "header of 1,048,577 bytes; the limit is")

    @pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
    def test_oversize_weights_are_not_read(self, damaged: Damaged, name: str) -> None:
        def spoil(folder: Path) -> None:
            (folder / WEIGHTS).unlink()
            (folder / name).write_bytes(b"")
            os.truncate(folder / name, files.MAX_WEIGHTS_BYTES + 1)  # sparse: takes no space

        refused(damaged(spoil), "268,435,457 bytes; the limit is 268,435,456")


class Evil:
    """Unpickling this makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


class TestPickles:
    def test_a_sound_pickle_loads(self, damaged: Damaged, prompt: SoftPrompt) -> None:
        assert torch.equal(load_prompt(damaged(pickled({"prompt_embeddings": prompt.tensor}))).tensor, prompt.tensor)

    def test_code_is_never_run(self, damaged: Damaged, tmp_path: Path) -> None:
        trap = tmp_path / "ran"
        folder = damaged(pickled({"prompt_embeddings": Evil(trap)}))
        refused(folder, "holds more than tensors, or is damaged, and was not loaded")
        assert not trap.exists()
        torch.load(folder / "adapter_model.bin", weights_only=False)  # the control: the trap works
        assert trap.exists()

    def test_a_bare_pickle_is_never_opened(self, damaged: Damaged, tmp_path: Path) -> None:
        trap = tmp_path / "ran"

        def spoil(folder: Path) -> None:
            (folder / WEIGHTS).unlink()
            (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(trap)))

        refused(damaged(spoil), "a bare pickle, which may hold code")
        assert not trap.exists()

    def test_the_legacy_format_is_refused(self, damaged: Damaged, prompt: SoftPrompt) -> None:
        value = {"prompt_embeddings": prompt.tensor}
        refused(damaged(pickled(value, _use_new_zipfile_serialization=False)), "a bare pickle")

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (torch.ones(4, 16), "holds a Tensor; it must be a dictionary"),
            ({"prompt_embeddings": [1.0]}, "is a list; it must be a tensor"),
            ({"prompt_embeddings": torch.ones(4, 16), 7: 1}, "holds 2 tensors"),
            ({"prompt_embeddings": torch.ones(1).expand(100_000, 100_000)}, r"claims \[100000, 100000\] from"),
            ({"prompt_embeddings": torch.ones(4, 16).to_sparse()}, "sparse"),
        ],
    )
    def test_a_pickle_of_other_contents_is_refused(self, damaged: Damaged, value: object, message: str) -> None:
        refused(damaged(pickled(value)), message)

    def test_a_zip_bomb_is_refused(self, damaged: Damaged) -> None:
        def spoil(folder: Path) -> None:
            stored = io.BytesIO()
            torch.save({"prompt_embeddings": torch.zeros(1000, 1000)}, stored)
            (folder / WEIGHTS).unlink()
            with (
                zipfile.ZipFile(stored) as source,
                zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as bomb,
            ):
                for name in source.namelist():
                    bomb.writestr(name, source.read(name))
            assert (folder / "adapter_model.bin").stat().st_size < 100_000

        refused(damaged(spoil), "is a packed archive")

    def test_a_damaged_pickle_is_refused(self, damaged: Damaged, prompt: SoftPrompt) -> None:
        def spoil(folder: Path) -> None:
            pickled({"prompt_embeddings": prompt.tensor})(folder)
            data = (folder / "adapter_model.bin").read_bytes()
            (folder / "adapter_model.bin").write_bytes(data[: len(data) // 2])

        refused(damaged(spoil), "is cut off")

    def test_safetensors_wins_where_both_are_there(self, damaged: Damaged, prompt: SoftPrompt, tmp_path: Path) -> None:
        trap = tmp_path / "ran"
        folder = damaged(lambda folder: torch.save(Evil(trap), folder / "adapter_model.bin"))
        assert torch.equal(load_prompt(folder).tensor, prompt.tensor)
        assert not trap.exists()


class TestLinks:
    @pytest.mark.parametrize("name", [WEIGHTS, CONFIG, RECORD])
    def test_a_link_out_of_the_folder_is_refused(self, damaged: Damaged, tmp_path: Path, name: str) -> None:
        def spoil(folder: Path) -> None:
            (folder / name).rename(tmp_path / "elsewhere")
            (folder / name).symlink_to(tmp_path / "elsewhere")

        refused(damaged(spoil), f"{re.escape(name)} is a link to .*elsewhere, outside of its folder")

    def test_a_link_inside_is_fine(self, damaged: Damaged, prompt: SoftPrompt) -> None:
        def spoil(folder: Path) -> None:
            (folder / WEIGHTS).rename(folder / "real")
            (folder / WEIGHTS).symlink_to("real")

        assert torch.equal(load_prompt(damaged(spoil)).tensor, prompt.tensor)

    def test_a_linked_folder_is_fine(self, damaged: Damaged, prompt: SoftPrompt, tmp_path: Path) -> None:
        (tmp_path / "alias").symlink_to(damaged(lambda folder: None))
        assert torch.equal(load_prompt(tmp_path / "alias").tensor, prompt.tensor)

    def test_dangling_links_loops_and_pipes_are_refused(self, damaged: Damaged) -> None:
        folder = damaged(lambda folder: (folder / CONFIG).unlink())
        (folder / CONFIG).symlink_to("absent")
        refused(folder, "cannot read")
        (folder / CONFIG).unlink()
        (folder / CONFIG).symlink_to(CONFIG)
        refused(folder, "cannot read")
        (folder / CONFIG).unlink()
        os.mkfifo(folder / CONFIG)
        refused(folder, "not a regular file")
        (folder / CONFIG).unlink()
        (folder / CONFIG).mkdir()
        refused(folder, "not a regular file|cannot read")


def test_errors_are_of_the_natural_kinds(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        load_prompt(tmp_path)
    with pytest.raises(ValueError, match="adapter"):
        load_prompt(tmp_path)
    assert issubclass(WrongBaseError, PromptError)


def test_weights_that_others_made_without_a_config(real_material: Path, make_base: MakeBase) -> None:
    folder = real_material / "adapters" / "tinyllama-8x64"
    refused(folder, r"no adapter_config\.json, so its kind, task and base are unknown; its weights are \[8, 64\]")
    prompt = load_prompt(folder, task_type="CAUSAL_LM", base_name="tinyllama")
    assert tuple(prompt.tensor.shape) == (8, 64)
    assert prompt.record.base_name == "tinyllama"
    with pytest.warns(UnknownBaseWarning):
        load_prompt(folder, make_base(hidden=64), task_type="CAUSAL_LM")
    refused(folder, r"\[8, 64\], made for an unknown base; .* \[64, 16\]", base=make_base(), task_type="CAUSAL_LM")
