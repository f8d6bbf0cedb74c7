"""Losses and outputs of rows that are read at columns.

The truth is transformers' own headed class over concatenated embeddings, one row at a time, and plain autograd.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as hf
from support.encoders import ENCODERS, ROBERTA_SPECIAL, build_encoder
from support.headed_models import headed_model
from support.tiny_bases import VOCAB, build_base, random_ids, random_prompt
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional

from softprompt.base import freeze_base
from softprompt.errors import BaseModelError, ConfigError
from softprompt.families import forward_of
from softprompt.loss import NO_LABEL, ObjectiveWeights, head_outputs, label_word_ids, num_labels, objective, score_under
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row, column_states
from softprompt.types import Example, InputForm, PromptRecord

LABELS = ("bad", "fair", "good")
LENGTHS = (7, 3, 12, 5)


def form_of(task):
    return InputForm(task=task, labels=() if task in ("answer", "embed") else LABELS, pooling="last")


def rows_of(task, is_encoder=False):
    """The prompt in front; of an encoder [CLS], with id 2, is read."""
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = (2, *random_ids(length - 1, seed=number))
        read = (0,) if is_encoder else (length - 1,)
        columns = read if task == "classify" else tuple(range(length))
        labels = {"classify": (number % 3,), "answer": (1, length - 1)}.get(task, tuple(i % 3 for i in range(length)))
        if task == "tag":
            labels = (NO_LABEL, *labels[1:])
        rows.append(Row(ids, 0, columns=columns, labels=labels, is_span=task == "answer"))
    return rows


def base_of(family, dtype=torch.float32):
    return build_encoder(family, dtype=dtype, part="bare") if family in ENCODERS else build_base(family, dtype=dtype)


def plain_outputs(model, base, prompt_PH, row):
    """The row alone, its embeddings concatenated; the virtual tokens stand behind [CLS] where that is read."""
    embeds, is_behind = base.embed(torch.tensor(row.ids)), tuple(row.columns) == (0,)
    parts = [embeds[:1], prompt_PH, embeds[1:]] if is_behind else [prompt_PH, embeds]
    embeds = torch.cat([part.to(base.dtype) for part in parts])[None]
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


CASES = [(family, task) for family in ("gpt2", "llama", *ENCODERS) for task in ("classify", "tag", "answer")]
QUICK = ("gpt2", "llama", "bert", "roberta", "deberta-v3", "modernbert")
TOLERANCES = {  # norms and rotary positions of these are float32, whatever the base's dtype
    "llama": {"rtol": 1e-4, "atol": 1e-6},
    "modernbert": {"rtol": 1e-4, "atol": 1e-5},
    "deberta": {"rtol": 1e-4, "atol": 1e-5},
}


@pytest.mark.parametrize(
    ("family", "task"),
    [case if case[0] in QUICK else pytest.param(*case, marks=pytest.mark.medium) for case in CASES],
)
def test_outputs_losses_and_gradients_are_those_of_transformers_own_class(family, task):
    base = base_of(family, torch.float64)
    close = TOLERANCES.get(family, {"rtol": 1e-8, "atol": 1e-9})
    model = headed_model(base, task)
    forward, trained = forward_of(base), objective(base, forward_of(base), form_of(task))
    start = {name: model.get_parameter(name).detach().clone() for name in trained.head.start(seed=3)}
    rows = [
        dataclasses.replace(row, num_before=int(tuple(row.columns) == (0,)))
        for row in rows_of(task, base.kind == "encoder")
    ]
    prompt_PH = random_prompt(base, 4).requires_grad_(True)
    weights = {name: weight.clone().requires_grad_(True) for name, weight in start.items()}
    states, owners = column_states(base, forward, rows, [prompt_PH])
    nats = trained.row_nats(states, owners, rows, weights)
    nats.sum().backward()

    truth_PH = prompt_PH.detach().clone().requires_grad_(True)
    for name in weights:
        model.get_parameter(name).requires_grad_(True)
    plain = [plain_outputs(model, base, truth_PH, row) for row in rows]
    truth = torch.stack([plain_nats(own, row, task) for own, row in zip(plain, rows, strict=True)])
    truth.sum().backward()

    for found, own in zip(trained.outputs(states, owners, rows, weights), plain, strict=True):
        torch.testing.assert_close(found, own, **close)
    torch.testing.assert_close(nats, truth, **close)
    torch.testing.assert_close(prompt_PH.grad, truth_PH.grad, **close)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, model.get_parameter(name).grad, **close)
    other = torch.stack([plain_nats(plain_outputs(model, base, 0 * truth_PH, row), row, task) for row in rows])
    assert (other - truth).abs().max() > 1e-3, "the control must fail"


@pytest.mark.parametrize(
    "family", [*QUICK[2:], *(pytest.param(name, marks=pytest.mark.medium) for name in ENCODERS if name not in QUICK)]
)
def test_cloze_reads_the_models_own_logits_of_the_label_words_at_the_mask(family):
    base = build_encoder(family, dtype=torch.float64)
    close = TOLERANCES.get(family, {"rtol": 1e-8, "atol": 1e-9})
    form = InputForm(task="cloze", labels=("no", "yes"), label_words=(("w20",), ("w21 w22", "w23")))
    trained = objective(base, forward_of(base), form)
    first, last = base.bos_ids[0], base.end_ids[-1]
    rows = [
        Row((first, *ids, base.mask_id, last), 0, columns=(len(ids) + 1,), labels=(number % 2,), num_before=1)
        for number, ids in enumerate((random_ids(5, seed=1), random_ids(2, seed=2), ()))
    ]
    prompt_PH, truth_PH = (random_prompt(base, 3).requires_grad_(True) for _ in range(2))
    states, owners = column_states(base, forward_of(base), rows, [prompt_PH])
    nats = trained.row_nats(states, owners, rows, {})
    nats.sum().backward()
    truth = []
    for row, own in zip(rows, trained.outputs(states, owners, rows, {}), strict=True):
        embeds = base.embed(torch.tensor(row.ids))
        embeds = torch.cat([embeds[:1], truth_PH.to(base.dtype), embeds[1:]])[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        logits = base.model(inputs_embeds=embeds, attention_mask=mask).logits[0, row.columns[0] + 3]
        plain = torch.stack([logits[20], logits[[21, 22, 23]].mean()])
        torch.testing.assert_close(own, plain, **close)
        truth.append(functional.cross_entropy(plain[None], torch.tensor(row.labels)))
    torch.stack(truth).sum().backward()
    torch.testing.assert_close(nats, torch.stack(truth), **close)
    torch.testing.assert_close(prompt_PH.grad, truth_PH.grad, **close)


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


def byte_pair_base():
    """RoBERTa over a tokenizer of GPT-2's kind, in which a space belongs to the word behind it."""
    base = build_encoder("roberta")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = [*ROBERTA_SPECIAL, *sorted(alphabet)[:60]]
    words = ["great", "\u0120great", "bad", "\u0120bad"]
    pieces = {name: index for index, name in enumerate(dict.fromkeys([*names, *words, *"greatbd", "\u0120", "."]))}
    merges = []
    for word in ("great", "bad"):
        for end in range(1, len(word)):
            pieces.setdefault(word[: end + 1], len(pieces))
            merges.append((word[:end], word[end]))
        merges.append(("\u0120", word))
    assert len(pieces) <= VOCAB
    tokenizer = Tokenizer(models.BPE(pieces, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", mask_token="<mask>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip
    return freeze_base(base.model, fast, name="byte-pair"), pieces


def test_label_words_are_written_as_the_template_has_them_before_the_mask():
    """Behind a space a byte-level tokenizer has other tokens than at the start of a text, or behind a bracket."""
    base, pieces = byte_pair_base()
    for template, mark in [
        ("{text} It was [MASK].", "\u0120"),
        ("{text} It was\n<mask>.", "\u0120"),
        ("[MASK] is what it was: {text}", ""),
        ("{text} (<mask>)", ""),
    ]:
        form = InputForm(task="cloze", template=template, labels=("a", "b"), label_words=(("great",), ("bad",)))
        assert label_word_ids(base, form) == ((pieces[f"{mark}great"],), (pieces[f"{mark}bad"],)), template


def test_label_words_need_tokens_of_their_own(tiny_llama):
    form = InputForm(task="cloze", template="{text} It was [MASK].", labels=("no", "yes"))
    words = dataclasses.replace(form, label_words=(("w5 w6", "w7"), ("w8",)))
    assert label_word_ids(tiny_llama, words) == ((5, 6, 7), (8,))
    with pytest.raises(ConfigError, match=r"label 'yes'.*'terrible'.*does not know"):
        label_word_ids(tiny_llama, dataclasses.replace(form, label_words=(("w5",), ("terrible",))))
    with pytest.raises(ConfigError, match="'no' and 'yes' have the same tokens"):
        label_word_ids(tiny_llama, dataclasses.replace(form, label_words=(("w5",), ("w5",))))


def test_an_answer_counts_once_however_many_words_its_context_has():
    span = Row(random_ids(2, seed=0), 0, columns=(0, 1), labels=(0, 1), is_span=True)
    tags = Row(random_ids(2, seed=0), 0, columns=(0, 1), labels=(NO_LABEL, 1))
    assert [num_labels(row) for row in (span, dataclasses.replace(span, is_span=False), tags)] == [1, 2, 1]
