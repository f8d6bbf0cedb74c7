"""The temperature is that of a slow obvious fit; probabilities are probabilities; thresholds keep what they promise."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from softprompt.evaluation.calibrate import calibrate, fit_temperature, probabilities, threshold_line
from softprompt.prompt import Calibration, Judgement

SCORES = arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(2, 5)), elements=st.floats(-30, 30, width=32))


def slow_temperature(scores, own):
    """The best of a fine grid, the cross-entropy written out row by row."""
    num_rows, num_labels = scores.shape
    rest = 1 / (num_rows + 2)

    def loss(temperature):
        total = 0.0
        for row, label in zip(scores, own, strict=True):
            scaled = [score / temperature for score in row]
            normaliser = np.logaddexp.reduce(scaled)
            for number, score in enumerate(scaled):
                weight = rest / num_labels + (1 - rest if number == label else 0.0)
                total += weight * (normaliser - score)
        return total

    grid = np.exp(np.linspace(np.log(0.02), np.log(50), 400))
    return grid[int(np.argmin([loss(each) for each in grid]))]


@pytest.mark.parametrize("seed", range(4))
def test_the_temperature_is_that_of_a_grid(seed):
    draws = np.random.default_rng(seed)
    scale = (0.3, 1.0, 4.0, 10.0)[seed]
    truth = draws.normal(size=(40, 3)) * 2
    own = [int(draws.choice(3, p=shares)) for shares in probabilities(truth)]
    found = fit_temperature(truth * scale, own)
    assert found == pytest.approx(slow_temperature(truth * scale, own), rel=0.02)
    assert scale / 2 < found < scale * 2  # scores that are `scale` times too sure are cooled by it


def test_few_rows_that_are_all_right_do_not_make_certainty():
    scores = np.array([[4.0, 0.0]] * 20)
    found = calibrate(scores, [0] * 20)
    assert max(found.right) < 0.99
    assert fit_temperature(np.zeros((5, 3)), [0, 1, 2, 0, 1]) == 1.0


@settings(max_examples=30, deadline=None)
@given(SCORES, st.floats(0.05, 20))
def test_probabilities_sum_to_1_and_keep_the_order(scores, temperature):
    shares = probabilities(scores, temperature)
    assert np.allclose(shares.sum(axis=1), 1)
    for row, own in zip(scores, shares, strict=True):
        order = np.argsort(row, kind="stable")
        assert (np.diff(own[order]) >= 0).all()
    hotter = probabilities(scores, temperature * 2)
    assert (hotter.max(axis=1) <= shares.max(axis=1) + 1e-12).all()


SHARES = st.lists(st.floats(0.2, 1.0).map(lambda share: round(share, 3)), max_size=40)


@settings(max_examples=40, deadline=None)
@given(SHARES, SHARES, st.floats(0.1, 1.0))
def test_the_threshold_is_the_smallest_that_keeps_the_accuracy(right, wrong, target):
    found = Calibration(temperature=1.0, right=tuple(sorted(right)), wrong=tuple(sorted(wrong))).choose(target)
    rows = [(share, True) for share in right] + [(share, False) for share in wrong]
    good = []
    for threshold in sorted({share for share, _ in rows}):
        kept = [is_right for share, is_right in rows if share >= threshold]
        if len(kept) >= 10 and sum(kept) >= target * len(kept):
            good.append((threshold, len(kept), sum(kept)))
    assert found == (good[0] if good else None)


def test_a_calibration_comes_back_from_a_judgement_s_json():
    calibration = Calibration(temperature=1.5, right=(0.6, 0.9), wrong=(0.55,))
    judgement = Judgement(
        measure="accuracy", rows=3, train_rows=9, prompt=2 / 3, bare_base=1 / 3, better_rows=1, worse_rows=0,
        calibration=calibration,
    )  # fmt: skip
    record = json.loads(json.dumps(judgement.to_json()))
    assert Judgement.from_json(record) == judgement


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0}, {"temperature": float("nan")}, {"right": [2.0]}, {"right": "x"}, {"right": [], "wrong": []},
     {"wrong": [0.5] * 2_000}, {"wrong": None}],
)  # fmt: skip
def test_a_stranger_s_broken_calibration_is_none(change):
    record = {"temperature": 1.0, "right": [0.9], "wrong": []}
    assert Calibration.from_json(record) is not None
    assert Calibration.from_json({**record, **change}) is None


def test_the_line_says_what_was_kept_and_that_few_rows_make_it_rough():
    found = Calibration(temperature=1.0, right=(0.5, *[0.8] * 10), wrong=(0.6,))
    assert threshold_line(found, 0.95) == (
        "an answer is sure at a confidence of 0.800 or more: 10 of the 12 validation rows, right in 100.0% of them "
        "(72.2% to 100.0% at 95 %); chosen on so few rows, it is a rough one"
    )
    few = Calibration(temperature=1.0, right=(0.8,) * 9, wrong=())
    assert "no confidence is enough to be right in 95% of 10 rows or more, so every" in threshold_line(few, 0.95)
