"""Training of tasks that read hidden states: whole runs equal transformers' own classes over concatenated embeddings,
one row at a time, prompt and head moved by torch's AdamW."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers as hf
from peft import PromptTuningConfig, get_peft_model
from support.encoders import build_encoder
from support.ready import ready_run
from support.slow_truth import TrueDouble, relative_error
from support.tiny_bases import build_base
from torch import Tensor

from softprompt.config import TrainConfig
from softprompt.data import rows_from_records
from softprompt.errors import ConfigError, PromptError, StorageError
from softprompt.prompt import SoftPrompt
from softprompt.training import Alone, Candidate, ResumePoint, prepare, train, train_together

WORDS = ["bad", "good"]
TEXTS = [" ".join(f"w{10 + (7 * i + 3 * j) % 80}" for j in range(1 + i % 5)) for i in range(11)]
REVIEWS = [{"text": text, "label": WORDS[i % 2]} for i, text in enumerate(TEXTS)]
TAGGED = [
    {"tokens": text.split(), "tags": [("O", "PER", "LOC")[(i + j) % 3] for j, _ in enumerate(text.split())]}
    for i, text in enumerate(TEXTS)
]
QUESTIONS = [
    {"question": f"w{50 + i}", "context": f"{text} w9 w{20 + i} w8", "answer": f"w9 w{20 + i}"}
    for i, text in enumerate(TEXTS)
]
PAIRS = [{"anchor": text, "positive": f"w{20 + i} w{30 + i}", "negative": f"w{40 + i}"} for i, text in enumerate(TEXTS)]
CLOZE = rows_from_records(REVIEWS, template="{text} w9 [MASK] w8", completion="{label}")
DATA = {"classify": REVIEWS, "cloze": CLOZE, "tag": TAGGED, "answer": QUESTIONS, "embed": PAIRS}
CONFIG = TrainConfig(
    virtual_tokens=3,
    batch_rows=4,
    epochs=2,
    learning_rate=0.05,
    head_learning_rate=0.02,
    schedule="constant",
    averaging=0.0,
)


def config(task="auto", **changes):
    return dataclasses.replace(CONFIG, task=task, **changes)


def build(family, dtype=torch.float64):
    causal = family in ("gpt2", "llama")
    return build_base(family, dtype=dtype) if causal else build_encoder(family, dtype=dtype, words=WORDS)


HEADED = {
    "classify": hf.AutoModelForSequenceClassification,
    "tag": hf.AutoModelForTokenClassification,
    "answer": hf.AutoModelForQuestionAnswering,
}


class PlainRun:
    """The same run by transformers and torch alone, from the same start, in the same order of rows."""

    def __init__(self, base, ready):
        self.base, self.trial = base, ready.trial
        self.form = ready.trial.data.form
        self.prompt = ready.trial.start.double().clone().requires_grad_(True)
        self.model = self._model()
        head = {} if ready.trial.head() is None else ready.trial.head().weights
        own = dict(self.model.named_parameters())
        self.head = {name: own[name] for name in head}
        with torch.no_grad():
            for name, weight in head.items():
                own[name].copy_(weight)
                own[name].requires_grad_(True)

    def _model(self):
        if self.form.task not in HEADED:
            return self.base.model
        settings = copy.deepcopy(self.base.model.config)
        settings.num_labels = 2 if self.form.task == "answer" else len(self.form.labels)
        settings.pad_token_id = 0 if settings.pad_token_id is None else settings.pad_token_id
        model = HEADED[self.form.task].from_config(settings).double().eval().requires_grad_(False)
        model.base_model.load_state_dict(self.base.model.base_model.state_dict(), strict=False)
        return model

    def run(self):
        rates = self.trial.plan.config
        groups = [{"params": [self.prompt], "lr": rates.learning_rate}]
        groups += [{"params": list(self.head.values()), "lr": rates.head_learning_rate}] if self.head else []
        optimizer, losses = torch.optim.AdamW(groups, weight_decay=0.0), []
        for steps in self.trial.plan.epochs:
            for step in steps:
                optimizer.zero_grad()
                loss = self.loss([self.trial.examples[index] for index in step])
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        return losses

    def loss(self, examples) -> Tensor:
        if self.form.task == "embed":
            return self._ranking(examples)
        counts = [len(each.labels) if self.form.task == "tag" else 1 for each in examples]
        return sum(self.row_loss(each) * count for each, count in zip(examples, counts, strict=True)) / sum(counts)

    def embeds(self, ids, num_before) -> Tensor:
        text = self.base.embedding(torch.tensor(ids))
        return torch.cat([text[:num_before], self.prompt, text[num_before:]])[None]

    def slot(self, example, column):
        return column if column < example.num_before else column + len(self.prompt)

    def row_loss(self, example) -> Tensor:
        """By the class's own loss, where it reads what we do."""
        embeds = self.embeds(example.ids, example.num_before)
        if self.form.task == "classify" and self.form.pooling == "mean":
            states = self.model.base_model(inputs_embeds=embeds)[0][0]
            mean = states[[self.slot(example, column) for column in example.columns]].mean(dim=0)
            return torch.nn.functional.cross_entropy(self.model.classifier(mean)[None], torch.tensor(example.labels))
        if self.form.task == "classify":
            return self.model(inputs_embeds=embeds, labels=torch.tensor(example.labels)).loss
        if self.form.task == "tag":
            labels = torch.full((1, embeds.shape[1]), -100)
            for column, label in zip(example.columns, example.labels, strict=True):
                labels[0, self.slot(example, column)] = label
            return self.model(inputs_embeds=embeds, labels=labels).loss
        if self.form.task == "answer":
            return self._span_loss(embeds, example)
        logits = self.model(inputs_embeds=embeds).logits[0, self.slot(example, example.columns[0])]
        ids = [[int(self.base.tokenizer.convert_tokens_to_ids(w)) for w in words] for words in self.form.label_words]
        scores = torch.stack([logits[own].mean() for own in ids])
        return torch.nn.functional.cross_entropy(scores[None], torch.tensor(example.labels))

    def _span_loss(self, embeds, example):
        """Among the tokens of the context; transformers' own is among all tokens."""
        types = {}
        if self.base.second_type:
            num_first = len(self.prompt) + example.num_first
            types["token_type_ids"] = (torch.arange(embeds.shape[1]) >= num_first).long()[None]
        output = self.model(inputs_embeds=embeds, **types)
        slots = [self.slot(example, column) for column in example.columns]
        parts = zip((output.start_logits, output.end_logits), example.labels, strict=True)
        return sum(torch.nn.functional.cross_entropy(own[:, slots], torch.tensor([label])) for own, label in parts) / 2

    def _ranking(self, examples):
        texts = [[each.ids, *each.others] for each in examples]
        vectors = [
            [self._vector(ids, each.num_before) for ids in own] for own, each in zip(texts, examples, strict=True)
        ]
        anchors = torch.stack([own[0] for own in vectors])
        candidates = torch.stack([own[1] for own in vectors] + [own[2] for own in vectors])
        scores = 20 * anchors @ candidates.T
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(examples)))

    def _vector(self, ids, num_before):
        states = self.base.model.base_model(inputs_embeds=self.embeds(ids, num_before))[0][0]
        real = torch.cat([states[:num_before], states[num_before + len(self.prompt) :]])
        real = real[-1:] if self.form.pooling == "last" else real
        return torch.nn.functional.normalize(real.mean(dim=0), dim=0)


