"""Losses and outputs of rows that are read at columns, on decoders, whose states come from the packed forward.

The truth is transformers' own headed class over concatenated embeddings, one row at a time, and plain autograd.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as hf
from support.tiny_bases import build_base, random_ids, random_prompt
from torch.nn import functional

from softprompt.errors import BaseModelError, ConfigError
from softprompt.families import forward_of
from softprompt.loss import NO_LABEL, ObjectiveWeights, head_outputs, label_word_ids, objective, score_under
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row, column_states
from softprompt.types import Example, InputForm, PromptRecord

LABELS = ("bad", "fair", "good")
AUTO = {
    "classify": hf.AutoModelForSequenceClassification,
    "tag": hf.AutoModelForTokenClassification,
    "answer": hf.AutoModelForQuestionAnswering,
}
LENGTHS = (7, 3, 12, 5)


def headed_model(base, task, weights):
    """transformers' own class on the base's own backbone, with these weights of its head."""
    config = base.model.config.__class__(**{**base.model.config.to_dict(), "num_labels": 3 if task != "answer" else 2})
    model = AUTO[task].from_config(config).to(base.dtype).eval()
    setattr(model, model.base_model_prefix, base.model.base_model)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith(f"{model.base_model_prefix}.") for name in missing)
    return model


def form_of(task):
    return InputForm(task=task, labels=() if task in ("answer", "embed") else LABELS, pooling="last")


def rows_of(task):
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = random_ids(length, seed=number)
        columns = (length - 1,) if task == "classify" else tuple(range(length))
        labels = {"classify": (number % 3,), "answer": (1, length - 1)}.get(task, tuple(i % 3 for i in range(length)))
        if task == "tag":
            labels = (NO_LABEL, *labels[1:])
        rows.append(Row(ids, 0, columns=columns, labels=labels))
    return rows


def plain_outputs(model, base, prompt_PH, row):
    embeds = torch.cat([prompt_PH.to(base.dtype), base.embed(torch.tensor(row.ids))])[None]
    found = model(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long))
    if hasattr(found, "start_logits"):
        return torch.stack([found.start_logits[0], found.end_logits[0]], dim=-1)[len(prompt_PH) :]
    return found.logits[0] if found.logits.dim() == 2 else found.logits[0, len(prompt_PH) :]


def plain_nats(outputs, row, task):
    if task == "answer":
        start, end = row.labels
        return (functional.cross_entropy(outputs[None, :, 0], torch.tensor([start]))
                + functional.cross_entropy(outputs[None, :, 1], torch.tensor([end]))) / 2  # fmt: skip
    logits = outputs[None] if task == "classify" else outputs
    return functional.cross_entropy(logits, torch.tensor(row.labels), reduction="sum", ignore_index=NO_LABEL)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("task", ["classify", "tag", "answer"])
def test_outputs_losses_and_gradients_are_those_of_transformers_own_class(family, task):
    base = build_base(family, dtype=torch.float64)
    forward, rows = forward_of(base), rows_of(task)
    trained = objective(base, forward, form_of(task))
    start = {name: weight.double() for name, weight in trained.head.start(seed=3).items()}
    prompt_PH = random_prompt(base, 4).requires_grad_(True)
    weights = {name: weight.clone().requires_grad_(True) for name, weight in start.items()}
    states, owners = column_states(base, forward, rows, [prompt_PH])
    nats = trained.row_nats(states, owners, rows, weights)
    nats.sum().backward()

    model, truth_PH = headed_model(base, task, start), prompt_PH.detach().clone().requires_grad_(True)
    plain = [plain_outputs(model, base, truth_PH, row) for row in rows]
    truth = torch.stack([plain_nats(own, row, task) for own, row in zip(plain, rows, strict=True)])
    truth.sum().backward()

    for found, own in zip(trained.outputs(states, owners, rows, weights), plain, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(nats, truth, rtol=1e-9, atol=1e-9)
    close = {"rtol": 1e-4, "atol": 1e-6} if family == "llama" else {"rtol": 1e-8, "atol": 1e-9}  # its norms: float32
    torch.testing.assert_close(prompt_PH.grad, truth_PH.grad, **close)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, model.get_parameter(name).grad, **close)


def test_head_outputs_do_not_depend_on_the_batch(tiny_llama):
    forward, rows = forward_of(tiny_llama), rows_of("tag")
    head = objective(tiny_llama, forward, form_of("tag")).head.start(seed=1)
    prompt = SoftPrompt(random_prompt(tiny_llama, 3), PromptRecord(form=form_of("tag")), head)
    together = head_outputs(tiny_llama, forward, rows, prompt)
    for row, output in zip(rows, together, strict=True):
        assert output.shape == (len(row.columns), 3)
        torch.testing.assert_close(head_outputs(tiny_llama, forward, [row], prompt)[0], output, rtol=1e-5, atol=1e-5)
    cut = head_outputs(tiny_llama, forward, rows, prompt, max_slots=1)
    assert [own.shape for own in cut] == [own.shape for own in together]


def test_a_pooled_mean_is_the_head_of_the_mean_of_the_rows_states(tiny_llama):
    forward = forward_of(tiny_llama)
    trained = objective(tiny_llama, forward, dataclasses.replace(form_of("classify"), pooling="mean"))
    weights = trained.head.start(seed=1)
    rows = [Row(random_ids(length, seed=length), 0, columns=range(length), labels=(0,)) for length in (4, 6)]
    states, owners = column_states(tiny_llama, forward, rows, [random_prompt(tiny_llama, 3)])
    found = trained.outputs(states, owners, rows, weights)
    for own, output in zip(states.split([4, 6]), found, strict=True):
        torch.testing.assert_close(output, trained.head.logits(weights, own.mean(dim=0)[None])[0])


def test_embeddings_are_ranked_among_the_positives_and_negatives_of_the_step(tiny_llama):
    forward, generator = forward_of(tiny_llama), torch.Generator().manual_seed(0)
    trained = objective(tiny_llama, forward, InputForm(task="embed", pooling="last"))
    rows = [Row((5, 6), 0, columns=(1,), others=((7,), (8, 9))), Row((5, 7, 8), 0, columns=(2,), others=((9, 9),))]
    states = torch.randn(5, 16, generator=generator)
    owners = torch.tensor([0, 0, 0, 1, 1])
    anchors, positives, negatives = states[[0, 3]], states[[1, 4]], states[[2]]
    candidates = torch.cat([positives, negatives])
    cosines = functional.cosine_similarity(anchors[:, None], candidates[None], dim=-1)
    truth = functional.cross_entropy(20 * cosines, torch.tensor([0, 1]), reduction="none")
    torch.testing.assert_close(trained.row_nats(states, owners, rows, {}), truth)
    assert trained.is_joint
    vectors = trained.outputs(states, owners, rows, {})
    torch.testing.assert_close(torch.stack(vectors), functional.normalize(anchors))


def test_mean_embeddings_are_the_mean_over_each_texts_own_tokens(tiny_llama):
    trained = objective(tiny_llama, forward_of(tiny_llama), InputForm(task="embed", pooling="mean"))
    rows = [Row((5, 6), 0, columns=(0, 1), others=((7, 8, 9),)), Row((5, 7), 0, columns=(0, 1), others=((9,),))]
    states = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    owners = torch.tensor([0] * 5 + [1] * 3)
    means = [own.mean(dim=0) for own in states.split([2, 3, 2, 1])]
    cosines = functional.cosine_similarity(torch.stack(means[::2])[:, None], torch.stack(means[1::2])[None], dim=-1)
    truth = functional.cross_entropy(20 * cosines, torch.tensor([0, 1]), reduction="none")
    torch.testing.assert_close(trained.row_nats(states, owners, rows, {}), truth)


def test_validation_scores_rows_by_the_same_loss(tiny_llama):
    forward, rows = forward_of(tiny_llama), rows_of("classify")
    trained = objective(tiny_llama, forward, form_of("classify"))
    heads = [ObjectiveWeights(trained, trained.head.start(seed=1))]
    prompt = random_prompt(tiny_llama, 3)
    examples = [
        Example(ids=row.ids, target_mask=(False,) * len(row.ids), num_special=0, has_eos=False, row=number,
                columns=row.columns, labels=row.labels)
        for number, row in enumerate(rows)
    ]  # fmt: skip
    scores = score_under(tiny_llama, forward, [(each, 0) for each in examples], [prompt], heads)
    states, owners = column_states(tiny_llama, forward, rows, [prompt])
    truth = trained.row_nats(states, owners, rows, heads[0].weights)
    assert [score.text_nats for score in scores] == pytest.approx(truth.tolist(), rel=1e-5)


def test_a_prompt_that_generates_has_no_outputs_of_a_head(tiny_llama):
    prompt = SoftPrompt(random_prompt(tiny_llama, 2))
    with pytest.raises(ConfigError, match="trained to generate"):
        head_outputs(tiny_llama, forward_of(tiny_llama), [], prompt)


def test_a_family_without_a_head_for_the_task_is_refused_by_name():
    base = build_base("gptj")
    with pytest.raises(BaseModelError, match=r"tiny-gptj.*\(gptj\).*task tag.*TokenClassification"):
        objective(base, forward_of(base), form_of("tag"))


def test_label_words_need_tokens_of_their_own(tiny_llama):
    form = InputForm(task="cloze", template="{text} It was [MASK].", labels=("no", "yes"))
    words = dataclasses.replace(form, label_words=(("w5 w6", "w7"), ("w8",)))
    assert label_word_ids(tiny_llama, words) == ((5, 6, 7), (8,))
    with pytest.raises(ConfigError, match=r"label 'yes'.*'terrible'.*does not know"):
        label_word_ids(tiny_llama, dataclasses.replace(form, label_words=(("w5",), ("terrible",))))
    with pytest.raises(ConfigError, match="'no' and 'yes' have the same tokens"):
        label_word_ids(tiny_llama, dataclasses.replace(form, label_words=(("w5",), ("w5",))))
