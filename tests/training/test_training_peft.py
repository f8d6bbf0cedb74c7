"""PEFT 0.21: the same logits at the same weights, the same run at the same settings; where PEFT is wrong, its error."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from support.ready import ready_run
from support.slow_truth import TOLERANCE, TrueDouble, plain_logits, relative_error
from support.tiny_bases import BOS, EOS, build_base, build_model, random_ids, random_prompt
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, get_linear_schedule_with_warmup

from softprompt.config import NOTEBOOK_PRESET, SamplingConfig, TrainConfig
from softprompt.engine import Request, generate
from softprompt.families import forward_of
from softprompt.loss import score_examples
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row, concatenate
from softprompt.training import train

FAMILIES = ("bloom", "llama", "gpt2")
IGNORED = -100


def peft_model(family, prompt, dtype=torch.float32):
    """PEFT over the same weights, its prompt set to ours."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(prompt))
    model = get_peft_model(build_model(family, dtype=dtype), config)
    embedding = model.prompt_encoder["default"].embedding
    embedding.weight = torch.nn.Parameter(prompt.clone().to(dtype))
    return model.eval()


def padded(rows, side="right"):
    """Ids and mask [B, T] of ragged rows."""
    width = max(map(len, rows))
    fill = [[EOS] * (width - len(row)) for row in rows]
    masks = [[1] * len(row) for row in rows]
    if side == "right":
        both = [(list(r) + f, m + [0] * len(f)) for r, f, m in zip(rows, fill, masks, strict=True)]
    else:
        both = [(f + list(r), [0] * len(f) + m) for r, f, m in zip(rows, fill, masks, strict=True)]
    return torch.tensor([ids for ids, _ in both]), torch.tensor([mask for _, mask in both])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_same_weights_have_the_same_logits(family, dtype):
    base = build_base(family, dtype=dtype)
    prompt = random_prompt(base, 5)
    rows = [random_ids(length, length) for length in (9, 1, 4)]
    ids, mask = padded(rows)
    theirs = peft_model(family, prompt, dtype)(input_ids=ids, attention_mask=mask).logits
    spliced = concatenate(base, [Row(row, 0) for row in rows], [prompt])
    forward = forward_of(base)
    ours = forward.logits(forward.hidden_states(spliced.embeds_BSH, spliced.mask_BS, spliced.positions_BS))
    tolerance = 1e-6 if dtype == torch.float64 and family == "bloom" else TOLERANCE[dtype]  # float32 inside
    for row, mine, other in zip(rows, ours, theirs, strict=True):
        assert relative_error(mine[: 5 + len(row)], other[: 5 + len(row)]) < tolerance


def peft_run(family, ready):
    """The plan's batches through PEFT, right padding, targets as labels, torch's AdamW, linear decay."""
    trial = ready.trial
    model = peft_model(family, trial.start, torch.float64)
    weight = model.prompt_encoder["default"].embedding.weight
    optimizer = torch.optim.AdamW([weight], lr=trial.plan.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, trial.plan.num_steps)
    losses = []
    for step in (step for epoch in trial.plan.epochs for step in epoch):
        examples = [trial.examples[index] for index in step]
        loss = peft_loss(model, examples, len(trial.start))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses, weight.detach()


def peft_loss(model, examples, num_virtual):
    """Mean over all targets of the batch, in float64 (transformers' own loss goes through float32)."""
    ids, mask = padded([example.ids for example in examples])
    counted, _ = padded([[int(c) for c in example.target_mask] for example in examples])
    labels = torch.where(mask.bool() & (counted == 1), ids, IGNORED)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, num_virtual - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_start_rows_labels_and_optimiser_are_the_same_run(family, texts):
    base = build_base(family, dtype=torch.float64)
    settings = TrainConfig(
        virtual_tokens=4,
        epochs=2,
        batch_rows=8,
        micro_batch_rows=3,
        learning_rate=0.02,
        eos_weight=1.0,
        schedule="linear",
        reparameterisation="none",
    )
    with TrueDouble():
        result = train(base, texts, settings)
        losses, weight = peft_run(family, ready_run(base, texts, settings))
    assert result.plan.layout == "packed"
    assert result.losses == pytest.approx(losses, rel=1e-6)
    assert relative_error(result.prompt.tensor.double(), weight) < 1e-6
    assert relative_error(ready_run(base, texts, settings).trial.start.double(), weight) > 0.02  # the control: it moved