def assert_alike(ours, truth):
    """To 1e-6; a bias that no loss depends on (an answer's) stays within the optimiser's rounding of zero."""
    assert float((ours.double() - truth.double()).abs().max()) < 1e-6 * max(float(truth.abs().max()), 1e-2)


RUNS = [
    ("bert", "classify", {}), ("gpt2", "classify", {}), ("bert", "cloze", {"label_words": ("good=w15,w16", "bad=w17")}),
    ("roberta", "tag", {"placement": "front"}), ("bert", "answer", {}), ("bert", "embed", {}),
]  # fmt: skip
MORE_RUNS = [
    ("bert", "classify", {"pooling": "mean"}), ("bert", "classify", {"pooling": "peft"}), ("roberta", "classify", {}),
    ("roberta", "cloze", {"placement": "front"}), ("bert", "tag", {}), ("gpt2", "tag", {}), ("gpt2", "answer", {}),
    ("gpt2", "embed", {}), ("gpt2", "embed", {"pooling": "mean"}), ("roberta", "embed", {"placement": "front"}),
]  # fmt: skip
REPEATED = [pytest.param(task, marks=pytest.mark.medium) for task in ("cloze", "tag", "answer", "embed")]


@pytest.mark.parametrize(
    ("family", "task", "changes"), [*RUNS, *(pytest.param(*run, marks=pytest.mark.medium) for run in MORE_RUNS)]
)
def test_a_whole_run_equals_transformers_own_classes_over_concatenated_embeddings(family, task, changes):
    base, settings = build(family), config(task, micro_batch_rows=3, **changes)
    with TrueDouble():
        ready = ready_run(base, DATA[task], settings)
        plain = PlainRun(base, ready)
        losses = plain.run()
        ours = train(base, DATA[task], settings)
    assert ours.losses == pytest.approx(losses, rel=1e-6)
    assert relative_error(ours.prompt.tensor, plain.prompt.detach().float()) < 1e-6
    assert ours.prompt.head.keys() == plain.head.keys()
    for name, weight in ours.prompt.head.items():
        assert_alike(weight, plain.head[name].detach())
    assert relative_error(ready.trial.start.float(), plain.prompt.detach().float()) > 1e-3  # the control: it moved


