"""What an architecture needs to run over embeddings."""

from softprompt.families.exactness import forward_of
from softprompt.families.forward import Forward, ModelCache
from softprompt.families.head import Head
from softprompt.families.held import HeldRows, Piece, Store, held_rows, in_order
from softprompt.families.known import KNOWN_FAMILIES
from softprompt.families.native import is_native
from softprompt.families.packed import KeysValues, PackedRows, Segment
from softprompt.families.products import Matrix, Products

__all__ = [
    "KNOWN_FAMILIES", "Forward", "Head", "HeldRows", "KeysValues", "Matrix", "ModelCache", "PackedRows", "Piece",
    "Products", "Segment", "Store", "forward_of", "held_rows", "in_order", "is_native",
]  # fmt: skip