class PlannedTrainer(Trainer):
    """transformers' Trainer, its rows in our plan's order, its step losses written down."""

    def __init__(self, *args, epochs, **kwargs):
        super().__init__(*args, **kwargs)
        self.epochs = epochs
        self.step_losses = []

    def _get_train_sampler(self, *args, **kwargs):
        epochs = iter(self.epochs)

        class Planned(torch.utils.data.Sampler):
            def __len__(self):
                return sum(map(len, first))

            def __iter__(self):
                return (index for step in next(epochs, first) for index in step)

        first = self.epochs[0]
        return Planned()

    def compute_loss(self, *args, **kwargs):
        out = super().compute_loss(*args, **kwargs)
        self.step_losses.append(float((out[0] if isinstance(out, tuple) else out).detach()))
        return out


@pytest.mark.filterwarnings("ignore")  # the Trainer's and accelerate's own
def test_the_notebook_preset_is_the_notebooks_trainer(texts, held_out, tmp_path):
    """PEFT's own start, transformers.Trainer and its collator, 3e-3: the preset takes the same steps."""
    base = build_base("bloom")
    settings = TrainConfig(**{**NOTEBOOK_PRESET, "seed": 7, "epochs": 4})
    trial = ready_run(base, texts, settings).trial
    torch.manual_seed(7)
    model = get_peft_model(build_model("bloom"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    tokenizer = base.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    arguments = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=3e-3, num_train_epochs=4, per_device_train_batch_size=8, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": list(example.ids)} for example in trial.examples]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = PlannedTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, epochs=trial.plan.epochs
    )
    # Today's Trainer divides a step's sum by the targets of the bare rows, one less per row than PEFT sums over;
    # the notebook's Trainer took their mean.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    result = train(base, texts, settings)
    theirs = SoftPrompt(model.prompt_encoder["default"].embedding.weight)
    assert len(result.losses) == len(trainer.step_losses) == 12
    assert result.losses == pytest.approx(trainer.step_losses, abs=1e-4)
    examples = ready_run(base, held_out, settings).trial.examples
    ours, others, start = (
        sum(score.text_nats for score in score_examples(base, forward_of(base), examples, tensor)) / len(examples)
        for tensor in (result.prompt.tensor, theirs.tensor, trial.start)
    )
    assert ours == pytest.approx(others, abs=1e-3)
    assert abs(start - others) > 5e-3  # the control: the run did something


@torch.no_grad()
def test_peft_left_padding_is_wrong_for_gpt2_and_ours_is_plain_concatenation(tiny_gpt2):
    """PEFT puts the prompt before the pads and drops the positions."""
    prompt = random_prompt(tiny_gpt2, 5)
    rows = [random_ids(12, 1), random_ids(3, 2)]
    truth = plain_logits(tiny_gpt2, rows[1], prompt)[-1]
    ids, mask = padded(rows, side="left")
    theirs = peft_model("gpt2", prompt)(input_ids=ids, attention_mask=mask).logits[1, -1]
    spliced = concatenate(tiny_gpt2, [Row(row, 0) for row in rows], [prompt], "right")
    forward = forward_of(tiny_gpt2)
    hidden = forward.hidden_states(spliced.embeds_BSH, spliced.mask_BS, spliced.positions_BS)
    ours = forward.logits(hidden)[1, -1]
    assert relative_error(ours, truth) < 1e-5
    assert relative_error(theirs, truth) > 0.05


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_peft_generates_something_else_for_a_padded_batch_and_we_do_not(tiny_gpt2):
    prompt = random_prompt(tiny_gpt2, 5)
    rows = [random_ids(20, 1), *(random_ids(2, seed) for seed in range(2, 10))]
    ids, mask = padded(rows, side="left")
    model = peft_model("gpt2", prompt)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": EOS}
    batch = model.generate(input_ids=ids, attention_mask=mask, **greedy)[:, ids.shape[1] :]
    requests = [Request(row, SoftPrompt(prompt)) for row in rows]
    ours = [list(answer.ids) for answer in generate(tiny_gpt2, requests, SamplingConfig(max_new_tokens=8))]
    alone = [model.generate(input_ids=torch.tensor([row]), **greedy)[0, len(row) :].tolist() for row in rows]
    assert ours == [[token for token in answer if token != EOS] for answer in alone]  # one row has no pads
    assert [[token for token in answer if token != EOS] for answer in batch.tolist()] != ours


def test_a_prompt_made_for_another_base_of_the_same_width_is_told_apart_by_its_record(texts):
    """PEFT would load it in silence; the record carries the base's fingerprint."""
    settings = TrainConfig(virtual_tokens=4, max_steps=1, reparameterisation="none")
    first, second = build_base("llama", seed=0), build_base("llama", seed=1)
    assert train(first, texts, settings).prompt.record.base_fingerprint != second.fingerprint


def test_bos_is_never_a_target_though_pefts_recipe_makes_it_one(texts):
    base = build_base("llama")
    trial = ready_run(base, texts, TrainConfig(virtual_tokens=4)).trial
    assert all(example.ids[0] == BOS and not example.target_mask[0] for example in trial.examples)
    assert all(all(example.target_mask[1:]) for example in trial.examples)
