"""Each row's token is what transformers' own processors and a plain inverse CDF give that row alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from support.tiny_bases import EOS, VOCAB, build_base
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from softprompt.config import SamplingConfig
from softprompt.engine.sampler import Sampler, blockwise_argmax, top_logprobs, uniform
from softprompt.engine.top_k_top_p import candidates, exp_sums, keep_mask, new_filters

WIDE = 3000  # several blocks and a rest
TEXT, ANSWER = (5, 7, 7, 40, 3), (7, 50, 50, 50, 9)
SETTINGS = [
    {},
    {"logit_bias": ((5, 3.0), (60, -2.5), (5, 1.0))},
    {"repetition_penalty": 1.6},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 1.5},
    {"frequency_penalty": -1.0, "presence_penalty": -0.5},
    {"min_new_tokens": 9},
    {"min_new_tokens": 5, "presence_penalty": 0.5},
    {"min_new_tokens": 9, "stop_ids": (50, 60), "ignore_eos": True},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.0, "top_k": 2000},
    {"temperature": 1.0, "top_k": 4000, "top_p": 0.5},
    {"temperature": 1.3, "top_p": 0.6},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 4.0, "top_p": 0.999},
    {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.7},
    {"temperature": 1.0, "top_p": 0.95, "min_p": 0.01, "presence_penalty": 1.0, "logit_bias": ((9, 4.0),)},
    {"temperature": 1.0, "min_new_tokens": 9, "repetition_penalty": 0.5, "frequency_penalty": 0.3, "seed": 2**63 - 1},
]


@pytest.fixture(scope="module")
def base():
    return build_base("llama", vocab_size=WIDE)


def random_logits(rows, seed=0, vocab=WIDE, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)


def contested_logits(rows, seed=0, vocab=WIDE, dtype=torch.float32):
    """The ids that the settings touch are among the likeliest, on either side of 0."""
    logits = random_logits(rows, seed, vocab, 0.5)
    logits[:, [EOS, *{*TEXT, *ANSWER}, 60]] += 1.5
    return (logits - 2 * (torch.arange(rows)[:, None] % 2)).to(dtype)


def new_state(base, choice_index=0, text_ids=TEXT, answer=ANSWER, **chosen):
    row = Sampler(base).new_state(SamplingConfig(**chosen), text_ids, choice_index)
    for token in answer:
        row.append(token)
    return row


def sample(base, logits, rows, num_log_probs=None):
    return Sampler(base).sample(logits, rows, num_log_probs or [None] * len(rows))


def slow_scores(logits_V, sampling, text_ids, new_ids, stop_ids):
    """Everything before the draw, with transformers' processors where it has them."""
    scores = logits_V.float().clone()[None]
    for token, bias in sampling.logit_bias:
        scores[0, token] += bias
    if sampling.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(
            torch.tensor([[*text_ids, *new_ids]]), scores
        )
    counts = torch.bincount(torch.tensor(new_ids, dtype=torch.long), minlength=scores.shape[1])[: scores.shape[1]]
    scores = scores - (sampling.presence_penalty * (counts > 0).float() + sampling.frequency_penalty * counts.float())
    if len(new_ids) < sampling.min_new_tokens:
        scores[:, [*(() if sampling.ignore_eos else stop_ids), *sampling.stop_ids]] = -torch.inf
    return scores


def slow_warped(scores, sampling):
    if sampling.temperature != 1:
        scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        num_kept = int(TopPLogitsWarper(sampling.top_p)(None, scores).isfinite().sum())
        order = scores[0].sort(descending=True, stable=True).indices  # of equal ones theirs keeps what its sort likes
        scores = scores.index_fill(1, order[num_kept:], -torch.inf)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    return scores


def slow_choice(logits_V, row, choice_index=0, stop_ids=(EOS,), row_text=TEXT):
    """The id, or the two ids between which the draw falls when it falls within 1e-6 of the edge."""
    sampling = row.sampling
    scores = slow_scores(logits_V, sampling, row_text, row.new_ids, stop_ids)
    if sampling.temperature == 0:
        return {int(scores.argmax())}
    sums = torch.softmax(slow_warped(scores, sampling)[0].double(), dim=-1).cumsum(-1)
    bits = np.random.Philox(key=sampling.seed + choice_index, counter=len(row.new_ids))
    number = np.random.Generator(bits).random() * float(sums[-1])
    return {int((sums > number + shift).int().argmax()) for shift in (-1e-6, 1e-6)}


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_setting_alone_is_transformers_own(base, chosen, dtype):
    rows = [new_state(base, **{"seed": seed, **chosen}) for seed in range(24)]
    logits = contested_logits(24, dtype=dtype)
    for row, logits_V in zip(rows, logits, strict=True):
        (found,) = sample(base, logits_V[None], [row])
        assert found.id in slow_choice(logits_V, row)


