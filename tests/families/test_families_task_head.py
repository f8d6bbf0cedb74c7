"""A head over given states is transformers' own headed model over its backbone's, family by family."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support.encoders import ENCODERS, build_encoder, build_encoder_tokenizer, save_encoder
from support.headed_models import AUTO, headed_model, outputs_of
from support.seq2seq_bases import build_seq2seq
from support.tiny_bases import FAMILIES, VOCAB, build_base

from softprompt.base import freeze_base, load_base
from softprompt.errors import AdapterError, BaseModelError, ConfigError
from softprompt.families.task_head import MOST_MODELS, TaskHead, task_head
from softprompt.types import InputForm

IDS = torch.tensor([[2, 7, 9, 33, 20, 3]])
LABELS = ("a", "b", "c")


def base_of(family):
    return build_encoder(family, part="bare") if family in ENCODERS else build_base(family)


def weights_of(model, head):
    return {name: model.get_parameter(name).clone() for name in head.start(seed=0)}


QUICK = ("bert", "roberta", "distilbert", "albert", "deberta-v2", "modernbert", "gpt2", "llama", "opt_projected")


@pytest.mark.parametrize(
    "family",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.medium) for name in (*ENCODERS, *FAMILIES)],
)
@pytest.mark.parametrize("task", ["classify", "tag", "answer"])
def test_a_heads_logits_are_those_of_transformers_headed_model(family, task):
    base = base_of(family)
    form = InputForm(task=task, labels=LABELS)
    if type(base.model.config) not in AUTO[task]._model_mapping:
        with pytest.raises(BaseModelError, match=f"task {task}: transformers has no AutoModelFor.* of its family$"):
            task_head(base, form)
        return
    head, model = task_head(base, form), headed_model(base, task)
    with torch.no_grad():
        states = model.base_model(input_ids=IDS)[0][0]
    truth = outputs_of(model, input_ids=IDS)[0]
    read = states[[0 if head.position == "first" else -1]] if task == "classify" else states
    found = head.logits(weights_of(model, head), read)
    torch.testing.assert_close(found[0] if task == "classify" else found, truth, rtol=1e-4, atol=1e-5)
    assert found.shape[-1] == (2 if task == "answer" else 3)


@pytest.mark.parametrize(("family", "position"), [("bert", "first"), ("deberta-v2", "first"), ("llama", "last")])
def test_the_state_that_transformers_reads_is_found(family, position):
    assert task_head(base_of(family), InputForm(task="classify", labels=LABELS)).position == position


def test_a_class_that_reads_a_mean_is_found():
    base = build_encoder("modernbert", classifier_pooling="mean")
    assert task_head(base, InputForm(task="classify", labels=LABELS)).position == "mean"


def test_a_class_that_reads_none_of_them_has_a_head_over_one_state_all_the_same():
    """EuroBERT's averages the logits of its tokens, behind an activation; of one state that is the state's."""
    settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 4, "num_key_value_heads": 2}
    config = hf.EuroBertConfig(vocab_size=VOCAB, classifier_pooling="late", initializer_range=0.25, **settings)
    base = freeze_base(hf.EuroBertModel(config), build_encoder_tokenizer(), name="tiny-eurobert")
    head = task_head(base, InputForm(task="classify", labels=LABELS, pooling="mean"))
    assert head.logits(head.start(0), torch.ones(2, 16)).shape == (2, 3)
    with pytest.raises(BaseModelError, match="reads neither the first nor the last state nor their mean"):
        _ = head.position


class TestStart:
    def test_it_goes_by_seed_and_leaves_the_global_generator(self):
        head = TaskHead(base_of("roberta"), "classify", 3)
        before = torch.random.get_rng_state()
        first, again, other = (head.start(seed) for seed in (1, 1, 2))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["classifier.dense.weight"], other["classifier.dense.weight"])

    @pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "modernbert", "llama"])
    def test_it_is_drawn_as_transformers_draws_it(self, family):
        base = base_of(family)
        head = TaskHead(base, "classify", 200)
        config = copy.deepcopy(base.model.config)
        config.num_labels = 200
        torch.manual_seed(0)
        plain = hf.AutoModelForSequenceClassification.from_config(config).requires_grad_(False)
        for name, weight in head.start(seed=1).items():
            truth = plain.get_parameter(name)
            assert weight.dtype == torch.float32
            assert weight.shape == truth.shape
            assert float(weight.std()) == pytest.approx(float(truth.std()), rel=0.15, abs=1e-6), name
            assert float(weight.mean()) == pytest.approx(float(truth.mean()), abs=0.05), name

    def test_a_bfloat16_base_starts_in_float32(self):
        head = TaskHead(build_encoder("bert", dtype=torch.bfloat16, part="bare"), "classify", 3)
        start = head.start(seed=1)
        assert {weight.dtype for weight in start.values()} == {torch.float32}
        assert head.logits(start, torch.ones(2, 16, dtype=torch.bfloat16)).dtype == torch.float32


class TestPooler:
    """BERT's classifier reads its pooler, which a masked language model is loaded without."""

    form = InputForm(task="classify", labels=LABELS)

    def test_the_bases_own_is_frozen_and_no_part_of_the_head(self):
        base = build_encoder("bert", part="bare")
        head = task_head(base, self.form)
        assert sorted(head.start(0)) == ["classifier.bias", "classifier.weight"]
        states = torch.ones(1, 16, requires_grad=True)
        head.logits(head.start(0), states).sum().backward()
        assert states.grad.abs().max() > 0
        assert all(parameter.grad is None for parameter in base.model.parameters())

    @pytest.mark.parametrize(("family", "pooler"), [("bert", "bert.pooler.dense"), ("albert", "albert.pooler")])
    def test_one_that_the_base_lacks_is_trained(self, family, pooler):
        head = task_head(build_encoder(family), self.form)
        names = [f"{pooler}.bias", f"{pooler}.weight", "classifier.bias", "classifier.weight"]
        assert sorted(head.start(0)) == names
        weights = {name: weight.requires_grad_(True) for name, weight in head.start(0).items()}
        head.logits(weights, torch.ones(1, 16)).square().sum().backward()
        assert all(weight.grad.abs().max() > 0 for weight in weights.values())

    def test_that_of_a_masked_models_checkpoint_is_used(self, tmp_path):
        """As in bert-base-uncased: the checkpoint of the masked language model has it."""
        folder = save_encoder("bert", tmp_path / "bert")
        stored = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(0)
        stored |= {
            "bert.pooler.dense.weight": torch.randn(16, 16, generator=generator),
            "bert.pooler.dense.bias": torch.randn(16, generator=generator),
        }
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        base = load_base(str(folder), dtype="float32", device="cpu")
        head = task_head(base, self.form)
        assert sorted(head.start(0)) == ["classifier.bias", "classifier.weight"]
        model = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
        with torch.no_grad():
            states = base.model.bert(input_ids=IDS)[0][:, 0]
        found = head.logits(weights_of(model, head), states)
        torch.testing.assert_close(found, outputs_of(model, input_ids=IDS), rtol=1e-4, atol=1e-5)


