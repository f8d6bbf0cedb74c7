"""How many rows fit into one forward and backward pass.

On a CPU the kernel kills a process that asks for too much and nothing is raised, so the rows are fitted beforehand, to
the least limit there is (cgroup, address-space limit, available memory). An upper bound from the shapes alone comes
first: where even that fits, which it nearly always does, nothing is run and nothing depends on a measurement. Else the
longest row is run and its peak measured. On CUDA the error is also caught, and the batch split further.
"""

from __future__ import annotations

import ctypes
import math
import resource
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import nn

from softprompt.base import Base, free_bytes
from softprompt.errors import MemoryLimitError
from softprompt.families import Forward, decoder_layers
from softprompt.families.attention import MOST_SCORES, QUERY_BLOCK
from softprompt.training.ranks import Ranks, least, most_shared
from softprompt.training.step import accumulate_gradient
from softprompt.training.trial import Trial, training_row
from softprompt.types import Example

_USABLE_SHARE = 0.8  # of the free memory: the allocator fragments, and other processes need some too
_USABLE_SHARE_AGAIN = 0.95  # for a run that is resumed: two measurements of one row differ
_NUMBERS_PER_WIDTH = 2  # kept of a token by input or output of a matrix; every tested family keeps less than 1
_SCORES_AT_ONCE = 8  # copies of the attention scores of one batch of blocks, backward pass included
_LOSS_BYTES = {"cpu": 2**28, "cuda": 2**31}  # more than a chunk or a block of logits takes


def fit_micro_batches(
    base: Base, forward: Forward, trials: Sequence[Trial], ranks: Ranks, resumed_rows: int | None = None
) -> tuple[int, tuple[str, ...]]:
    """Rows per forward pass, of all trials together: as configured, else what every rank's memory holds; and a note.

    `resumed_rows` is what the run was begun with, and is kept where it can be, for its sums to be the same bits. All
    ranks meet here: they have read everything by now, and none has begun to write.
    Raises MemoryLimitError, on every rank, where one of them cannot hold a single row.
    """
    configured = [trial.plan.config.micro_batch_rows for trial in trials if trial.plan.config.micro_batch_rows]
    planned = sum(trial.plan.micro_batch_rows for trial in trials)
    if configured:
        return least(min(*configured, planned), ranks), ()
    whole = most_shared(planned, ranks)
    wanted = whole if resumed_rows is None else min(whole, resumed_rows)
    if _surely_fits(base, forward, trials, ranks):
        return wanted, ()
    share = _USABLE_SHARE if resumed_rows is None else _USABLE_SHARE_AGAIN
    refusal = MemoryLimitError("one row does not fit into another rank's memory; use fewer processes or shorter rows")
    try:
        free = free_for(base.device, ranks)
        rows = fit_rows(lambda: _run_longest_row(base, forward, trials), wanted, base.device, free, share)
    except MemoryLimitError as error:
        rows, refusal = 0, error
    rows = least(rows, ranks)
    if rows < 1:
        raise refusal
    if rows == whole:
        return rows, ()
    if any(head is not None and head.objective.is_joint for head in (trial.head() for trial in trials)):
        raise MemoryLimitError(
            f"memory allows {rows} of {whole} rows at a time, but this task compares all rows of a step; use "
            f"batch_rows {rows}"
        )
    return rows, (f"memory allows {rows} of {whole} rows at a time: each step is split, its sums stay the same",)


def free_for(device: torch.device, ranks: Ranks) -> int:
    """Free bytes of this rank; those of one machine share its memory on a CPU."""
    return free_bytes(device) // (ranks.num_on_this_machine if device.type == "cpu" else 1)


def _surely_fits(base: Base, forward: Forward, trials: Sequence[Trial], ranks: Ranks) -> bool:
    """Whether even the bound of the largest step fits into every rank's memory."""
    if ranks.in_step or base.device.type == "mps":  # the parts of a base that ranks share out have other shapes
        return False
    bound = bound_of_step(base, forward, trials)
    return bool(least(int(bound <= free_for(base.device, ranks) * _USABLE_SHARE), ranks))


def bound_of_step(base: Base, forward: Forward, trials: Sequence[Trial]) -> float:
    """Bytes that no forward and backward pass over the largest step of all trials exceeds; infinite where unknown.

    Known for packed rows, whose attention is ours: what the layers keep of a token is bounded by the widths of their
    matrices, and what a pass needs besides by one batch of attention scores and one block of logits.
    """
    longest = max(
        length + trial.plan.config.virtual_tokens
        for trial in trials
        for example in trial.examples
        for length in _lengths(example)
    )
    limit = forward.max_batchable_length
    if not forward.can_pack or (limit is not None and longest > limit):
        return math.inf
    scores = max(MOST_SCORES.get(base.device.type, 0), min(QUERY_BLOCK, longest) * longest)
    heads: int = base.model.config.get_text_config(decoder=True).num_attention_heads
    numbers = bound_numbers_of_tokens(base, forward, trials) + _SCORES_AT_ONCE * heads * scores
    if base.kind == "seq2seq":  # T5's biases by distance are kept for every pair of positions, on both sides
        numbers += 2 * heads * longest * sum(_most_tokens(trial, forward.can_share_prefix) for trial in trials)
    return numbers * max(base.dtype.itemsize, 4) + _LOSS_BYTES.get(base.device.type, 0)


