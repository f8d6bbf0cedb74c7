"""Training on encoder-decoders: PEFT's run, plain concatenation on both sides, and what holds for every base."""

from dataclasses import replace

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from support.ready import ready_run
from support.seq2seq_bases import FAMILIES, PAD, build_model, build_seq2seq, plain_pair_logits
from support.slow_truth import TrueDouble, relative_error
from support.tiny_bases import random_ids, random_prompt
from torch.nn.utils.rnn import pad_sequence
from transformers import get_linear_schedule_with_warmup

from softprompt.config import TrainConfig
from softprompt.data import rows_from_records
from softprompt.errors import ConfigError, LengthError
from softprompt.families import forward_of
from softprompt.loss import score_examples
from softprompt.prompt import SoftPrompt
from softprompt.splice import target_states
from softprompt.training import Candidate, ResumePoint, train, train_together
from softprompt.training.step import accumulate_gradient

IGNORED = -100
FORM = {"template": "w5 {text} w6", "completion": " {answer}"}
WITH_DECODER = {"decoder_prompt": True, "reparameterisation": "none"}


def words(length, seed):
    return " ".join(f"w{max(token, 4)}" for token in random_ids(length, seed))


def rows_of(count, first=0):
    """Pairs of 1 to 11 words and of 1 to 5."""
    records = [
        {"text": words(1 + 7 * seed % 11, seed), "answer": words(1 + seed % 5, 70 + seed)}
        for seed in range(first, first + count)
    ]
    return rows_from_records(records, **FORM)


def config(**changes):
    return TrainConfig(**{"virtual_tokens": 4, "epochs": 2, "batch_rows": 8, **changes})


PLAIN = config(
    learning_rate=0.05, eos_weight=1.0, schedule="linear", reparameterisation="none", micro_batch_rows=3
)  # every target weighs 1, as it does for PEFT


def peft_run(family, base, ready):
    """PEFT over the same weights, from our start, over our rows in our order: losses, and the encoder's vectors."""
    start, plan = ready.trial.start, ready.trial.plan
    wanted = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=len(start))
    model = get_peft_model(build_model(family, dtype=torch.float64), wanted).eval()
    weight = torch.nn.Parameter(torch.cat([start, torch.ones_like(start)]).double())
    model.prompt_encoder["default"].embedding.weight = weight
    optimizer = torch.optim.AdamW([weight], lr=plan.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, plan.num_steps)
    losses = []
    for step in (step for steps in plan.epochs for step in steps):
        optimizer.zero_grad()
        loss = peft_loss(model, base, [ready.trial.examples[index] for index in step])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses, weight.detach()


def peft_loss(model, base, examples):
    sources, starts = [torch.tensor(each.source) for each in examples], base.decoder_start_ids
    ids = pad_sequence(sources, batch_first=True, padding_value=PAD)
    mask = pad_sequence([torch.ones_like(source) for source in sources], batch_first=True)
    written = pad_sequence([torch.tensor([*starts, *each.ids[:-1]]) for each in examples], batch_first=True)
    labels = pad_sequence([torch.tensor(each.ids) for each in examples], batch_first=True, padding_value=IGNORED)
    logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=written).logits[:, len(starts) - 1 :]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


PEFTS = [one for one in FAMILIES if one != "pegasus"]


@pytest.mark.parametrize(
    "family", [one if one == "t5" else pytest.param(one, marks=pytest.mark.medium) for one in PEFTS]
)
def test_the_same_start_rows_labels_and_optimiser_are_pefts_run(family):
    base, rows = build_seq2seq(family, dtype=torch.float64), rows_of(21)
    with TrueDouble():
        result = train(base, rows, PLAIN)
        losses, weight = peft_run(family, base, ready_run(base, rows, PLAIN))
    assert result.losses == pytest.approx(losses, rel=1e-6)
    assert relative_error(result.prompt.tensor.double(), weight[:4]) < 1e-6
    assert torch.equal(weight[4:], torch.ones_like(weight[4:])), "PEFT reads the encoder's half alone"
    assert relative_error(ready_run(base, rows, PLAIN).trial.start.double(), weight[:4]) > 0.01  # the control


def test_peft_leaves_out_the_scale_of_pegasus_embeddings_and_we_do_not():
    """Its encoder multiplies the embeddings of ids outside of their table; PEFT looks them up there."""
    base = build_seq2seq("pegasus", dtype=torch.float64)
    ready = ready_run(base, rows_of(5), PLAIN)
    example, start = ready.trial.examples[0], ready.trial.start
    model = get_peft_model(
        build_model("pegasus", dtype=torch.float64),
        PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
    ).eval()
    model.prompt_encoder["default"].embedding.weight = torch.nn.Parameter(torch.cat([start, start]).double())
    logits = plain_pair_logits(base, example.source, example.ids, start)
    truth = torch.nn.functional.cross_entropy(logits, torch.tensor(example.ids), reduction="sum")
    (score,) = score_examples(base, forward_of(base), [example], start)
    assert score.text_nats + score.eos_nats == pytest.approx(float(truth.detach()), rel=1e-9)
    theirs = peft_loss(model, base, [example]) * len(example.ids)
    assert abs(float(theirs.detach()) - float(truth.detach())) > 0.01


