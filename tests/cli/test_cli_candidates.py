"""`train --candidates`: several prompts in one pass, the best kept, or all of them as a set."""

from __future__ import annotations

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from support.command_line import run
from support.material import QUICK, TEMPLATE
from support.tiny_bases import build_model

from softprompt.cli.train import vary
from softprompt.config import TASK_DEFAULTS, TrainConfig
from softprompt.errors import ConfigError
from softprompt.runs import RunFolder
from softprompt.storage import is_set, load_prompt, load_set


@pytest.fixture
def train(base_folder, texts, tmp_path):
    def call(*flags, data=texts, form=("--text-column", "prompt"), out="run"):
        where = ("--base", base_folder, "--data", data, *form, "--out", tmp_path / out)
        return run("train", *where, *QUICK, "--rows", 24, *flags)

    return call


def test_the_best_by_validation_is_kept_and_the_others_lie_below(train, tmp_path):
    ran = train("--candidates", 4, "--validation", 6, "--json")
    assert ran.code == 0, ran.err
    found = ran.json["candidates"]
    best = min(found, key=lambda name: found[name]["value"])
    assert ran.json["kept"] == best
    folder = tmp_path / "run"
    assert torch.equal(load_prompt(folder).tensor, load_prompt(folder / "candidates" / best).tensor)
    assert {path.name for path in (folder / "candidates").iterdir()} == {"c0", "c1", "c2", "c3"}
    dropped = [line for line in RunFolder(folder).read_metrics() if line["kind"] == "dropped"]
    assert {line["candidate"] for line in dropped} == {n for n, item in found.items() if item["dropped_after"]}
    assert not is_set(folder)
    assert "4 prompts train together" in ran.err


def test_the_first_candidate_is_the_run_without_candidates(train, tmp_path):
    assert train("--candidates", 3, "--no-halving", "--validation", 6).code == 0
    assert train("--validation", 6, out="alone").code == 0
    together, alone = load_prompt(tmp_path / "run" / "candidates" / "c0").tensor, load_prompt(tmp_path / "alone").tensor
    assert (together - alone).norm() / alone.norm() < 1e-3
    other = load_prompt(tmp_path / "run" / "candidates" / "c1").tensor
    assert (together - other).norm() / alone.norm() > 0.05  # the control


def test_an_ensemble_keeps_all(train, tmp_path):
    ran = train("--candidates", 3, "--ensemble", "--validation", 6)
    assert ran.code == 0, ran.err
    members = load_set(tmp_path / "run")
    assert list(members) == ["candidates/c0", "candidates/c1", "candidates/c2"]
    assert train("--candidates", 2, "--ensemble", out="blind").code == 0  # a vote needs no validation rows


def test_a_task_score_chooses(train, reviews):
    ran = train("--validation", 8, "--best-by", "accuracy", "--json", data=reviews, form=TEMPLATE)
    assert ran.code == 0, ran.err
    scores = dict(ran.json["scores"])
    assert set(scores) == {2, 4}
    assert ran.json["kept_step"] == max(scores, key=lambda step: (scores[step], -step))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--candidates", 3), "give a validation share"),
        (("--ensemble",), "--ensemble needs several prompts"),
        (("--candidates", 9, "--vary", "start", "--validation", 6), "vary the seed too"),
        (("--best-by", "accuracy"), "no validation rows"),
        (("--best-by", "accuracy", "--validation", 6), "label"),
        (("--candidates", 0), "0"),
    ],
)
def test_what_cannot_be_chosen_is_refused(flags, said, train, tmp_path):
    assert said in train(*flags).complaint
    assert not (tmp_path / "run").exists()


def test_variations_begin_with_the_given_recipe_and_are_all_different():
    given = TrainConfig(relative_learning_rate=0.5, seed=7)
    found = vary(given, 12, ("seed", "rate", "start", "length"), "labels")
    assert found["c0"] == given
    assert len({repr(config) for config in found.values()}) == 12
    assert {config.seed for config in found.values()} == set(range(7, 19))
    assert [config.relative_learning_rate for config in vary(given, 3, ("rate",), "labels").values()] == [
        0.5,
        1.5,
        0.5 / 3,
    ]
    assert vary(TrainConfig(learning_rate=1e-3), 2, ("rate",), "labels")["c1"].learning_rate == pytest.approx(3e-3)
    for task, defaults in TASK_DEFAULTS.items():
        rate = vary(TrainConfig(), 2, ("rate",), task)["c1"].relative_learning_rate
        assert rate == pytest.approx(3 * defaults["relative_learning_rate"])
    with pytest.raises(ConfigError, match="makes 4"):
        vary(given, 5, ("rate",), "text")


def test_pefts_own_adapter_is_trained_further(train, tmp_path):
    tuned = get_peft_model(build_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    tuned.save_pretrained(tmp_path / "theirs")
    theirs = tuned.prompt_encoder["default"].embedding.weight.detach()
    ran = train(
        "--init-from", tmp_path / "theirs", "--max-steps", 1, "--learning-rate", 1e-3, "--reparameterisation", "none"
    )
    assert ran.code == 0, ran.err
    step = (load_prompt(tmp_path / "run").tensor - theirs).abs().max()
    assert 0 < step < 1.1e-3
