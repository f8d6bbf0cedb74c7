"""The C library of this package: compiled when the package is installed, where a C compiler was there."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

_LOG = logging.getLogger(__name__)
LIBRARY = "softprompt.families._native"
_ARGUMENTS: dict[str, Any] = {"n": ctypes.c_int64, "f": ctypes.c_float, "p": ctypes.c_void_p}
VERSION = 3  # as `softprompt_version` in cached_attention.c: raised with every change of a signature or a structure


@cache
def native_library() -> ctypes.CDLL | None:
    """The library; None where it was not compiled, or was compiled for another machine or from another version."""
    found = find_spec(LIBRARY)
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
        version = library.softprompt_version()
    except (OSError, AttributeError):  # compiled for another machine, or something else
        return None
    if version != VERSION:
        _LOG.warning("%s was compiled from another version; install the package again to use it", found.origin)
        return None
    return library


@cache
def native_function(name: str, arguments: str) -> Any:  # Any: a function of ctypes
    """A function of the library, which has to be there. `arguments`: n int64, f float, p pointer, a letter for each."""
    library = native_library()
    assert library is not None
    function = library[name]
    function.argtypes = [_ARGUMENTS[letter] for letter in arguments]
    return function
