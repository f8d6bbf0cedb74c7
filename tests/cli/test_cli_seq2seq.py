"""The commands on the folder of an encoder-decoder: train, compare, generate, prompts show, predict."""

import json

import pytest
from support.command_line import run, succeed
from support.material import QUICK, review, sentence, write_csv
from support.seq2seq_bases import build_model, build_tokenizer

PAIRS = ("--template", "{text}", "--completion", "{answer}")


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "t5"
    build_model("t5").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "reviews.csv", [review(seed) for seed in range(24)])


def train(base, data, out, *flags):
    form = ("--template", "w5 {text} w6", "--completion", " {label}")
    rows = ("--data", data, "--validation", 6, "--test", 6)
    assert "task: labels" in succeed("train", "--base", base, *rows, *QUICK, *form, "--out", out, *flags).err
    return out


@pytest.fixture(scope="module")
def one(t5_folder, reviews, tmp_path_factory):
    """A prompt for the encoder."""
    return train(t5_folder, reviews, tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def both(t5_folder, reviews, tmp_path_factory):
    """A prompt for either side."""
    return train(t5_folder, reviews, tmp_path_factory.mktemp("runs") / "both", "--decoder-prompt")


def test_a_prompt_is_trained_shown_and_answers(t5_folder, one):
    base = ("--base", t5_folder, "--dtype", "float32")
    shown = succeed("prompts", "show", one, *base, "--json").json
    assert shown["shape"] == [3, 16] and len(shown["nearest"]) == 3
    answers = succeed("generate", *base, "--prompt", one, "w7 w8", "--json").json
    labels = {review(seed)["label"] for seed in range(2)}
    text = json.dumps(answers)
    assert any(label in text for label in labels)


@pytest.mark.medium
def test_prompts_of_both_shapes_are_compared_and_looked_into(t5_folder, one, both):
    base = ("--base", t5_folder, "--dtype", "float32")
    prompts = ("--prompt", one, "--prompt", both)
    found = succeed("compare", *base, *prompts, "--input", "w7 w8", "--json").json
    assert {item["prompt"] for item in found["losses"]} == {None, "one", "both"}
    assert len(found["accuracies"]) == 3
    shown = succeed("prompts", "show", both, *base, "--leave-out").out
    assert "3 x 16, and 3 more for the decoder" in shown
    raw = succeed("generate", *base, "--prompt", both, "w7 w8", "--raw", "--max-new-tokens", 3)
    assert raw.out.strip()


@pytest.mark.medium
def test_candidates_are_trained_on_pairs(t5_folder, tmp_path):
    rows = [{"text": sentence(seed), "answer": sentence(seed + 50)} for seed in range(10)]
    data = write_csv(tmp_path / "pairs.csv", rows)
    where = ("--base", t5_folder, "--data", data, *QUICK, *PAIRS)
    done = succeed("train", *where, "--out", tmp_path / "many", "--candidates", 2, "--validation", 3)
    assert "saved to" in done.err


@pytest.mark.medium
@pytest.mark.parametrize("name", ["one", "both"])
def test_a_file_of_rows_is_answered(t5_folder, tmp_path, name, request):
    rows = [{"text": review(seed)["text"]} for seed in range(5)] + [{"text": sentence(3, 900, 901)}]
    data, out = write_csv(tmp_path / "in.csv", rows), tmp_path / "out.jsonl"
    where = ("--base", t5_folder, "--dtype", "float32", "--max-length", 64, "--prompt", request.getfixturevalue(name))
    succeed("predict", *where, "--data", data, "--out", out)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["label"] in ("w90", "w91") and row["error"] is None for row in found)
    assert [row["truncated"] for row in found] == [False] * 5 + [True]


def test_a_text_alone_is_refused_with_what_to_give(t5_folder, tmp_path):
    data = tmp_path / "texts.txt"
    data.write_text("w7 w8\n\nw9 w10\n")
    complaint = run("train", "--base", t5_folder, "--data", data, *QUICK, "--out", tmp_path / "run").complaint
    assert "is an encoder-decoder, which reads one text and writes another" in complaint
    assert "--template" in complaint and "--completion" in complaint
    assert not (tmp_path / "run").exists()


@pytest.mark.medium
def test_a_decoder_prompt_is_refused_on_a_base_without_a_decoder_of_its_own(base_folder, reviews, tmp_path):
    refused = run(
        "train", "--base", base_folder, "--data", reviews, *QUICK, "--decoder-prompt", "--out", tmp_path / "r"
    )
    assert "decoder_prompt is for encoder-decoders" in refused.complaint
