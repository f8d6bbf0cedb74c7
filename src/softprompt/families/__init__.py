"""What an architecture needs to run over embeddings."""

from softprompt.families.forward import Forward, forward_of, new_cache
from softprompt.families.known import KNOWN_FAMILIES

__all__ = ["KNOWN_FAMILIES", "Forward", "forward_of", "new_cache"]
