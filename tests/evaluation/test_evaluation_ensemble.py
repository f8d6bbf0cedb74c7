"""Several prompts vote: counted by hand, ties broken by hand, and one pass equal to a plain forward for each."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from support.slow_truth import plain_nats
from support.tiny_bases import random_ids, random_prompt

from softprompt.data import rows_from_records, rows_from_texts
from softprompt.data.rows import with_labels
from softprompt.errors import ConfigError, LengthError
from softprompt.evaluation import accuracy, accuracy_tables, compare, ensemble_tables, to_markdown, vote, vote_accuracy
from softprompt.evaluation.heldout import Interval
from softprompt.families import forward_of
from softprompt.prompt import SoftPrompt

LABELS = (" w56", " w91", " w91 w88")


def labelled(labels):
    records = [
        {
            "text": " ".join(f"w{token}" for token in random_ids(2 + i % 7, i)),
            "label": labels[i % len(labels)].strip(),
        }
        for i in range(24)
    ]
    return with_labels(rows_from_records(records, template="w5 {text} w6", completion=" {label}"))


@pytest.fixture
def rows():
    return labelled(LABELS)


@pytest.fixture
def members(tiny_llama):
    """Of three lengths, and of different minds."""
    return {f"m{seed}": SoftPrompt(random_prompt(tiny_llama, 2 + seed, seed)) for seed in range(4)}


class TestVote:
    def test_votes_are_those_counted_by_hand(self):
        """Four prompts, four texts, three labels; votes 0 0 1 2 | 1 1 2 2 | 0 1 2 2 | 0 0 1 1."""
        scores_MNK = np.array(
            [
                [[-1, -5, -9], [-9, -1, -3], [-1, -2, -3], [-1, -2, -9]],
                [[-2, -3, -9], [-9, -2, -3], [-5, -1, -9], [-1, -2, -9]],
                [[-9, -1, -5], [-9, -3, -1], [-9, -9, -1], [-2, -1, -9]],
                [[-9, -5, -1], [-9, -8, -4], [-9, -9, -2], [-2, -1, -9]],
            ],
            dtype=float,
        )
        assert vote(scores_MNK) == [
            0,  # two votes, though label 1 has the larger sum: -14 against -21
            2,  # two all; -11 against -14
            2,  # two votes
            0,  # two all and -6 all: the earlier one
        ]
        assert scores_MNK.sum(axis=0).argmax(axis=1).tolist()[0] == 1  # the control: sums alone say otherwise

    def test_a_tie_is_broken_by_the_sum_over_all_and_among_the_tied_only(self):
        """Labels 0 and 1 have a vote each from two prompts; label 2 has none and the largest sum."""
        scores_MNK = np.array([[[-1.0, -4.0, -1.5]], [[-6.0, -1.0, -1.5]]])
        assert scores_MNK.sum(axis=0).argmax() == 2
        assert vote(scores_MNK) == [1]

    def test_a_single_member_is_its_own_majority(self):
        scores_MNK = np.array([[[-3.0, -1.0], [-1.0, -3.0]]])
        assert vote(scores_MNK) == [1, 0]


def slow_scores(base, rows, labels, prompt):
    """[N, K] by one plain forward per row and label."""
    found = []
    for record in rows.records:
        before = base.bos_ids + base.encode(f"w5 {record['text']} w6")
        ids = [base.encode(label) for label in labels]
        masks = [(False,) * len(before) + (True,) * len(own) for own in ids]
        found.append(
            [
                -float(plain_nats(base, before + own, mask, prompt.tensor).sum())
                for own, mask in zip(ids, masks, strict=True)
            ]
        )
    return np.array(found)


@pytest.mark.parametrize(("family", "labels"), [("llama", LABELS), ("gpt2", (" w68", " w81"))])
def test_scores_of_all_members_in_one_pass_are_those_of_each_alone(family, labels, request):
    base, rows = request.getfixturevalue(f"tiny_{family}"), labelled(labels)
    members = {f"m{seed}": SoftPrompt(random_prompt(base, 2 + seed, seed)) for seed in range(4)}
    scores_MNK = np.array([slow_scores(base, rows, labels, prompt) for prompt in members.values()])
    found = vote_accuracy(base, forward_of(base), "set", rows, "team", members)
    own = [i % len(labels) for i in range(24)]
    assert found.wrong_rows == tuple(i for i, guess in enumerate(vote(scores_MNK)) if guess != own[i])
    choices_MN = scores_MNK.argmax(axis=2).tolist()
    for name, choices in zip(members, choices_MN, strict=True):
        assert found.members[name] == sum(a == b for a, b in zip(choices, own, strict=True)) / 24
    assert len({tuple(choices) for choices in choices_MN}) > 1  # the control: they disagree


def test_a_vote_has_the_figures_of_any_contender(tiny_llama, rows, members):
    found = vote_accuracy(tiny_llama, forward_of(tiny_llama), "set", rows, "team", members)
    assert (found.held_out, found.prompt, found.num_rows, found.generated) == ("set", "team", 24, None)
    right = sum(found.confusion[label][label] for label in range(3))
    assert found.by_likelihood == right / 24
    assert right == 24 - len(found.wrong_rows)
    share, n, z = right / 24, 24, 1.959963984540054
    middle, scale = (share + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n)
    half = scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert isinstance(found.interval, Interval)
    assert (found.interval.low, found.interval.high) == pytest.approx((middle - half, middle + half))
    assert [item.support for item in found.classes] == [8, 8, 8]


def test_an_ensemble_of_one_prompt_scores_like_that_prompt(tiny_llama, rows, members):
    forward = forward_of(tiny_llama)
    for calibrate in (False, True):
        alone = accuracy(tiny_llama, forward, "set", rows, "m1", members["m1"], calibrate=calibrate)
        voted = vote_accuracy(tiny_llama, forward, "set", rows, "m1", {"m1": members["m1"]}, calibrate=calibrate)
        assert replace(alone, generated=None, members={"m1": alone.by_likelihood}) == voted


def test_each_member_is_calibrated_by_its_own_likelihoods(tiny_llama, rows, members):
    forward = forward_of(tiny_llama)
    voted = vote_accuracy(tiny_llama, forward, "set", rows, "team", members, calibrate=True)
    for name, prompt in members.items():
        alone = accuracy(tiny_llama, forward, "set", rows, name, prompt, calibrate=True)
        assert voted.members[name] == alone.by_likelihood
    plain = vote_accuracy(tiny_llama, forward, "set", rows, "team", members)
    assert voted.confusion != plain.confusion


class TestCompare:
    def test_an_ensemble_stands_behind_the_prompts_of_its_set(self, tiny_llama, rows, members):
        sets = {"one": rows, "texts": rows_from_texts(["w5 w6", "w7"]), "two": rows.select(range(9))}
        found = compare(tiny_llama, {"p": members["m0"]}, held_out=sets, ensembles={"team": members})
        assert [(item.held_out, item.prompt) for item in found.accuracies] == [
            (held_out, name) for held_out in ("one", "two") for name in (None, "p", "team")
        ]
        assert {loss.prompt for loss in found.losses} == {None, "p"}
        assert found.ensembles == {"team": 4}
        assert found.prompt_bytes == sum(prompt.num_bytes for prompt in members.values()) + members["m0"].num_bytes
        assert found.to_json()["accuracies"][2]["members"] == found.accuracies[2].members

    def test_tables_and_markdown_show_the_vote_and_its_members(self, tiny_llama, rows, members):
        found = compare(tiny_llama, {}, held_out={"set": rows}, ensembles={"team": members})
        item = found.accuracies[1]
        assert accuracy_tables(found)[0].rows[1][0] == "team"
        assert accuracy_tables(found)[0].rows[1][-1] == "-"
        (table,) = ensemble_tables(found)
        mean = sum(item.members.values()) / 4
        assert table.title == f"Members of team on set: 4 vote, {mean:.1%} on average"
        assert [row[0] for row in table.rows] == list(members)
        assert f"4 vote, {mean:.1%} on average" in to_markdown(found)
        assert "4 prompts of" in to_markdown(found)

    def test_the_longest_member_limits_the_length_of_rows(self, tiny_llama, rows):
        long = {"long": SoftPrompt(random_prompt(tiny_llama, 95))}
        with pytest.raises(LengthError, match="no text fits"):
            compare(tiny_llama, {}, held_out={"set": rows}, ensembles={"team": long})

    def test_an_ensemble_without_labels_to_vote_on_or_with_a_taken_name_is_refused(self, tiny_llama, members):
        texts = {"texts": rows_from_texts(["w5 w6"])}
        with pytest.raises(
            ConfigError, match=r"prompts of team vote on labels, and the held-out rows have none \(texts"
        ):
            compare(tiny_llama, {}, held_out=texts, ensembles={"team": members})
        with pytest.raises(ConfigError, match="there are no held-out rows"):
            compare(tiny_llama, {}, ["w5"], ensembles={"team": members})
        with pytest.raises(ConfigError, match="are both called 'm0'"):
            compare(tiny_llama, {"m0": members["m0"]}, held_out=texts, ensembles={"m0": members})
        with pytest.raises(ConfigError, match="is called 'base'"):
            compare(tiny_llama, {}, held_out=texts, ensembles={"base": members})