def test_unlike_rows_in_one_batch_are_each_as_alone(base):
    rows = [new_state(base, choice_index=i, **chosen) for i in (0, 1) for chosen in SETTINGS]
    wanted = [(None, 0, 3)[number % 3] for number in range(len(rows))]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        logits = contested_logits(len(rows), 1, dtype=dtype)
        together = sample(base, logits, rows, wanted)
        for number, row in enumerate(rows):
            assert together[number].id in slow_choice(logits[number], row, choice_index=number // len(SETTINGS))
            assert together[number] == sample(base, logits[number : number + 1], [row], [wanted[number]])[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_neighbours_order_and_threads_change_no_bit_of_a_sample(base, threads):
    vocab = 70_000  # beyond what one thread gets of a reduction
    rows = [new_state(base, choice_index=i, **chosen) for i, chosen in enumerate(SETTINGS)]
    logits, wanted = contested_logits(len(rows), 2, vocab, torch.bfloat16), [4] * len(rows)
    torch.set_num_threads(threads)
    try:
        together = sample(base, logits, rows, wanted)
        alone = [sample(base, logits[n : n + 1], [row], [4])[0] for n, row in enumerate(rows)]
        order = list(reversed(range(len(rows))))
        turned = sample(base, logits[order], [rows[n] for n in order], wanted)
    finally:
        torch.set_num_threads(1)
    assert together == alone == turned[::-1]


@st.composite
def sampling_settings(draw):
    odd = st.floats(-2, 2, width=32)
    return SamplingConfig(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, 1, 3, 50])),
        top_p=draw(st.sampled_from([1.0, 0.1, 0.5, 0.75, 0.9, 0.999])),
        min_p=draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.5, 0.7])),
        presence_penalty=draw(odd),
        frequency_penalty=draw(odd),
        min_new_tokens=draw(st.sampled_from([0, 3])),
        logit_bias=tuple(draw(st.lists(st.tuples(st.integers(0, VOCAB - 1), odd), max_size=3))),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


@settings(max_examples=100, deadline=None)
@given(
    chosen=st.lists(sampling_settings(), min_size=1, max_size=5),
    new_ids=st.lists(st.integers(0, VOCAB - 1), max_size=6),
    vocab=st.sampled_from([VOCAB, 512, 700]),
    grid=st.sampled_from([None, 1.0, 0.25]),
    seed=st.integers(0, 1000),
)
def test_any_settings_are_transformers_own(tiny_llama, chosen, new_ids, vocab, grid, seed):
    logits = contested_logits(len(chosen), seed, vocab) * 3
    logits = logits if grid is None else (logits / grid).round() * grid  # many equal ones
    rows = [Sampler(tiny_llama).new_state(sampling, TEXT) for sampling in chosen]
    for row in rows:
        for token in new_ids:
            row.append(token)
    for logits_V, row, found in zip(logits, rows, sample(tiny_llama, logits, rows), strict=True):
        assert found.id in slow_choice(logits_V, row)


