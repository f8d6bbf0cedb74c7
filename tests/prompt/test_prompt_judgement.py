"""A judgement says whether a prompt helps, with both figures, and reads back from JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from scipy.stats import binomtest

from softprompt.prompt import Judgement
from softprompt.prompt.judgement import sign_test


def judged(right: int, bare: int, *, rows: int = 20, worse: int = 0, **more: object) -> Judgement:
    """So many rows right; of those that the bare base has right, the prompt has `worse` wrong."""
    return Judgement(
        measure="accuracy", rows=rows, train_rows=180, prompt=right / rows, bare_base=bare / rows,
        better_rows=right - bare + worse, worse_rows=worse, majority=0.5, **more,
    )  # fmt: skip


def test_a_prompt_that_is_clearly_better_helps() -> None:
    found = judged(18, 11)
    assert (found.conclusion, found.recommendation) == ("helps", "prompt")
    assert found.text == (
        "On 20 validation rows the prompt is right in 18 and the bare base with the same template in 11: use the prompt"
    )


@pytest.mark.parametrize(("right", "bare"), [(12, 14), (14, 14), (0, 20), (20, 20)])
def test_a_prompt_that_is_not_ahead_does_not_help(right: int, bare: int) -> None:
    found = judged(right, bare, worse=max(bare - right, 0))
    assert (found.conclusion, found.recommendation) == ("does not help", "bare base")
    assert f"right in {right} and the bare base with the same template in {bare}: use the base without" in found.text


def test_a_few_rows_ahead_may_be_chance() -> None:
    found = judged(14, 12)
    assert (found.conclusion, found.recommendation) == ("undecided", "bare base")
    assert "better, but that may be chance; use the base without a prompt until more rows show" in found.text
    assert judged(140, 120, rows=200).conclusion == "helps"  # the same shares of more rows


def test_one_answer_to_every_row_is_no_help_however_bad_the_base() -> None:
    found = judged(10, 1, is_constant=True)
    assert (found.conclusion, found.recommendation) == ("does not help", "bare base")
    assert "use neither, for the prompt gives every row the same answer" in found.text


def test_better_than_the_base_but_not_than_one_answer_is_undecided() -> None:
    found = replace(judged(12, 2), majority=0.6)
    assert (found.conclusion, found.recommendation) == ("undecided", "bare base")
    assert "always giving the commonest answer would be right in 12" in found.text


@pytest.mark.parametrize(
    ("found", "advice"),
    [
        (judged(12, 14, worse=2), "try more rows (180 were trained on), another template or another learning rate"),
        (judged(10, 10), "try more rows (180 were trained on), another template or a bigger base"),
        (replace(judged(12, 14, worse=2), train_rows=5_000), "try another template or another learning rate"),
        (judged(19, 20, worse=1), "use the base without a prompt, which leaves nothing to gain"),
    ],
    ids=["few rows", "a base at chance", "many rows", "a base that is right everywhere"],
)
def test_what_to_try_suits_the_case(found: Judgement, advice: str) -> None:
    assert found.text.endswith(advice)


def test_a_graded_score_is_judged_by_the_interval_of_its_difference() -> None:
    found = replace(judged(10, 8), measure="chrf", prompt=0.5, bare_base=0.4, difference=(0.01, 0.2), majority=None)
    assert found.conclusion == "helps"
    assert found.text.startswith("On 20 validation rows the prompt scores 0.50 (chrF) and the bare base with the same")
    assert replace(found, difference=(-0.01, 0.2)).conclusion == "undecided"
    assert "and the bare base 0.40" in replace(found, has_template=False).text


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (6, 0), (5, 0), (3, 9), (60, 40), (1, 0)])
def test_the_sign_test_is_scipys(better: int, worse: int) -> None:
    wanted = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert sign_test(better, worse) == pytest.approx(wanted)


@pytest.mark.parametrize("found", [judged(18, 11), replace(judged(1, 0), measure="f1", difference=(0.1, 0.2))])
def test_it_reads_back_from_json(found: Judgement) -> None:
    record = json.loads(json.dumps(found.to_json()))
    assert Judgement.from_json(record) == found
    assert (record["conclusion"], record["recommendation"]) == (found.conclusion, found.recommendation)
    assert record["text"] == found.text


@pytest.mark.parametrize(
    "change",
    [
        {"measure": "praise"}, {"rows": 0}, {"rows": 10**9}, {"rows": "many"}, {"prompt": 1.5}, {"prompt": math.nan},
        {"better_rows": -1}, {"better_rows": 30}, {"difference": [1]}, {"difference": 3}, {"majority": "x"},
        {"train_rows": None}, {"rows": math.inf},
    ],
    ids=str,
)  # fmt: skip
def test_a_strangers_record_that_is_no_judgement_is_none(change: dict[str, object]) -> None:
    assert Judgement.from_json({**judged(18, 11).to_json(), **change}) is None


@pytest.mark.parametrize("record", [None, {}, [], "helps", {"rows": 10, "accuracy": 0.5}])
def test_a_record_without_a_judgement_is_none(record: object) -> None:
    assert Judgement.from_json(record) is None
