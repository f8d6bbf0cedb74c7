"""The frozen base: load, freeze, fingerprint, embedding scale, dtype and device."""

from softprompt.base.device import free_bytes
from softprompt.base.generation import GenerationRules
from softprompt.base.load import freeze_base, load_base
from softprompt.base.model import Base, PerLayerEmbeddings

__all__ = ["Base", "GenerationRules", "PerLayerEmbeddings", "free_bytes", "freeze_base", "load_base"]