@pytest.mark.parametrize("vocab", [97, 3000, 40_000])
@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kept_are_those_of_transformers_warpers(vocab, scale, dtype):
    chosen = [
        SamplingConfig(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
        for top_k in (0, 1, 30, 2000)
        for top_p in (1.0, 0.3, 0.9, 0.999)
        for min_p in (0.0, 0.1)
    ]
    wide = (vocab // 512 + 1) * 512
    logits = torch.full((len(chosen), wide), -torch.inf)
    logits[:, :vocab] = random_logits(len(chosen), vocab, vocab, scale, dtype).float()
    filters = new_filters(chosen, vocab)
    view, ids = candidates(logits, filters, exp_sums(logits))
    stays = keep_mask(view, filters, exp_sums(logits)) & (view > -np.inf)
    for number, sampling in enumerate(chosen):
        theirs = set(slow_warped(logits[number : number + 1], sampling)[0].isfinite().nonzero()[:, 0].tolist())
        ours = set(ids[number][stays[number]].tolist())
        if ours != theirs:  # float32's rounding decides on which side of top-p's bound a sliver falls
            sliver = torch.softmax(logits[number], dim=-1)[list(ours ^ theirs)].sum()
            assert sampling.top_p < 1 and (len(ours ^ theirs) == 1 or sliver < 2e-6), sampling


def test_of_equal_tokens_on_the_edge_of_top_p_the_first_stay(base):
    logits = torch.full((1, WIDE), -50.0)
    logits[0, [10, 200, 1500, 2900]] = 1.0
    rows = [new_state(base, seed=seed, temperature=1.0, top_p=0.75) for seed in range(100)]
    assert {found.id for found in sample(base, logits.expand(100, -1), rows)} == {10, 200, 1500}
    assert TopPLogitsWarper(0.75)(None, logits).isfinite().sum() == 3


def test_a_neighbours_counts_or_another_temperature_would_show(base):
    """Controls: the truth above tells these apart."""
    logits = random_logits(40, 5)
    own = [new_state(base, seed=i, temperature=1.0, frequency_penalty=2.0) for i in range(40)]
    found = sample(base, logits, own)
    others = {
        "temperature": [new_state(base, seed=i, temperature=1.1, frequency_penalty=2.0) for i in range(40)],
        "counts": [
            new_state(base, seed=i, answer=(f.id,) * 5, temperature=1.0, frequency_penalty=2.0)
            for i, f in enumerate(found)
        ],
        "step": [new_state(base, seed=i, answer=ANSWER[1:], temperature=1.0, frequency_penalty=2.0) for i in range(40)],
        "seed": [new_state(base, seed=i + 1, temperature=1.0, frequency_penalty=2.0) for i in range(40)],
    }
    assert all(f.id in slow_choice(logits[i], own[i]) for i, f in enumerate(found))
    for what, rows in others.items():
        assert any(f.id not in slow_choice(logits[i], rows[i]) for i, f in enumerate(found)), what


def test_penalties_count_the_tokens_of_text_and_answer_that_they_should(base):
    logits = torch.zeros(4, WIDE)
    logits[:, 40], logits[:, 50], logits[:, 60] = 3.0, 2.5, 2.0  # in the text, in the answer, in neither
    rows = [
        new_state(base),
        new_state(base, repetition_penalty=2.0),
        new_state(base, presence_penalty=1.0),
        new_state(base, repetition_penalty=2.0, answer=()),
    ]
    assert [found.id for found in sample(base, logits, rows)] == [40, 60, 40, 50]


@pytest.mark.parametrize(
    "chosen",
    [
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 6},
        {"temperature": 1.0, "min_p": 0.2},
    ],
    ids=str,
)
def test_draws_come_as_often_as_they_are_likely(base, chosen):
    logits = torch.full((1, WIDE), -torch.inf)
    logits[0, torch.arange(0, WIDE, 250)] = random_logits(1, 3, 12, 1.0)
    draws = [
        found.id
        for step in range(4)
        for found in sample(
            base, logits.expand(1000, -1), [new_state(base, i, answer=(9,) * step, **chosen) for i in range(1000)]
        )
    ]
    likely = torch.softmax(slow_warped(logits, SamplingConfig(**chosen))[0].double(), dim=-1).numpy()
    ids = np.flatnonzero(likely)
    assert set(draws) <= set(ids.tolist())
    assert chisquare([draws.count(token) for token in ids], likely[ids] / likely.sum() * len(draws)).pvalue > 1e-3


def test_the_numbers_are_uniform_and_depend_on_seed_and_step_alone():
    numbers = np.array([[uniform(seed, step) for step in range(100)] for seed in (*range(39), 2**63 - 1)])
    assert len(np.unique(numbers)) == numbers.size
    assert chisquare(np.histogram(numbers, 20, (0, 1))[0]).pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.05
    assert uniform(7, 3) == uniform(7, 3) == np.random.Generator(np.random.Philox(key=7, counter=3)).random()


def test_seeds_go_to_the_end_and_behind_it(base):
    logits = random_logits(1, 4, scale=0.5).expand(40, -1)
    last = [new_state(base, i, temperature=1.0, seed=2**63 - 1) for i in range(40)]
    first = [new_state(base, i, temperature=1.0) for i in range(40)]
    ids = [[found.id for found in sample(base, logits, rows)] for rows in (last, first)]
    assert ids[0] != ids[1] and len(set(ids[0])) > 20
    assert all(i in slow_choice(logits[0], last[n], n) for n, i in enumerate(ids[0]))


def test_choice_i_of_a_seed_is_choice_0_of_that_seed_and_i(base):
    logits = random_logits(1, 6)
    pair = [new_state(base, 3, temperature=1.5, seed=4), new_state(base, 0, temperature=1.5, seed=7)]
    assert pair[0].seed == pair[1].seed == 7
    assert sample(base, logits, pair[:1]) == sample(base, logits, pair[1:])


def test_a_row_that_is_made_again_goes_on_as_if_it_had_stayed(base):
    logits = random_logits(12, 7)
    chosen = {"temperature": 1.0, "repetition_penalty": 1.4, "frequency_penalty": 0.5, "min_new_tokens": 8}
    stayed = new_state(base, answer=(), **chosen)
    for step in range(12):
        resumed = new_state(base, answer=tuple(stayed.new_ids), **chosen)
        (ours,), (theirs,) = (sample(base, logits[step : step + 1], [row]) for row in (stayed, resumed))
        assert ours == theirs
        stayed.append(ours.id)


def test_choosing_changes_neither_logits_nor_rows_nor_any_generator(base):
    rows = [new_state(base, **chosen) for chosen in SETTINGS]
    logits = random_logits(len(rows), 8)
    kept_logits, torchs, numpys = logits.clone(), torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = sample(base, logits, rows, [2] * len(rows))
    assert sample(base, logits, rows, [2] * len(rows)) == first
    assert torch.equal(logits, kept_logits) and [tuple(row.new_ids) for row in rows] == [ANSWER] * len(rows)
    assert torch.equal(torch.random.get_rng_state(), torchs)
    assert (np.random.get_state()[1] == numpys).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_are_raw_and_in_order(base, dtype):
    logits = random_logits(6, 9, dtype=dtype)
    rows = [
        new_state(base, temperature=2.0, top_k=50, repetition_penalty=2.0, min_new_tokens=9, seed=i) for i in range(6)
    ]
    truth = torch.log_softmax(logits.float(), dim=-1)
    for number, found in enumerate(sample(base, logits, rows, [0, 1, 5, WIDE, None, 20])):
        wanted = (0, 1, 5, WIDE, None, 20)[number]
        if wanted is None:
            assert (found.log_prob, found.alternatives) == (None, ())
            continue
        assert found.log_prob == float(truth[number, found.id])
        order = sorted(range(WIDE), key=lambda i, n=number: (-float(truth[n, i]), i))[:wanted]
        assert found.alternatives == tuple((i, float(truth[number, i])) for i in order)


def test_equal_alternatives_come_in_order_of_id():
    log_probs = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0] + [0.5] * 95])
    assert [i for i, _ in top_logprobs(log_probs, [5])[0]] == [1, 2, 4, 5, 6]


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_a_row_without_numbers_fails_alone(base, spoilt):
    rows = [new_state(base, **chosen) for chosen in SETTINGS for _ in (0, 1)]
    logits = random_logits(len(rows), 10)
    wanted = [1] * len(rows)
    sound = sample(base, logits, rows, wanted)
    logits[::2, 77] = spoilt
    found = sample(base, logits, rows, wanted)
    assert found[::2] == [None] * len(SETTINGS)
    assert found[1::2] == sound[1::2]