def test_a_whole_run_equals_pefts_where_that_pools_the_first_virtual_token():
    """Batches padded on the right; PEFT's own forward, and its own AdamW groups."""
    base, settings = build("bert"), config(pooling="peft", head_learning_rate=0.05)
    with TrueDouble():
        ready = ready_run(base, REVIEWS, settings)
        plain = PlainRun(base, ready)
        peft = (
            get_peft_model(plain.model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).double().eval()
        )
        embedding = peft.prompt_encoder["default"].embedding
        embedding.weight = torch.nn.Parameter(ready.trial.start.double().clone())
        head = dict(ready.trial.head().weights)
        own = {name: next(p for full, p in peft.named_parameters() if _is_trained(full, name)) for name in head}
        for name, weight in head.items():
            own[name].data = weight.double().clone()
            own[name].requires_grad_(True)
        optimizer = torch.optim.AdamW([embedding.weight, *own.values()], lr=0.05, weight_decay=0.0)
        for step in (step for steps in ready.trial.plan.epochs for step in steps):
            rows = [torch.tensor(ready.trial.examples[index].ids) for index in step]
            batch = {
                "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
                "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True),
                "labels": torch.tensor([ready.trial.examples[index].labels[0] for index in step]),
            }
            optimizer.zero_grad()
            peft(**batch).loss.backward()
            optimizer.step()
        ours = train(base, REVIEWS, settings)
    assert relative_error(ours.prompt.tensor, embedding.weight.detach().float()) < 1e-6
    for name, weight in ours.prompt.head.items():
        assert_alike(weight, own[name].detach())


def _is_trained(full, name):
    """PEFT's copy of a module that is saved, or the module where PEFT has none."""
    module, _, parameter = name.rpartition(".")
    return full.endswith((f"{module}.modules_to_save.default.{parameter}", f"base_model.{name}"))


@pytest.mark.parametrize("task", ["classify", *REPEATED])
def test_the_base_is_bit_identical_after_training(task):
    base = build("bert", torch.float32)
    before = copy.deepcopy(base.model.state_dict())
    train(base, DATA[task], config(task), validation=DATA[task])
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize("task", ["classify", *REPEATED])
def test_a_resumed_run_equals_the_unbroken_one_to_the_bit_head_included(task):
    base, seen, settings = build("bert", torch.float32), [], config(task, averaging=0.5, save_every=2)
    straight = train(base, DATA[task], settings, validation=DATA[task], sink=seen.append)
    states = [event.state for event in seen if isinstance(event, ResumePoint)]
    for state in (states[0], states[-2]):
        resumed = train(base, DATA[task], settings, validation=DATA[task], resume=state)
        assert resumed.prompt.content_hash == straight.prompt.content_hash
        assert (resumed.losses, resumed.validation_losses) == (straight.losses, straight.validation_losses)
    with pytest.raises(StorageError, match="of another run"):
        train(base, DATA[task], config(task, placement="front", averaging=0.5, save_every=2), resume=states[0])


def test_prompts_of_many_tasks_become_together_what_they_become_alone():
    base = build("bert")
    candidates = [
        Candidate(name=task, data=data, config=config(task, virtual_tokens=2 + i), validation=data)
        for i, (task, data) in enumerate(DATA.items())
    ]
    candidates.append(Candidate(name="front", data=REVIEWS, config=config(placement="front"), validation=REVIEWS))
    for candidate, found in zip(candidates, train_together(base, candidates), strict=True):
        (alone,) = train_together(base, [candidate])
        assert relative_error(found.prompt.tensor, alone.prompt.tensor) < 1e-6
        assert found.losses == pytest.approx(alone.losses, rel=1e-6)
        found_by, by = ([loss for _, loss in each.validation_losses] for each in (found, alone))
        assert found_by == pytest.approx(by, rel=1e-6)
        for name, weight in alone.prompt.head.items():
            assert_alike(found.prompt.head[name], weight)


