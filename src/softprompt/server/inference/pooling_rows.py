"""One item of a pooling request's `input` as rows of the engine, in the form that the prompt was trained on.

Texts and fields are written as the training rows were; token ids are read as they stand. Nothing is cut: what does not
fit is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from softprompt.base import Base
from softprompt.data import input_ids, task_inputs, template_text
from softprompt.data.task_examples import pooled_columns
from softprompt.engine.pooling import BARE_EMBEDDING
from softprompt.evaluation.classification import label_rows
from softprompt.prompt import SoftPrompt
from softprompt.server.errors import ApiError
from softprompt.server.inference.tokenise import check_length, checked_ids, context_error
from softprompt.server.prompts.model import Model
from softprompt.splice import Row
from softprompt.types import InputForm

Item = str | Mapping[str, str] | list[int]


def rows_of_item(base: Base, model: Model, item: Item, number: int) -> tuple[Row, ...]:
    """The row of item `number`, or one for each label where they are chosen by their likelihood.

    Raises ApiError and DataError for an item that cannot be read.
    """
    prompt = model.prompt
    if prompt is not None and prompt.record.form.task == "generate":
        return tuple(_label_rows(base, prompt, item, number))
    form = BARE_EMBEDDING if prompt is None else prompt.record.form
    num_virtual = 0 if prompt is None else prompt.num_virtual_tokens
    if isinstance(item, list):
        row = _row_of_ids(base, form, checked_ids(base, item, number, "input"), number)
    else:
        row = _row_of_text(base, form, item, number, num_virtual)
    return (replace(row, prompt=None if prompt is None else 0),)


def _label_rows(base: Base, prompt: SoftPrompt, item: Item, number: int) -> list[Row]:
    form = prompt.record.form
    if not isinstance(item, list):
        text = template_text(form, item)
        check_length(base, input_ids(base, text=text, max_ids=base.max_length))
        return label_rows(base, text, form.labels, prompt)
    ids = checked_ids(base, item, number, "input")
    return [_behind(ids, row) for row in label_rows(base, base.decode(ids), form.labels, prompt)]


def _behind(ids: tuple[int, ...], row: Row) -> Row:
    """The row with other token ids before its label."""
    if row.source:
        return replace(row, source=ids)
    label = [token for token, wanted in zip(row.ids, row.targets or (), strict=True) if wanted]
    return replace(row, ids=(*ids, *label), targets=(False,) * len(ids) + (True,) * len(label))


def _row_of_text(
    base: Base, form: InputForm, item: str | Mapping[str, str], number: int, num_virtual: int
) -> Row:  # fmt: skip
    found = task_inputs(base, form, item, max_length=base.max_length - num_virtual)
    if not found:
        raise _refusal(f"text {number} is empty; give at least one word")
    if found[0].is_truncated:
        beside = f" beside {num_virtual} virtual tokens" if num_virtual else ""
        raise context_error(base, f"sent a text {number} that does not fit{beside}; shorten it")
    return Row.of(found[0].example, 0, ())


def _row_of_ids(base: Base, form: InputForm, ids: tuple[int, ...], number: int) -> Row:
    num_before = len(base.bos_ids) if form.placement == "after-cls" else 0
    if not ids:
        raise _refusal(f"text {number} has no token id; give at least one")
    if ids[:num_before] != base.bos_ids[:num_before]:
        raise _refusal(
            f"text {number} begins with the token id {ids[0]}; token ids are read as they stand, so they have to begin "
            f"with {list(base.bos_ids)}, behind which the soft prompt stands"
        )
    if form.task != "cloze":
        return Row(ids, 0, num_before=num_before, columns=pooled_columns(base, form, len(ids)))
    if ids.count(base.mask_id) != 1:
        raise _refusal(f"text {number} has {ids.count(base.mask_id)} masks (id {base.mask_id}); it needs one")
    return Row(ids, 0, num_before=num_before, columns=(ids.index(base.mask_id),))


def _refusal(message: str) -> ApiError:
    return ApiError(400, message, "invalid_value", "input")
