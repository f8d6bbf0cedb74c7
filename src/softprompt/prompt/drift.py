"""How far training moved each virtual token from where it started.

P prompt length, H embedding width.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeGuard

from torch import Tensor

from softprompt.errors import PromptError
from softprompt.prompt.similarity import unit_vectors
from softprompt.prompt.soft_prompt import SoftPrompt


@dataclass(frozen=True)
class Drift:
    """One virtual token against its start."""

    distance: float  # Euclidean, in the units of the embeddings
    relative: float | None  # distance over the start's norm; None where the start is the zero vector
    cosine: float  # of the angle between the two; 0 where either is the zero vector

    def to_json(self) -> dict[str, float | None]:
        """What a record keeps of it: an object of three numbers."""
        return asdict(self)


def drift(start_PH: Tensor, prompt: SoftPrompt) -> tuple[Drift, ...]:
    """The drift of each virtual token, in order, computed in float64.

    Raises PromptError where the start has another shape than the prompt.
    """
    if start_PH.shape != prompt.tensor.shape:
        raise PromptError(
            f"drift needs a start of the prompt's own shape {list(prompt.tensor.shape)}; "
            f"this one has {list(start_PH.shape)}"
        )
    start, end = start_PH.detach().cpu().double(), prompt.tensor.double()
    distances = (end - start).norm(dim=1).tolist()
    norms = start.norm(dim=1).tolist()
    angles = (unit_vectors(start) * unit_vectors(end)).sum(dim=1).clamp(-1, 1).tolist()
    return tuple(
        Drift(distance, distance / norm if norm else None, cosine)
        for distance, norm, cosine in zip(distances, norms, angles, strict=True)
    )


def drift_from_json(value: Any, num_virtual_tokens: int) -> tuple[Drift, ...]:  # Any: may be a stranger's JSON
    """The drift that a record keeps, one per virtual token; empty where it keeps none or something malformed."""
    tokens = value if isinstance(value, list) else []
    known = tuple(read for read in map(_read, tokens) if read is not None)
    return known if len(known) == len(tokens) == num_virtual_tokens else ()


def _read(token: Any) -> Drift | None:
    if not isinstance(token, dict):
        return None
    distance, relative, cosine = (token.get(item.name) for item in fields(Drift))
    if not (_is_number(distance) and _is_number(cosine) and (relative is None or _is_number(relative))):
        return None
    return Drift(float(distance), None if relative is None else float(relative), float(cosine))


def _is_number(value: Any) -> TypeGuard[float]:
    is_numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return is_numeric and abs(value) <= sys.float_info.max  # Python reads NaN, Infinity and endless integers as JSON
