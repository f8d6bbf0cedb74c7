"""Baselines of an accuracy, and the verdict in one sentence.

An accuracy alone means nothing: where half of the rows are positive, always answering "positive" is right half of the
time. It is reported beside that, and beside the bare base with the prompt's own template and with templates that
anybody would try first. Both baselines are selected on the evaluated rows, in their favour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from softprompt.base import Base
from softprompt.data import Rows, template_fields
from softprompt.evaluation.classification import (
    Accuracy,
    accuracy_from_labels,
    label_confusion,
    labelled_rows,
    predicted_labels,
    share_right,
)
from softprompt.evaluation.heldout import Interval
from softprompt.families import Forward, forward_of
from softprompt.prompt import SoftPrompt

MOST_TEMPLATE_SCORES = 4_000  # rows times labels: with more, the base is measured with the prompt's own template only


@dataclass(frozen=True)
class Baselines:
    """Accuracies on a labelled set without training; shares of the rows that are right."""

    held_out: str
    majority_label: str
    majority: float  # always answering that label
    template: float | None  # the bare base, with the best of the templates; None for a head, which it lacks
    num_templates: int  # tried; 1: only the prompt's own


@dataclass(frozen=True)
class Verdict:
    """One prompt's accuracy on one set beside the baselines."""

    prompt: str
    num_rows: int
    accuracy: float
    interval: Interval  # Wilson's, at 95 %
    only_label: str | None  # set if it answers every row with the same label
    baselines: Baselines

    @property
    def is_better(self) -> bool:
        """Better than both baselines, beyond chance."""
        return self.interval.low > max(self.baselines.majority, self.baselines.template or 0.0)

    @property
    def text(self) -> str:
        """The verdict in plain words."""
        known, low, high = self.baselines, _of_100(self.interval.low), _of_100(self.interval.high)
        template = f"best of {known.num_templates} templates" if known.num_templates > 1 else "same template"
        bare = "" if known.template is None else f", the bare base with the {template} {_of_100(known.template)}"
        only = f" It answers {self.only_label!r} to every row." if self.only_label is not None else ""
        return (
            f"On {self.num_rows:,} rows of {known.held_out}, {self.prompt} is right {_of_100(self.accuracy)} times in "
            f"100 ({low} to {high}); always answering {known.majority_label!r} would be right {_of_100(known.majority)}"
            f"{bare}.{only} {self._conclusion()}"
        )

    def _conclusion(self) -> str:
        known = self.baselines
        always = f"always answering {known.majority_label!r}"
        rivals = [(always, known.majority)]
        rivals += [] if known.template is None else [("the bare base", known.template)]
        rival, share = max(rivals, key=lambda pair: pair[1])
        if self.is_better:
            return "That is better than both." if len(rivals) > 1 else "That is better."
        return f"That is worse than {rival}." if self.interval.high < share else f"That is no better than {rival}."


def baselines(
    base: Base, forward: Forward, set_name: str, rows: Rows, own_template: float, *, others: bool = True
) -> Baselines:
    """The baselines of one labelled set; `own_template` is the bare base's accuracy with the prompt's own template.

    `others`: try more templates.

    Raises DataError for a row whose completion is none of the form's labels.
    """
    known = labelled_rows(rows)
    counts = [known.own.count(number) for number in range(len(known.labels))]
    majority = counts.index(max(counts))
    is_affordable = len(known.own) * len(known.labels) <= MOST_TEMPLATE_SCORES
    written = written_templates(rows) if others and is_affordable else []
    shares = [own_template, *(_share_with(base, forward, rows, template) for template in written)]
    return Baselines(
        held_out=set_name,
        majority_label=_shown(known.labels[majority]),
        majority=counts[majority] / len(known.own),
        template=max(shares),
        num_templates=len(shares),
    )


def written_templates(rows: Rows) -> list[str]:
    """Three templates over the form's fields that a person might try first."""
    assert rows.form.template is not None, rows.form
    text = "\n".join(f"{{{name}}}" for name in template_fields(rows.form.template))
    options = " or ".join(_shown(label).replace("{", "{{").replace("}", "}}") for label in rows.form.labels)
    space = "" if all(label[:1].isspace() for label in rows.form.labels) else " "
    return [
        f"{text}\nAnswer:{space}",
        f"{text}\nIs this {options}?\nAnswer:{space}",
        f"Classify the text as {options}.\nText: {text}\nLabel:{space}",
    ]


def verdicts(accuracies: Sequence[Accuracy], known: Mapping[str, Baselines]) -> list[Verdict]:
    """One for each prompt (or vote) on each set; the bare base is what they are accuracy_from_labels against."""
    return [
        Verdict(
            prompt=item.prompt, num_rows=item.num_rows, accuracy=item.by_likelihood, interval=item.interval,
            only_label=_only_label(item), baselines=known[item.held_out],
        )
        for item in accuracies
        if item.prompt is not None
    ]  # fmt: skip


def verdict_of(
    base: Base, set_name: str, rows: Rows, name: str, prompt: SoftPrompt, *, others: bool = False
) -> Verdict:
    """One prompt on one set by likelihood alone, beside the bare base with the prompt's own template.

    `others`: and with more templates, the best of which counts. It reads each row twice for each label and template.
    Raises DataError for a row whose completion is none of the form's labels.
    """
    forward, known = forward_of(base), labelled_rows(rows)
    found = predicted_labels(base, forward, known, prompt)
    accuracy = accuracy_from_labels(set_name, name, known, found, None, calibrated=False)
    own = share_right(label_confusion(base, forward, known, None))
    beside = baselines(base, forward, set_name, rows, own, others=others)
    (verdict,) = verdicts([accuracy], {set_name: beside})
    return verdict


def _share_with(base: Base, forward: Forward, rows: Rows, template: str) -> float:
    known = labelled_rows(replace(rows, form=replace(rows.form, template=template)))
    return share_right(label_confusion(base, forward, known, None))


def _only_label(item: Accuracy) -> str | None:
    predicted = [sum(column) for column in zip(*item.confusion, strict=True)]
    label = item.classes[predicted.index(max(predicted))].label
    return _shown(label) if max(predicted) == item.num_rows else None


def _shown(label: str) -> str:
    return label.strip() or repr(label)


def _of_100(share: float) -> str:
    """A whole number; one decimal where rounding would make it never (0) or always (100)."""
    is_rounded_away = 0 < share < 1 and round(100 * share) in (0, 100)
    return f"{100 * share:.1f}" if is_rounded_away else f"{100 * share:.0f}"