@pytest.mark.parametrize("family", ["t5", pytest.param("pegasus", marks=pytest.mark.medium)])
def test_prompts_for_both_sides_are_trained_as_plain_concatenation_trains_them(family):
    base, rows, settings = build_seq2seq(family, dtype=torch.float64), rows_of(9), replace(PLAIN, decoder_prompt=True)
    with TrueDouble():
        result, ready = train(base, rows, settings), ready_run(base, rows, settings)
        losses, weight = plain_run(base, ready)
    assert result.prompt.tensor.shape == (8, base.hidden_size)
    assert (result.prompt.num_virtual_tokens, result.prompt.num_decoder_tokens) == (4, 4)
    assert result.losses == pytest.approx(losses, rel=1e-6)
    assert relative_error(result.prompt.tensor.double(), weight) < 1e-6
    for half in (slice(0, 4), slice(4, 8)):  # the control: both moved
        assert relative_error(ready.trial.start[half].double(), weight[half]) > 0.01


def plain_run(base, ready):
    plan, weight = ready.trial.plan, torch.nn.Parameter(ready.trial.start.double().clone())
    optimizer = torch.optim.AdamW([weight], lr=plan.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, plan.num_steps)
    losses = []
    for step in (step for steps in plan.epochs for step in steps):
        optimizer.zero_grad()
        some = [ready.trial.examples[index] for index in step]
        parts = [
            torch.nn.functional.cross_entropy(
                plain_pair_logits(base, each.source, each.ids, weight[:4], weight[4:]), torch.tensor(each.ids),
                reduction="sum",
            )
            for each in some
        ]  # fmt: skip
        loss = torch.stack(parts).sum() / sum(len(each.ids) for each in some)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses, weight.detach()


def test_training_leaves_the_base_as_it_is_and_moves_the_prompt_alone():
    base = build_seq2seq()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    result = train(base, rows_of(12), config(decoder_prompt=True), validation=rows_of(4, 40))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert result.prompt.record.form.has_decoder_prompt
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize("changes", [{}, WITH_DECODER], ids=["encoder", "both"])
def test_micro_batches_are_the_whole_step(changes):
    base, rows = build_seq2seq(dtype=torch.float64), rows_of(12)
    with TrueDouble():
        whole, split = (train(base, rows, config(micro_batch_rows=count, **changes)) for count in (8, 3))
    assert split.losses == pytest.approx(whole.losses, rel=1e-6)
    assert relative_error(split.prompt.tensor, whole.prompt.tensor) < 1e-6


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.medium)])
def test_recomputed_layers_change_nothing_but_what_is_kept(family):
    base, rows = build_seq2seq(family), rows_of(8)
    settings = config(epochs=1, reparameterisation="none", decoder_prompt=True)
    kept = {}
    for checkpoint in (False, True):
        ready = ready_run(base, rows, replace(settings, checkpoint_layers=checkpoint))
        kept[checkpoint] = kept_for_backward(ready, checkpoint)
    plain, recomputed = (train(base, rows, replace(settings, checkpoint_layers=one)) for one in (False, True))
    assert relative_error(recomputed.prompt.tensor, plain.prompt.tensor) < 1e-5
    assert kept[True] < 0.5 * kept[False]


def kept_for_backward(ready, checkpoint):
    """Bytes that autograd keeps of a forward pass over the first step's rows."""
    base, kept = ready.loop.base, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prompt = ready.trial.prompt().requires_grad_(True)
        target_states(base, ready.loop.forward, ready.trial.next_rows()[0], [prompt], checkpoint=checkpoint)
    return sum(size for size, _ in kept.values())


def test_the_rows_of_two_processes_add_up_to_the_step_and_spare_forwards_add_nothing():
    base = build_seq2seq(dtype=torch.float64)
    rows, _ = ready_run(base, rows_of(7), config(batch_rows=7, decoder_prompt=True)).trial.next_rows()

    def gradient(mine, least_batches=0):
        prompt = random_prompt(base, 8).requires_grad_()
        list(accumulate_gradient(base, forward_of(base), [prompt], rows, 2, mine=mine, least_batches=least_batches))
        return prompt.grad

    with TrueDouble():
        whole = gradient(None)
        assert relative_error(gradient([0, 3, 4], 4) + gradient([1, 2, 5, 6]), whole) < 1e-9
        assert relative_error(gradient([0, 3, 4]), whole) > 1e-2  # the control