def test_nothing_left_to_choose_is_none_and_a_forced_token_is_chosen(base):
    logits = torch.full((3, WIDE), -torch.inf)
    logits[:, [4, EOS]] = 0.0
    rows = [new_state(base, logit_bias=((4, -torch.inf),), min_new_tokens=9, temperature=t) for t in (0.0, 1.0)] + [
        new_state(base, logit_bias=((EOS, torch.inf),), temperature=1.0)
    ]
    found = sample(base, logits, rows)
    assert found[:2] == [None, None] and found[2].id == EOS


def test_a_temperature_next_to_nothing_is_greedy(base):
    logits = random_logits(3, 11)
    rows = [new_state(base, temperature=t, top_p=0.9) for t in (1e-45, 1e-38, 1.0)]
    found = sample(base, logits, rows)
    assert [f.id for f in found[:2]] == logits[:2].argmax(-1).tolist()
    assert found[2].id in slow_choice(logits[2], rows[2])


@pytest.mark.parametrize("vocab", [1, 5, 511, 512, 513, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blockwise_argmax_is_argmax(vocab, dtype):
    logits = random_logits(20, vocab, vocab, dtype=dtype).round()  # many equal ones
    values, ids = blockwise_argmax(logits)
    assert ids.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]
    assert torch.equal(values, logits.amax(-1))


def test_ids_that_the_logits_do_not_reach_are_left_alone(base):
    row = new_state(base, text_ids=(5, 2999), answer=(2998,), repetition_penalty=2.0, logit_bias=((2997, torch.inf),))
    logits = random_logits(1, 12, 100)
    logits[0, 5] = 20.0
    expected = logits[0].clone()
    expected[5] /= 2
    assert sample(base, logits, [row])[0].id == int(expected.argmax())
