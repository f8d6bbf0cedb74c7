"""Vectors by their direction alone, for cosines. A zero vector has none; its cosine to anything is 0."""

from __future__ import annotations

from torch import Tensor


def unit_vectors(vectors_NH: Tensor) -> Tensor:
    """Each vector [H] of [N, H] scaled to norm 1, in the same dtype; zero vectors stay zero."""
    largest_N1 = vectors_NH.abs().amax(dim=1, keepdim=True)
    scaled_NH = vectors_NH / largest_N1.where(largest_N1 > 0, 1)  # before squaring, which would overflow or vanish
    norm_N1 = scaled_NH.norm(dim=1, keepdim=True)
    unit_NH: Tensor = scaled_NH / norm_N1.where(norm_N1 > 0, 1)
    return unit_NH


def cosines(one_AH: Tensor, other_BH: Tensor) -> Tensor:
    """Cosine of every vector of one to every vector of the other, [A, B]."""
    return unit_vectors(one_AH) @ unit_vectors(other_BH).T