def candidates_of(rows, held_out):
    variants = [{}, {"seed": 1, "virtual_tokens": 2}, WITH_DECODER, {"reparameterisation": "low-rank", "bottleneck": 2}]
    return [
        Candidate(name=f"{number}", data=rows, validation=held_out, config=config(epochs=4, **changes))
        for number, changes in enumerate(variants)
    ]


def test_each_of_many_with_decoder_prompts_or_without_becomes_what_it_becomes_alone():
    base = build_seq2seq(dtype=torch.float64)
    candidates = candidates_of(rows_of(12), rows_of(4, 40))
    with TrueDouble():
        together = train_together(base, candidates)
        each_alone = [train_together(base, [candidate])[0] for candidate in candidates]
    for candidate, found, alone in zip(candidates, together, each_alone, strict=True):
        assert found.losses == pytest.approx(alone.losses, rel=1e-6)
        assert relative_error(found.prompt.tensor, alone.prompt.tensor) < 1e-6
        assert found.prompt.record.form.has_decoder_prompt == candidate.config.decoder_prompt


def test_a_halved_run_that_is_resumed_is_the_straight_one_to_the_bit():
    base, states = build_seq2seq(), []
    candidates = candidates_of(rows_of(12), rows_of(4, 40))

    def run(sink=None, resume=None):
        return train_together(base, candidates, halving=True, sink=sink, resume=resume)

    straight = run(lambda event: states.append(event.state) if isinstance(event, ResumePoint) else None)
    assert any(result.dropped_after for result in straight)
    for found, wanted in zip(run(resume=states[len(states) // 2]), straight, strict=True):
        assert torch.equal(found.prompt.tensor, wanted.prompt.tensor)
        assert found.validation_losses == wanted.validation_losses


def test_a_loss_among_labels_begins_at_the_decoders_first_word():
    base = build_seq2seq()
    records = [{"text": words(3, seed), "answer": f"w{60 + seed % 2}"} for seed in range(12)]
    settings = config(batch_rows=12, epochs=1)
    trial = ready_run(base, rows_from_records(records, **FORM), settings).trial
    assert trial.plan.task == "labels"
    assert all([branch.column for branch in each.branches] == [0] for each in trial.examples)
    nats = []
    for each in trial.examples:
        logits = plain_pair_logits(base, each.source, each.ids, trial.start)[0]
        nats.append(float(torch.logsumexp(logits[[60, 61]], 0) - logits[each.ids[0]]))
    result = train(base, rows_from_records(records, **FORM), settings)
    assert result.losses == pytest.approx([sum(nats) / len(nats)], rel=1e-4)


def test_starts_draw_on_both_sides_and_the_decoders_half_on_targets_alone():
    base = build_seq2seq()
    trial = ready_run(base, rows_of(12), config(virtual_tokens=30, decoder_prompt=True)).trial

    def tokens_of(vectors):
        return {int((base.embedding.weight - vector).abs().sum(1).argmin()) for vector in vectors}

    written = {token for each in trial.examples for token in each.ids[:-1]}
    read = {token for each in trial.examples for token in each.source[:-1]}
    first, second = tokens_of(trial.start[:30]), tokens_of(trial.start[30:])
    assert first <= read | written and first & read and first & written
    assert second <= written
    draws = ready_run(base, rows_of(12), config(init="random", decoder_prompt=True)).trial.start
    assert not torch.equal(draws[:4], draws[4:])


def test_a_prompt_is_trained_further_in_its_own_shape():
    base, rows = build_seq2seq(), rows_of(6)
    both = train(base, rows, config(epochs=1, **WITH_DECODER)).prompt
    further = train(base, rows, config(epochs=1, virtual_tokens=9, reparameterisation="none"), start=both).prompt
    assert further.tensor.shape == both.tensor.shape and further.record.form.has_decoder_prompt
    with pytest.raises(ConfigError, match="has no vectors for the decoder"):
        train(base, rows, config(decoder_prompt=True), start=SoftPrompt(both.tensor[:4]))


def test_prompt_and_text_beyond_the_positions_are_refused_for_either_side():
    base = build_seq2seq("bart")
    ready = ready_run(base, rows_of(6), config())
    for side in ("source", "ids"):
        longer = (7,) * (base.max_length - 3)
        example = replace(ready.trial.examples[0], ids=(7,), target_mask=(True,), has_eos=False)
        mask = {"target_mask": (True,) * len(longer)} if side == "ids" else {}
        data = replace(ready.trial.data, examples=(replace(example, **{side: longer}, **mask),))
        with pytest.raises(LengthError, match="more than the 96 positions"):
            train(base, data, config())
