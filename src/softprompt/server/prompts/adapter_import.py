"""Soft prompts from outside: a folder, the Hub, an uploaded form. Everything is data, checked before it is used.

The functions block on the disk and the network.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
from typing import get_args

from anyio import CapacityLimiter, to_thread
from fastapi import Request

from softprompt.base import Base
from softprompt.config import TrainConfig
from softprompt.data import task_inputs
from softprompt.data.task_examples import rows_fields
from softprompt.data.tasks import check_task
from softprompt.errors import AdapterError, ConfigError, SoftpromptError, StorageError, shortened
from softprompt.families import forward_of
from softprompt.guard import is_nested_deeper
from softprompt.loss import objective
from softprompt.openmp import release_omp_threads
from softprompt.prompt import SoftPrompt
from softprompt.server.errors import ApiError
from softprompt.server.forms import FormFile, read_form
from softprompt.storage import pull_prompt
from softprompt.storage.adapter import AdapterFiles, check_base
from softprompt.storage.atomic import disk_errors
from softprompt.storage.files import (
    CONFIG_NAME,
    MAX_RECORD_BYTES,
    MAX_TEXT_BYTES,
    MAX_WEIGHTS_BYTES,
    PICKLE_NAME,
    RECORD_NAME,
    SAFETENSORS_NAME,
    dump_object,
)
from softprompt.types import FormKind, InputForm, Placement, Pooling, PromptRecord, Task

_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_PULLS = 2  # at once
_IN_MEMORY_BYTES = 2**20  # of an uploaded file; a longer one is on the disk until it is whole
_DEEPEST_RUN = 32  # levels of lists and objects
_MOST_LABELS = 1_000  # of an uploaded head
_OF_TEXTS = ("cloze", "classify", "embed")  # tasks that the server reads texts for
_WIDEST_VALUE = 8  # bytes of one number: nobody needs more than float64


def read_folder(folder: Path, base: Base) -> SoftPrompt:
    """The soft prompt of an adapter folder, checked against the base.

    Raises: AdapterError, WrongBaseError.
    """
    return _read(AdapterFiles.read(folder), base)


def read_upload(files: Mapping[str, bytes], base: Base) -> SoftPrompt:
    """The soft prompt of an adapter's files by name: the weights and the config, and perhaps our record.

    Raises: AdapterError, WrongBaseError.
    """
    for name in (SAFETENSORS_NAME, CONFIG_NAME):
        if name not in files:
            raise AdapterError(f"the upload has no {name}; send it beside {', '.join(files) or 'the others'}")
    _refuse_pickles(files[SAFETENSORS_NAME])
    adapter = AdapterFiles(
        where="the upload",
        weights_name=SAFETENSORS_NAME,
        weights=files[SAFETENSORS_NAME],
        config=files[CONFIG_NAME],
        record=files.get(RECORD_NAME),
    )
    return _read(adapter, base)


def pull(
    repository: str, revision: str | None, base: Base, *, offline: bool = False, anonymous: bool = False
) -> SoftPrompt:
    """The soft prompt of a repository on the Hub; `offline` reads what an earlier pull has left on this machine.

    `anonymous`: without the operator's token and cache. Raises: AdapterError, WrongBaseError; ApiError 400 where the
    Hub refuses, 403 where an anonymous pull would need the cache.
    """
    if anonymous and offline:
        raise ApiError(403, "this server asks nothing of the Hub (--offline), and only an admin's key may have what it "
                            "keeps of it; upload the files", param="hub")  # fmt: skip
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"{shortened(repository)} is not a repository's name; write it as owner/name")
    with tempfile.TemporaryDirectory(prefix="softprompt-hub-") as scratch:
        try:
            target = Path(scratch) / "adapter"
            folder = pull_prompt(repository, target, revision=revision, offline=offline, anonymous=anonymous)
        except AdapterError:
            raise
        except StorageError as error:
            asked = "; it was asked without a token, as for every key that is not an admin's" if anonymous else ""
            raise ApiError(400, f"{error}{asked}", "hub_error", "hub") from error
        files = AdapterFiles.read(folder, where=repository)
    if files.weights_name == PICKLE_NAME:
        raise AdapterError(f"{repository} holds a pickle ({PICKLE_NAME}); ask its author for {SAFETENSORS_NAME}")
    return _read(files, base)


def upload_limits(base: Base) -> dict[str, int]:
    """The files that an upload may consist of, with the largest size of each on this base (bytes)."""
    width = max(base.hidden_size, getattr(base.model.config.get_text_config(), "hidden_size", 0))
    of_head = (2 * width + _MOST_LABELS) * width  # a head has a dense layer, perhaps a pooler, and a row for each label
    longest = (base.max_length * base.hidden_size + of_head) * _WIDEST_VALUE + MAX_TEXT_BYTES
    return {
        SAFETENSORS_NAME: min(MAX_WEIGHTS_BYTES, longest),
        CONFIG_NAME: MAX_TEXT_BYTES,
        RECORD_NAME: MAX_RECORD_BYTES,
    }


async def read_adapter_form(request: Request, max_bytes: Mapping[str, int]) -> tuple[dict[str, str], dict[str, bytes]]:
    """A form's fields, and its files by these names, none longer than its limit.

    Raises ApiError 400 or 413, StorageError.
    """
    received: dict[str, FormFile] = {}
    with ExitStack() as stack:

        def open_file(name: str, filename: str) -> FormFile | None:
            if not filename:
                return None
            _check_filename(filename, received, max_bytes)
            most = max_bytes[filename]
            too_large = f"{filename} is larger than {most:,} bytes, the limit for this base"
            file = stack.enter_context(SpooledTemporaryFile(_IN_MEMORY_BYTES))
            received[filename] = FormFile(file, filename, most, too_large)
            return received[filename]

        with disk_errors(Path(gettempdir())):
            fields = await read_form(request, open_file, sum(max_bytes.values()))
            for each in received.values():
                each.file.seek(0)
            return fields, {name: each.file.read() for name, each in received.items()}


def _check_filename(name: str, received: Mapping[str, FormFile], max_bytes: Mapping[str, int]) -> None:
    if name not in max_bytes:
        allowed = ", ".join(max_bytes)
        why = "; a pickle may hold code and is never read" if name.endswith((".bin", ".pt", ".pth", ".pkl")) else ""
        raise ApiError(
            400, f"{shortened(name)} is not a file of an adapter; send {allowed}{why}", "invalid_value", "files"
        )
    if name in received:
        raise ApiError(400, f"the form has {name} twice", "invalid_value", "files")


class Hub:
    """Pulls prompts from the Hugging Face Hub, few at a time."""

    def __init__(self, base: Base, *, offline: bool = False) -> None:
        """`offline`: read only what an earlier pull has left on this machine."""
        self._base = base
        self._offline = offline
        self._limit = CapacityLimiter(_PULLS)  # threads of its own: a slow Hub must not block the disk's

    async def pull(self, repository: str, revision: str | None, *, is_admin: bool) -> SoftPrompt:
        """See `pull`. Only admins get what the operator's token may read, or has read before."""
        work = partial(pull, repository, revision, self._base, offline=self._offline, anonymous=not is_admin)
        return await to_thread.run_sync(work, limiter=self._limit)


