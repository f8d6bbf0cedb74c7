"""Encoder-decoders in every evaluation: losses and label likelihoods are plain transformers', answers the engine's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.seq2seq_bases import build_seq2seq, plain_pair_logits
from support.tiny_bases import random_ids, random_prompt

from softprompt.config import SamplingConfig, ScoreConfig, TrainConfig
from softprompt.data import build_examples, rows_from_records
from softprompt.data.rows import with_labels
from softprompt.evaluation import accuracy, compare, judge, label_answers, likeliest_labels
from softprompt.evaluation.classification import label_scores
from softprompt.evaluation.heldout import held_out_losses, leave_one_out
from softprompt.families import forward_of
from softprompt.prompt import SoftPrompt
from softprompt.training import train
from softprompt.types import InputForm, PromptRecord

FORM = {"template": "w5 {text}", "completion": " {label}"}
LABELS = (" w60", " w61 w62", " w61 w63")


def words(length, seed):
    return " ".join(f"w{token}" for token in random_ids(length, seed))


def rows_of(count):
    records = [{"text": words(1 + seed % 7, seed), "label": LABELS[seed % 3].strip()} for seed in range(count)]
    return with_labels(rows_from_records(records, **FORM))


@pytest.fixture(scope="module")
def base():
    return build_seq2seq()


@pytest.fixture(scope="module")
def prompts(base):
    """One for the encoder, and one for both sides."""
    form = InputForm(kind="template", **FORM, labels=LABELS)
    both = PromptRecord(form=replace(form, has_decoder_prompt=True))
    return {
        "one": SoftPrompt(random_prompt(base, 4), PromptRecord(form=form)),
        "both": SoftPrompt(random_prompt(base, 4, 1), both),
    }


def halves(prompt):
    if prompt is None:
        return None, None
    count = prompt.num_virtual_tokens
    return prompt.tensor[:count], prompt.tensor[count:] if prompt.num_decoder_tokens else None


def plain_nats(base, source, ids, prompt):
    logits = plain_pair_logits(base, source, ids, *halves(prompt))
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum").detach())


def source_of(base, text):
    return tuple(base.tokenizer(f"w5 {text}")["input_ids"])


def test_label_likelihoods_are_plain_transformers_under_each_prompt_and_none(base, prompts):
    texts = [words(3, 1), words(6, 2)]
    contenders = [None, prompts["one"], prompts["both"]]
    found = label_scores(base, forward_of(base), [f"w5 {text}" for text in texts], LABELS, contenders)
    truth = [
        [[-plain_nats(base, source_of(base, text), base.encode(label), one) for label in LABELS] for text in texts]
        for one in contenders
    ]
    assert found == pytest.approx(np.array(truth), rel=1e-5)
    assert not np.allclose(found[1], found[2]) and not np.allclose(found[0], found[1])  # the control


def test_held_out_losses_are_plain_transformers_whatever_the_examples_were_built_for(base, prompts):
    examples = build_examples(base, rows_of(6), eos=True, max_length=40)
    losses = held_out_losses(base, forward_of(base), prompts, {"rows": examples})
    for loss, prompt in zip(losses, (None, *prompts.values()), strict=True):
        nats = [plain_nats(base, each.source, each.ids, prompt) for each in examples.examples]
        num = sum(len(each.ids) for each in examples.examples)
        assert loss.loss * loss.num_tokens + loss.eos_loss * len(nats) == pytest.approx(sum(nats), rel=1e-5)
        assert loss.num_tokens + len(nats) == num  # the first word of an answer counts: the start token precedes it


@pytest.mark.parametrize("name", ["one", "both"])
def test_each_vector_of_either_side_is_left_out(base, prompts, name):
    prompt = prompts[name]
    examples = build_examples(base, rows_of(4), eos=False, max_length=40).examples
    worth = leave_one_out(base, forward_of(base), examples, prompt)
    assert len(worth.left_out) == 4
    count = prompt.num_virtual_tokens
    for item in worth.left_out:
        kept = [token for token in range(4) if token != item.token]
        encoder = prompt.tensor[[token for token in kept if token < count]]
        decoder = prompt.tensor[[token for token in kept if token >= count]] if name == "both" else None
        nats = [
            torch.nn.functional.cross_entropy(
                plain_pair_logits(base, each.source, each.ids, encoder, decoder), torch.tensor(each.ids),
                reduction="sum",
            )
            for each in examples
        ]  # fmt: skip
        assert item.loss == pytest.approx(float(sum(nats).detach()) / worth.num_tokens, rel=1e-5)


def test_accuracy_counts_likeliest_labels_and_greedy_answers_calibrated_or_not(base, prompts):
    rows, forward = rows_of(6), forward_of(base)
    for prompt in (None, *prompts.values()):
        found = accuracy(base, forward, "rows", rows, None, prompt)
        truth = [
            min(LABELS, key=lambda label: plain_nats(base, source_of(base, row["text"]), base.encode(label), prompt))
            for row in rows.records
        ]
        right = [label.strip() == row["label"] for label, row in zip(truth, rows.records, strict=True)]
        assert found.by_likelihood == pytest.approx(sum(right) / len(right))
        assert found.generated is not None
        calibrated = accuracy(base, forward, "rows", rows, None, prompt, calibrate=True)
        assert calibrated.calibrated


def test_a_long_text_loses_its_end_as_in_training(base):
    bart = build_seq2seq("bart")
    long = " ".join(["w7"] * 200)
    (label,) = likeliest_labels(bart, forward_of(bart), [long], LABELS, None)
    limit = bart.max_length
    source = (*bart.bos_ids, *bart.encode(long)[: limit - 2], *bart.end_ids)
    nats = [plain_nats(bart, source, bart.encode(own), None) for own in LABELS]
    assert label == nats.index(min(nats))


def test_label_answers_have_the_log_probabilities_of_their_tokens(base, prompts):
    prompt = prompts["both"]
    (answer,) = label_answers(base, ["w5 w9 w10"], LABELS, prompt)
    assert answer.ids == base.encode(answer.label)
    nats = plain_nats(base, source_of(base, "w9 w10"), answer.ids, prompt)
    assert sum(answer.log_probs) == pytest.approx(-nats, rel=1e-5)


@pytest.mark.medium
def test_prompts_are_compared_on_answers_losses_labels_and_scores(base, prompts):
    pytest.importorskip("torchmetrics")
    found = compare(
        base, prompts, [{"text": "w9 w10"}], held_out={"rows": rows_of(6)}, sampling=SamplingConfig(max_new_tokens=4),
        scoring=ScoreConfig(score=("exact_match",), calibrate=True),
    )  # fmt: skip
    assert set(found.answered[0].answers) == {None, "one", "both"}
    assert [loss.prompt for loss in found.losses] == [None, "one", "both"]
    assert len(found.accuracies) == len(found.scores) == 3


def test_a_trained_prompt_is_judged_beside_the_bare_base(base):
    rows = rows_of(12)
    result = train(base, rows, TrainConfig(virtual_tokens=3, epochs=1, decoder_prompt=True), validation=rows)
    verdict = judge(base, replace(rows, form=result.prompt.record.form), result.prompt, "loss", train_rows=12)
    assert verdict.measure == "accuracy" and verdict.rows == 12
