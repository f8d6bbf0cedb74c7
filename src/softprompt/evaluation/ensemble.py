"""Several prompts for one task that vote on each label: Lester et al. 2021, "Prompt Ensembling", 2104.08691.

M prompts, N texts, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from softprompt.base import Base
from softprompt.data import Rows
from softprompt.errors import ConfigError
from softprompt.evaluation.classification import (
    Accuracy,
    accuracy_from_labels,
    confusion_matrix,
    label_scores,
    labelled_rows,
    share_right,
    usable_content_free,
)
from softprompt.families import Forward
from softprompt.prompt import SoftPrompt

Ensembles = Mapping[str, Mapping[str, SoftPrompt]]  # name -> its members by name


def vote(scores_MNK: np.ndarray) -> list[int]:
    """For each text, the number of the label that most prompts find the likeliest.

    `scores_MNK` [M, N, K] are each prompt's log-likelihoods. A tie is decided by the log-likelihoods summed
    over all prompts, then by the order of the labels.
    """
    num_labels = scores_MNK.shape[2]
    votes_NK = (scores_MNK.argmax(axis=2)[..., None] == np.arange(num_labels)).sum(axis=0)
    standing = zip(votes_NK.tolist(), scores_MNK.sum(axis=0).tolist(), strict=True)
    return [max(range(num_labels), key=lambda label: (votes[label], sums[label])) for votes, sums in standing]


def check_ensembles(ensembles: Ensembles, sets: Mapping[str, Rows]) -> None:
    """Raises ConfigError where no set has labels to vote on."""
    if ensembles and not any(rows.form.labels for rows in sets.values()):
        where = f"the held-out rows have none ({', '.join(sets)})" if sets else "there are no held-out rows"
        raise ConfigError(f"the prompts of {next(iter(ensembles))} vote on labels, and {where}; give labelled --data")


def vote_accuracies(
    base: Base,
    forward: Forward,
    ensembles: Ensembles,
    sets: Mapping[str, Rows],
    max_length: int | None = None,
    *,
    calibrate: bool = False,
) -> list[Accuracy]:
    """Each ensemble on each set that has labels. Raises as `accuracy` does."""
    labelled = {name: rows for name, rows in sets.items() if rows.form.labels}
    return [
        vote_accuracy(base, forward, set_name, rows, name, members, max_length, calibrate=calibrate)
        for set_name, rows in labelled.items()
        for name, members in ensembles.items()
    ]


def vote_accuracy(
    base: Base,
    forward: Forward,
    set_name: str,
    rows: Rows,
    name: str,
    members: Mapping[str, SoftPrompt],
    max_length: int | None = None,
    *,
    calibrate: bool = False,
) -> Accuracy:
    """One ensemble on one labelled set, all of its prompts scored in one pass. Raises as `accuracy` does."""
    known = labelled_rows(rows)
    content_free = usable_content_free(base, known) if calibrate else []
    scores_MNK = label_scores(
        base, forward, known.texts, known.labels, list(members.values()), max_length, content_free
    )
    alone = {
        member: share_right(confusion_matrix(known.own, scores_NK.argmax(axis=1).tolist(), len(known.labels)))
        for member, scores_NK in zip(members, scores_MNK, strict=True)
    }
    return accuracy_from_labels(set_name, name, known, vote(scores_MNK), None, calibrated=calibrate, members=alone)