class TestFurtherTraining:
    @pytest.fixture(scope="class")
    def base(self):
        return build("bert", torch.float32)

    @pytest.fixture(scope="class")
    def first(self, base):
        return train(base, REVIEWS, config(placement="front", pooling="mean")).prompt

    def test_a_prompt_with_a_head_goes_on_from_both_as_it_was_trained(self, base, first):
        ready = ready_run(base, REVIEWS, config(), start=first)
        assert torch.equal(ready.trial.start, first.tensor)
        weights = ready.trial.head().weights
        assert all(torch.equal(weights[name], weight) for name, weight in first.head.items())
        form = ready.trial.data.form
        assert (form.placement, form.pooling) == ("front", "mean")
        assert ready.trial.record.parent == first.content_hash

    def test_its_labels_keep_their_numbers(self, base, first):
        three = [*REVIEWS, {"text": "w9", "label": "a"}, {"text": "w8", "label": "a"}]
        prompt = train(base, three, config()).prompt
        assert prompt.record.form.labels == ("a", "bad", "good")
        data = ready_run(base, REVIEWS, config(), start=prompt).trial.data
        assert {each.labels[0] for each in data.examples} == {1, 2}
        assert data.form.labels == ("a", "bad", "good")
        with pytest.raises(PromptError, match="has a head for the labels 'bad', 'good', and the data has 'a' too"):
            train(base, three, config(), start=first)

    def test_another_task_than_its_own_is_refused(self, base, first):
        with pytest.raises(ConfigError, match="task is 'tag', but the prompt to start from was trained for 'classify'"):
            train(base, TAGGED, config("tag"), start=first)

    def test_a_prompt_without_a_head_gets_a_new_one(self, base, first):
        bare = SoftPrompt(first.tensor)
        ready = ready_run(base, REVIEWS, config(), start=bare)
        assert torch.equal(ready.trial.start, first.tensor) and ready.trial.head().weights


class TestStarts:
    @pytest.mark.parametrize("task", ["cloze", *(case for case in REPEATED if case.values != ("cloze",))])
    @pytest.mark.parametrize("init", ["data", "labels", "vocab", "text"])
    def test_each_start_works_on_each_task_and_draws_on_its_text(self, task, init):
        base = build("bert", torch.float32)
        settings = config(task, init=init, init_text="w9 w8 w7" if init == "text" else None)
        if init == "labels" and task in ("answer", "embed"):
            with pytest.raises(ConfigError, match="init 'labels' needs a set with labels"):
                ready_run(base, DATA[task], settings)
            return
        start = ready_run(base, DATA[task], settings).trial.start
        special = base.embed(torch.tensor([*base.bos_ids, *base.end_ids, base.mask_id]))
        assert start.shape == (3, base.hidden_size)
        assert not any(torch.equal(own, other) for own in start for other in special)

    def test_labels_of_a_cloze_start_from_their_words(self):
        base = build("bert", torch.float32)
        settings = config("cloze", init="labels", label_words=("good=w15", "bad=w17"))
        start = ready_run(base, CLOZE, settings).trial.start
        assert torch.equal(start[:2], base.embed(torch.tensor([17, 15])))


class Ranked(Alone):
    """One of two processes."""

    def __init__(self, in_step=False):
        self.in_step = in_step
        self.count = 2


class TestRefusals:
    def test_a_loss_among_labels_is_of_generation(self):
        with pytest.raises(ConfigError, match="loss is 'labels', but task 'classify' has a loss of its own"):
            train(build("bert"), REVIEWS, config(loss="labels"))

    def test_an_encoder_is_not_sharded(self):
        with pytest.raises(ConfigError, match="is an encoder, which is not sharded over processes"):
            prepare(build("bert"), [Candidate(data=REVIEWS, config=config())], ranks=Ranked(in_step=True))

    def test_negatives_of_a_step_are_of_one_process(self):
        with pytest.raises(ConfigError, match=r"task 'embed' compares each row .* train it in one process"):
            prepare(build("bert"), [Candidate(data=PAIRS, config=config())], ranks=Ranked())

    def test_a_prompt_and_a_text_beyond_the_positions_are_cut_to_fit(self):
        base = build("bert", torch.float32)
        long = [{**row, "text": "w9 " * 200} for row in REVIEWS]
        data = ready_run(base, long, config(virtual_tokens=20)).trial.data
        assert max(len(each.ids) for each in data.examples) == base.max_length - 20

    @pytest.mark.parametrize(
        ("words", "message"),
        [(("good=nothing",), "the tokenizer of base 'tiny-bert' does not know"), (("good=bad",), "the same tokens")],
    )
    def test_label_words_that_do_not_do(self, words, message):
        with pytest.raises(ConfigError, match=message):
            train(build("bert"), CLOZE, config(label_words=words))


def test_one_line_says_the_task_and_what_is_read():
    lines = {task: ready_run(build("bert"), data, config(task)).trial.task_line for task, data in DATA.items()}
    assert lines["classify"].startswith(
        "task: classify (2 labels, 11 rows): a fitted head over [CLS] at rate 0.02, virtual "
    )
    assert lines["cloze"].startswith("task: cloze (2 labels, 11 rows): loss among the label words at the mask, virtual")
    assert lines["tag"].startswith("task: tag (3 tags, 11 rows): a head at rate 0.02, virtual tokens behind [CLS]")
    assert lines["answer"].startswith("task: answer (11 rows with a question and a context): a head at rate 0.02")
    assert "loss among the rows of a step over the mean over the text" in lines["embed"]
