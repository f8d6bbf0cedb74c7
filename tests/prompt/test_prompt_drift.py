"""Drift by hand, and read back from records that may be a stranger's."""

import json
import math

import pytest
import torch

from softprompt.errors import PromptError
from softprompt.prompt import Drift, SoftPrompt, drift, drift_from_json


def test_the_drift_is_that_computed_by_hand():
    start = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    end = torch.tensor([[3.0, 4.0], [0.0, 1.0], [-1.0, 0.0], [3.0, 3.0]])
    still, turned, reversed_, grown = drift(start, SoftPrompt(end))
    assert (still.distance, still.relative, still.cosine) == pytest.approx((0, 0, 1))
    assert (turned.distance, turned.relative, turned.cosine) == pytest.approx((math.sqrt(2), math.sqrt(2), 0))
    assert (reversed_.distance, reversed_.relative, reversed_.cosine) == pytest.approx((3, 1.5, -1))
    assert (grown.distance, grown.relative, grown.cosine) == pytest.approx((2 * math.sqrt(2), 2, 1))


def test_a_zero_vector_has_the_cosine_zero():
    from_zero, to_zero = drift(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), SoftPrompt(torch.tensor([[3.0, 4.0], [0, 0]])))
    assert from_zero == Drift(distance=5.0, relative=None, cosine=0.0)
    assert to_zero == Drift(distance=5.0, relative=1.0, cosine=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_start_may_have_any_dtype_and_a_gradient(dtype):
    start = torch.tensor([[3.0, 4.0]], dtype=dtype, requires_grad=True)
    assert drift(start, SoftPrompt(start))[0].distance == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_angle_does_not_depend_on_the_scale(scale):
    start, end = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    (found,) = drift(scale * start, SoftPrompt(scale * end))
    assert found.cosine == pytest.approx(0.96)
    assert found.relative == pytest.approx(math.sqrt(2) / 5)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (6,)])
def test_a_start_of_another_shape_is_refused(shape):
    with pytest.raises(PromptError, match=r"shape \[2, 2\]; this one has \[" + ", ".join(map(str, shape))):
        drift(torch.ones(shape), SoftPrompt(torch.ones(2, 2)))


def test_a_drift_survives_json():
    found = drift(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), SoftPrompt(torch.ones(2, 2)))
    record = json.loads(json.dumps([token.to_json() for token in found], allow_nan=False))
    assert set(record[0]) == {"distance", "relative", "cosine"}
    assert drift_from_json(record, 2) == found


GOOD = {"distance": 1, "relative": None, "cosine": 0.5}


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "drift",
        {},
        [],
        [GOOD],
        [GOOD] * 3,
        [GOOD, 1],
        [GOOD, None],
        [GOOD, {"distance": 1.0}],
        [GOOD, {**GOOD, "cosine": None}],
        [GOOD, {**GOOD, "cosine": "1"}],
        [GOOD, {**GOOD, "relative": [1]}],
        [GOOD, {**GOOD, "distance": True}],
        [GOOD, {**GOOD, "distance": math.nan}],
        [GOOD, {**GOOD, "distance": math.inf}],
        [GOOD, {**GOOD, "distance": 10**400}],
    ],
)
def test_a_malformed_drift_is_read_as_none(value):
    assert drift_from_json(value, 2) == ()


def test_fields_of_later_releases_are_ignored():
    assert drift_from_json([{**GOOD, "more": "x"}], 1) == (Drift(1.0, None, 0.5),)
