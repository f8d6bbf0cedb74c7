"""The frozen base: load, freeze, fingerprint, embedding scale, dtype and device."""

from softprompt.base.load import freeze_base, load_base
from softprompt.base.model import Base

__all__ = ["Base", "freeze_base", "load_base"]