def _read(files: AdapterFiles, base: Base) -> SoftPrompt:
    try:
        return _checked(files, base)
    finally:
        release_omp_threads()  # of a large prompt's checks: this thread may live as long as the server


def _checked(files: AdapterFiles, base: Base) -> SoftPrompt:
    prompt = files.parse()
    _check_record(prompt.record, files.where)
    says_no_base = prompt.record.base_fingerprint is None  # PEFT's own: only the width can be compared
    check_base(prompt, base, force=says_no_base, where=files.where)
    _check_task(prompt.record.form, base, files.where)
    if prompt.num_virtual_tokens >= base.max_length:
        raise AdapterError(
            f"{files.where} has {prompt.num_virtual_tokens} virtual tokens; {base.name!r} has {base.max_length} "
            "positions in all, so no text fits behind it"
        )
    return prompt


def _check_task(form: InputForm, base: Base, where: str) -> None:
    """Check that the base can do the task, and that the form writes its inputs. Raises AdapterError."""
    if form.task == "generate":
        return
    try:
        check_task(base, form.task, TrainConfig())
        objective(base, forward_of(base), form)
        if form.task in _OF_TEXTS:
            task_inputs(base, form, dict.fromkeys(rows_fields(form), "1"), max_length=base.max_length)
    except (SoftpromptError, AssertionError, ValueError, KeyError, TypeError) as error:  # a stranger's record
        why = str(error) if isinstance(error, SoftpromptError) else "it is malformed"
        raise AdapterError(f"{where}: the record's form for task {form.task!r} cannot be used: {why}") from error


def _check_record(record: PromptRecord, where: str) -> None:
    """Check that a stranger's record can be used, and written again."""
    form = record.form
    texts = (form.template, form.completion, *form.labels, *(word for words in form.label_words for word in words))
    if form.kind not in get_args(FormKind) or not all(isinstance(text, str | None) for text in texts):
        raise AdapterError(
            f"{where}: the record's form is malformed; its kind is one of {', '.join(get_args(FormKind))}"
        )
    for name, kind in (("task", Task), ("placement", Placement), ("pooling", Pooling)):
        value = getattr(form, name)
        if value not in get_args(kind) and not (name == "pooling" and value is None):
            raise AdapterError(f"{where}: the record's {name} is {shortened(value)}; it is one of {_listed(kind)}")
    if not isinstance(form.has_decoder_prompt, bool):
        raise AdapterError(f"{where}: the record's has_decoder_prompt is {shortened(form.has_decoder_prompt)}")
    if is_nested_deeper(record.run, _DEEPEST_RUN):
        raise AdapterError(f"{where}: the record's run is nested deeper than {_DEEPEST_RUN}; shorten it")
    try:
        dump_object(record.to_json())
    except UnicodeEncodeError as error:
        raise AdapterError(f"{where}: the record holds half a character ({error.reason}); write it again") from error


def _listed(kind: object) -> str:
    return ", ".join(get_args(kind))


def _refuse_pickles(weights: bytes) -> None:
    """torch.save writes a zip with a pickle in it; older files are the pickle itself."""
    for beginning, kind in ((b"PK", "a zip archive"), (b"\x80", "a pickle"), (b"\x1f\x8b", "a gzip archive")):
        size = int.from_bytes(weights[:8], "little")  # of the header, were it safetensors
        if weights.startswith(beginning) and size > len(weights):
            raise AdapterError(
                f"{SAFETENSORS_NAME} is {kind}, which may hold code or unfold to any size; send a safetensors file"
            )
