"""Adapters to and from the Hugging Face Hub, through huggingface_hub.

Tested against a small HTTP server that answers as the Hub does; it has never been run against the real Hub.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from softprompt.base import Base
from softprompt.errors import ConfigError, StorageError
from softprompt.storage.adapter import AdapterFiles
from softprompt.storage.atomic import write_folder
from softprompt.storage.card import PLAIN_WORD, is_hub_id, model_card
from softprompt.storage.files import (
    CARD_NAME,
    CONFIG_NAME,
    MAX_RECORD_BYTES,
    MAX_TEXT_BYTES,
    MAX_WEIGHTS_BYTES,
    PICKLE_NAME,
    RECORD_NAME,
    SAFETENSORS_NAME,
    dump_object,
    parse_object,
    read_file,
)
from softprompt.storage.peft_config import TASK_TYPE
from softprompt.storage.save import check_free

_MAX_BYTES = {
    SAFETENSORS_NAME: MAX_WEIGHTS_BYTES,
    PICKLE_NAME: MAX_WEIGHTS_BYTES,
    RECORD_NAME: MAX_RECORD_BYTES,
    CARD_NAME: MAX_TEXT_BYTES,
    CONFIG_NAME: MAX_TEXT_BYTES,
}


def push_prompt(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload an adapter's four files to a model repository, made where it is missing; gives back the commit's URL.

    The folder is loaded first, so nothing broken is published. Of the record's run only numbers and plain words are
    sent: no path, no sentence. `token` defaults to the one huggingface_hub keeps; `private` counts only when the
    repository is made; `revision` is a branch, made where it is missing.
    Tested against an HTTP double only, never against the real Hub.

    Raises: AdapterError for a folder that does not load, StorageError for what the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = _publishable(Path(folder))
    with _hub_errors(repo_id):
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: an organisation's default holds
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()]
        commit = api.create_commit(
            repo_id=repo_id, revision=revision, operations=operations, commit_message="Upload soft prompt"
        )
    return str(commit.commit_url)


def pull_prompt(
    repo_id: str,
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    anonymous: bool = False,
    offline: bool = False,
    overwrite: bool = False,
    base: Base | None = None,
    force: bool = False,
) -> Path:
    """Download an adapter to `folder` as it is on the Hub, checked as `load_prompt` checks; gives back the folder.

    Only an adapter's own files are fetched, safetensors where both kinds are there, and none over its size limit.
    `offline` uses what an earlier pull left in the cache. `anonymous` sends no token, not even the one that this
    machine keeps, and neither reads nor fills the cache, which may contain private repositories.
    For a library, give `library.place(name)` as the folder.
    Tested against an HTTP double only, never against the real Hub.

    Raises: StorageError for what the Hub refuses, AdapterError and WrongBaseError as `load_prompt`, ExistsError;
    ConfigError where anonymous and offline, or a token, are asked for at once.
    """
    if anonymous and (offline or token is not None):
        raise ConfigError(f"anonymous excludes {'offline' if offline else 'a token'}; give one of them")
    target = Path(folder)
    check_free(target, overwrite=overwrite)
    with ExitStack() as stack:
        cache = stack.enter_context(TemporaryDirectory(prefix="softprompt-hub-")) if anonymous else None
        with _hub_errors(repo_id):
            snapshot = _cached(repo_id, revision) if offline else _download(repo_id, revision, token, cache)
        files = _read(snapshot, repo_id, base, force)
    write_folder(target, files, replace=overwrite)
    return target


def _read(snapshot: Path, repo_id: str, base: Base | None, force: bool) -> dict[str, bytes]:
    """An adapter's files, checked."""
    where = f"{repo_id} on the Hub"
    adapter = AdapterFiles.read(snapshot, where=where, follow_links=True)  # the cache itself is made of links
    adapter.parse(base, force=force)
    card = read_file(snapshot, CARD_NAME, MAX_TEXT_BYTES, follow_links=True)
    found = {
        adapter.weights_name: adapter.weights,
        RECORD_NAME: adapter.record,
        CARD_NAME: card,
        CONFIG_NAME: adapter.config,
    }
    return {name: data for name, data in found.items() if data is not None}