def test_names_and_shapes_are_checked():
    head = TaskHead(base_of("bert"), "classify", 3)
    head.check(head.start(0), "it")
    with pytest.raises(AdapterError, match=r"it has the weight 'x\.weight', but the classify head of base 'tiny-bert'"):
        head.check({**head.start(0), "x.weight": torch.ones(1)}, "it")
    with pytest.raises(AdapterError, match=r"it lacks the weight 'classifier\.bias'"):
        head.check({"classifier.weight": torch.ones(3, 16)}, "it")
    with pytest.raises(AdapterError, match=r"of the shape \[4, 16\]; .* has \[3, 16\] there for 3 labels"):
        head.check({**head.start(0), "classifier.weight": torch.ones(4, 16)}, "it")


def test_what_has_no_head_is_refused():
    with pytest.raises(BaseModelError, match="is an encoder-decoder, which has no head for the task classify"):
        task_head(build_seq2seq("t5"), InputForm(task="classify", labels=LABELS))
    with pytest.raises(ConfigError, match="has 1 to 100,000 labels, not 0"):
        task_head(base_of("bert"), InputForm(task="tag"))
    assert task_head(base_of("bert"), InputForm(task="embed")) is None


def test_threads_share_a_head():
    """A call puts its weights into one module."""
    head = TaskHead(base_of("bert"), "classify", 3)
    starts = [head.start(seed) for seed in range(4)]
    states = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    truth = [head.logits(start, states) for start in starts]
    wrong = []

    def work(number):
        for _ in range(20):
            if not torch.equal(head.logits(starts[number], states), truth[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.medium
def test_heads_of_very_many_label_counts_leave_the_first_one_as_it_was():
    base = build_encoder("bert", part="bare")
    first, states = TaskHead(base, "classify", 2), torch.randn(3, base.model.config.hidden_size)
    weights = first.start(0)
    before = first.logits(weights, states)
    for count in range(3, MOST_MODELS + 5):
        others = TaskHead(base, "classify", count)
        assert others.logits(others.start(0), states).shape == (3, count)
    assert torch.equal(first.logits(weights, states), before)
