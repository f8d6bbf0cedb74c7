"""How the bench of a real base scores rows: nats of a text, the likeliest label, the exact answer.

Labels of one token each, as on SmolLM2, cost one pass per row: one hidden state gives the likelihood of every label and
the greedy token. A record's greedy answer is read off a pass over the record itself: it is the record if and only if
each of its tokens is the likeliest where it stands, and an end of text or of the line follows. Few examples in context
are run as a soft prompt of their own embeddings, once for all rows.

N rows, T targets, D hidden width, V vocabulary, K labels.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from quality_cases import Case
from torch import Tensor

from softprompt import Base, SoftPrompt
from softprompt.data import Rows, build_examples, label_ids, render_rows
from softprompt.evaluation.classification import LabelledRows, label_scores, labelled_rows
from softprompt.families import forward_of
from softprompt.loss import score_examples
from softprompt.splice import Row, run_prompts, target_states

NUM_SHOTS = 8
_ROWS_AT_ONCE = 32
_PROMPT_TOKENS = 20  # room for a prompt beside the longest text


class Scores(NamedTuple):
    """Of each row: nats, or with labels 1 if it is wrong; the tokens; whether the greedy answer is right."""

    sums: list[float]
    counts: list[int]
    greedy: list[int] | None = None
    loss: float | None = None  # with labels: nats per token of the own label


def score_rows(base: Base, rows: Rows, prompt: SoftPrompt | None) -> Scores:
    """By what the rows are: labels, records (a template without labels), texts or chats."""
    if rows.form.labels:
        return label_figures(base, rows, prompt)
    return answer_figures(base, rows, prompt) if rows.form.kind == "template" else text_figures(base, rows, prompt)


def text_figures(base: Base, rows: Rows, prompt: SoftPrompt | None) -> Scores:
    """Each row's nats and its tokens, the same ones with and without a prompt."""
    examples = build_examples(base, rows, eos=False, max_length=base.max_length - _PROMPT_TOKENS).examples
    scores = score_examples(base, forward_of(base), examples, None if prompt is None else prompt.tensor)
    return Scores([score.text_nats for score in scores], [score.num_text for score in scores])


def label_figures(base: Base, rows: Rows, prompt: SoftPrompt | None) -> Scores:
    """Without a greedy answer where a label has several tokens."""
    known = labelled_rows(rows)
    ids = [label_ids(base, known.texts[0], label) for label in known.labels]
    if any(len(own) > 1 for own in ids):
        (scores_NK,) = label_scores(base, forward_of(base), known.texts, known.labels, [prompt])
        wrong = [float(own != guess) for own, guess in zip(known.own, scores_NK.argmax(axis=1), strict=True)]
        return Scores(wrong, [1] * len(wrong))
    return _one_token_figures(base, known, [own[0] for own in ids], prompt)


@torch.no_grad()
def _one_token_figures(base: Base, known: LabelledRows, ids_K: list[int], prompt: SoftPrompt | None) -> Scores:
    wrong, greedy, nats = [], [], []
    rows = [_label_row(base, text, ids_K[own]) for text, own in zip(known.texts, known.own, strict=True)]
    for own, (hidden_TD, _) in zip(known.own, _hidden_at_targets(base, rows, prompt), strict=True):
        logits_V = forward_of(base).head(hidden_TD)[0].float()
        wrong.append(float(_logits_of(base, hidden_TD[0], ids_K, logits_V).argmax() != own))
        greedy.append(int(logits_V.argmax() == ids_K[own]))
        nats.append(float(logits_V.logsumexp(0) - logits_V[ids_K[own]]))
    return Scores(wrong, [1] * len(wrong), greedy, sum(nats) / len(nats))


def _logits_of(base: Base, hidden_D: Tensor, ids_K: Sequence[int], logits_V: Tensor) -> Tensor:
    """[K] in float32: in bfloat16 two labels are often equally likely to all digits that there are."""
    head = forward_of(base).head
    if head.weight is None or head.scale != 1.0 or head.cap is not None:
        return logits_V[ids_K]
    return head.weight[ids_K].float() @ hidden_D.float()