def bound_numbers_of_tokens(base: Base, forward: Forward, trials: Sequence[Trial]) -> int:
    """More numbers than a forward pass over the largest step of all trials keeps for its backward pass."""
    width = _NUMBERS_PER_WIDTH * _widths(forward.backbone) * _num_runs(base)
    if (
        forward.head.linear is None and forward.head.refusal is None
    ):  # the model runs whole: logits of every token, and their gradient
        width += 2 * base.vocab_size
    return width * sum(_most_tokens(trial, forward.can_share_prefix) for trial in trials)


def _num_runs(base: Base) -> int:
    """How often a layer runs in one pass, at most: ALBERT's are fewer than its passes through them."""
    layers = decoder_layers(base.model)
    config = base.model.config.get_text_config(decoder=True)
    return math.ceil(config.num_hidden_layers / len(layers)) if layers else 1


def _lengths(example: Example) -> list[int]:
    """Of each text that an example runs."""
    read = [example.source] if example.source else []  # by the encoder of an encoder-decoder
    return [len(ids) for ids in (example.ids, *read, *example.others)]


def _widths(backbone: nn.Module) -> int:
    """Inputs and outputs of all matrices, lookup tables aside."""
    return sum(
        math.prod(weight.shape[:-2]) * sum(weight.shape[-2:])
        for module in backbone.modules()
        if not isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.dim() > 1
    )


def _most_tokens(trial: Trial, is_shared: bool) -> int:
    """Of any of its steps, virtual ones included: once, or with each text where they are not shared."""
    num_virtual = trial.plan.config.virtual_tokens
    own = 0 if is_shared else num_virtual
    sums = [sum(length + own for length in _lengths(example)) for example in trial.examples]
    steps = (step for steps in trial.plan.epochs for step in steps)
    return max(sum(sums[index] for index in step) for step in steps) + (num_virtual if is_shared else 0)


def _run_longest_row(base: Base, forward: Forward, trials: Sequence[Trial]) -> None:
    lengths = [max(sum(_lengths(example)) for example in trial.examples) for trial in trials]
    owner = lengths.index(max(lengths))
    longest = _longest([example for trial in trials for example in trial.examples])
    config = trials[owner].plan.config
    row = replace(training_row(longest, config), prompt=owner)
    leaves = [trial.prompt().requires_grad_(True) for trial in trials]
    heads = [trial.head() for trial in trials]
    list(accumulate_gradient(base, forward, leaves, [row], 1, config.checkpoint_layers, heads=heads))


def _longest(examples: Sequence[Example]) -> Example:
    """The longest one; of an encoder-decoder, each of whose sides is padded, the longest of either side in one."""
    found = max(examples, key=lambda example: sum(_lengths(example)))
    if not found.source:
        return found
    written = max(examples, key=lambda example: len(example.ids))
    return replace(written, source=max((example.source for example in examples), key=len))


def fit_rows(
    run_one_row: Callable[[], None], wanted_rows: int, device: torch.device, free: int, share: float = _USABLE_SHARE
) -> int:
    """Rows per micro-batch, at most `wanted_rows`, from the measured peak of the longest row and `free` bytes.

    Raises MemoryLimitError where even one row takes more than `share` of them.
    """
    if device.type == "mps":
        return wanted_rows
    peak = _measured_peak(run_one_row, device)
    rows = int(free * share // max(peak, 1))
    if rows < 1:
        raise MemoryLimitError(
            f"one row takes {peak / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free; use shorter rows "
            "(--max-length), bfloat16 or a smaller base"
        )
    return min(rows, wanted_rows)


def _measured_peak(run: Callable[[], None], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    _return_free_heap()
    before = _reset_peak()
    run()
    return peak_bytes() - before


def _return_free_heap() -> None:
    """Give freed memory back to the kernel: were it resident, the row would reuse it and its peak look small."""
    with suppress(OSError, AttributeError):  # a C library without malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> int:
    """Make the kernel count the peak from now on (Linux, since 4.0); what is resident now."""
    with suppress(OSError):  # not Linux, or not allowed: the whole process's peak counts, a cautious fit
        Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """Peak resident size of this process."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