def _publishable(folder: Path) -> dict[str, bytes]:
    """The files to push, without the path of a local base, which is private and useless elsewhere."""
    adapter = AdapterFiles.read(folder)
    config = {} if adapter.config is None else parse_object(adapter.config, f"{folder}/{CONFIG_NAME}")
    prompt = adapter.parse(task_type=TASK_TYPE if config.get("task_type") is None else None)
    if adapter.weights_name != SAFETENSORS_NAME or adapter.config is None:
        raise StorageError(
            f"{folder} lacks {SAFETENSORS_NAME} or {CONFIG_NAME}; import it into a library and push that"
        )
    named = config.get("base_model_name_or_path")
    is_local = isinstance(named, str) and not is_hub_id(named) and prompt.record.base_source is not None
    if is_local:
        config = {**config, "base_model_name_or_path": prompt.record.base_name}
        prompt = replace(prompt, record=replace(prompt.record, base_source=None))
    files = {SAFETENSORS_NAME: adapter.weights, CONFIG_NAME: dump_object(config) if is_local else adapter.config}
    if adapter.record is not None:
        files[RECORD_NAME] = publishable_record(adapter.record, f"{folder}/{RECORD_NAME}")
    card = read_file(folder, CARD_NAME, MAX_TEXT_BYTES)
    if card is None:
        return files
    return {**files, CARD_NAME: model_card(prompt).encode() if is_local else card}


def publishable_record(data: bytes, where: str) -> bytes:
    """The record as it may be published: of its run only numbers and plain words, no path and no text of the data.

    Raises: AdapterError.
    """
    value = parse_object(data, where)
    source = value.get("base_source")
    known = source if isinstance(source, str) and is_hub_id(source) else None
    return dump_object({**value, "base_source": known, "run": _plain(value.get("run") or {})})


def _plain(value: Any) -> Any:  # Any: whatever JSON holds
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items() if _is_plain(item)}
    return [_plain(item) for item in value if _is_plain(item)] if isinstance(value, list) else value


def _is_plain(value: Any) -> bool:
    return PLAIN_WORD.fullmatch(value) is not None if isinstance(value, str) else True


def _download(repo_id: str, revision: str | None, token: str | None, own_cache: str | None) -> Path:
    """Ask for names and sizes first, then fetch exactly that commit's wanted files.

    With a cache of its own (`own_cache`) no token is sent; huggingface_hub would send this machine's by default.
    """
    from huggingface_hub import snapshot_download

    sent = token if own_cache is None else False
    listed = snapshot_download(
        repo_id, revision=revision, token=sent, cache_dir=own_cache, allow_patterns=list(_MAX_BYTES), dry_run=True
    )
    sizes = {item.filename: item.file_size for item in listed}
    wanted = _wanted(set(sizes))
    if SAFETENSORS_NAME not in wanted and PICKLE_NAME not in wanted:
        raise StorageError(f"{repo_id} on the Hub has no {SAFETENSORS_NAME}; it is not an adapter: check the name")
    for name in wanted:
        limit = _MAX_BYTES[name]
        size = sizes[name]
        if size is not None and size > limit:
            raise StorageError(f"{name} of {repo_id} has {size:,} bytes; the limit is {limit:,}: not fetched")
    commit = listed[0].commit_hash
    return Path(snapshot_download(repo_id, revision=commit, token=sent, cache_dir=own_cache, allow_patterns=wanted))


def _cached(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[CONFIG_NAME], local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise StorageError(f"{repo_id} is not in the local cache; pull it once without offline") from error


def _wanted(names: set[str]) -> list[str]:
    unwanted = {PICKLE_NAME} if SAFETENSORS_NAME in names else set()
    return sorted(names - unwanted)


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Raise huggingface_hub's errors as one sentence. Its HTTP library varies by release, so no class is named."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        raise StorageError(_sentence(_reason(error), repo_id)) from error


def _reason(error: BaseException) -> BaseException:
    """The error inside huggingface_hub's wrappers (an upload's RuntimeError, a listing's DryRunError)."""
    wrapped = isinstance(error, RuntimeError) or type(error).__name__ == "DryRunError"
    return _reason(error.__cause__) if wrapped and error.__cause__ is not None else error


def _sentence(error: BaseException, repo_id: str) -> str:
    from huggingface_hub import errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.HFValidationError):
        return f"{repo_id!r} is not a repository's name; write it as owner/name"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"the Hub may not be asked for {repo_id}: HF_HUB_OFFLINE is set; unset it, or pull with offline"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} is gated; accept its terms on the Hub and give a token that may read it"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no such revision; check its branches, tags and commits"
    if status in (401, 403) and not isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub does not allow this for {repo_id} (HTTP {status}); log in (hf auth login) or give a token"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no repository {repo_id} on the Hub, or it is private; check the name, or give a token that may read it"
    if status is not None:
        return f"the Hub answered HTTP {status} for {repo_id}; try again later"
    if isinstance(error, ConnectionError | TimeoutError) or _is_transport_error(error):
        return f"the Hub cannot be reached for {repo_id} ({error}); check the network, or pull with offline"
    first_line = (str(error).splitlines() or [""])[0]
    return f"the Hub's answer for {repo_id} cannot be used ({type(error).__name__}: {first_line})"


def _is_transport_error(error: BaseException) -> bool:
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