def _label_row(base: Base, text: str, label: int) -> tuple[list[int], list[bool]]:
    before = [*base.bos_ids, *base.encode(text)]
    return [*before, label], [False] * len(before) + [True]


@torch.no_grad()
def answer_figures(base: Base, rows: Rows, prompt: SoftPrompt | None) -> Scores:
    """Nats and tokens of each row's completion, and whether the greedy answer is it."""
    examples = build_examples(base, rows, eos=True, max_length=base.max_length - _PROMPT_TOKENS).examples
    masked = [(list(example.ids), list(example.target_mask)) for example in examples]
    sums, counts, greedy = [], [], []
    for example, (hidden_TD, ids_T) in zip(examples, _hidden_at_targets(base, masked, prompt), strict=True):
        assert example.has_eos, "a record was cut, or the base has no end of text"
        logits_TV = forward_of(base).head(hidden_TD).float()
        nats = torch.nn.functional.cross_entropy(logits_TV[:-1], ids_T[:-1], reduction="sum")
        best = logits_TV.argmax(dim=-1).tolist()
        sums.append(float(nats))
        counts.append(len(best) - 1)
        greedy.append(int(best[:-1] == ids_T[:-1].tolist() and ends_answer(base, best[-1])))
    return Scores(sums, counts, greedy)


def ends_answer(base: Base, token: int) -> bool:
    """Whether nothing of the answer's line follows."""
    return token in {base.eos_id, *base.stop_ids} or base.tokenizer.decode([token]).startswith("\n")


def _hidden_at_targets(
    base: Base, masked: Sequence[tuple[list[int], list[bool]]], prompt: SoftPrompt | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row of ids and mask, the hidden states [T, D] that predict its targets, and these [T]."""
    forward, tensors = forward_of(base), [] if prompt is None else [prompt.tensor]
    prefix = run_prompts(base, forward, tensors) if tensors and forward.can_share_prefix else None
    rows = [Row(ids, None if prompt is None else 0, mask) for ids, mask in masked]
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[first : first + _ROWS_AT_ONCE]
        hidden, targets = target_states(base, forward, some, tensors, prefix)
        for number in range(len(some)):
            yield hidden[targets.rows == number], targets.ids[targets.rows == number]


def shots(case: Case) -> Rows:
    """Eight training rows, drawn; of labels as many of each as there can be."""
    order = list(range(len(case.train)))
    random.Random("rows in context").shuffle(order)
    if case.has_labels:
        own = labelled_rows(case.train).own
        turns = {label: [place for place in order if own[place] == label] for label in sorted(set(own))}
        order = [place for turn in range(NUM_SHOTS) for rows in turns.values() for place in rows[turn : turn + 1]]
    return case.train.select(order[:NUM_SHOTS])


def context_ids(base: Base, rows: Rows) -> list[int]:
    """The rows as a text in front of another one, an empty line behind each; chats by the chat template."""
    if rows.form.kind == "chat":
        examples = build_examples(base, rows, eos=True, max_length=base.max_length).examples
        return [token for example in examples for token in [*example.ids, *base.encode("\n")]]
    return list(base.encode("".join(f"{row.prompt}{row.text}\n\n" for row in render_rows(rows))))


def as_prompt(base: Base, ids: Sequence[int]) -> SoftPrompt:
    """Real tokens as a soft prompt: what follows them is scored as after the text itself."""
    return SoftPrompt(base.embed(torch.tensor(ids)).float())


def with_template(rows: Rows, template: str) -> Rows:
    return replace(rows, form=replace(rows.form, template=template))


def with_system(rows: Rows, instruction: str) -> Rows:
    """Chats that a system message opens."""
    column = rows.column
    assert column is not None and rows.form.kind == "chat", rows.form
    message = {"role": "system", "content": instruction}
    return replace(rows, records=tuple({**row, column: [message, *row[column]]} for row in rows.records))
