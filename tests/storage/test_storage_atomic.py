"""Whole or not at all: errors, interrupts, a full disk and a killed process leave nothing half-written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from softprompt.errors import ExistsError, StorageError
from softprompt.storage import atomic
from softprompt.storage.atomic import append_line, remove_folder, write_file, write_files, write_folder

# The module alone, without the room's torch: a new process then starts at once.
ATOMIC = (
    "import sys; from pathlib import Path; from importlib import util\n"
    f"spec = util.spec_from_file_location('atomic', {atomic.__file__!r})\n"
    "atomic = util.module_from_spec(spec); spec.loader.exec_module(atomic)\n"
)
FILES = {"a.bin": b"a" * 1000, "b.json": b"{}"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def failing_sync(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException, int], None]:
    """Make the Nth fsync raise: by then the file's bytes are written."""

    def arrange(error: BaseException, on_call: int) -> None:
        real, calls = os.fsync, iter(range(1, 10_000))

        def fsync(descriptor: int) -> None:
            if next(calls) == on_call:
                raise error
            real(descriptor)

        monkeypatch.setattr(atomic.os, "fsync", fsync)

    return arrange


def test_a_new_folder_has_exactly_the_files_and_usual_permissions(tmp_path: Path) -> None:
    write_folder(tmp_path / "deep" / "new", FILES)
    assert contents(tmp_path) == {f"deep/new/{name}": data for name, data in FILES.items()}
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "deep" / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_empty_folder_gives_way_and_a_full_one_does_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", FILES)
    with pytest.raises(ExistsError, match="exists and is not empty"):
        write_folder(tmp_path / "empty", {"c": b"c"})
    assert contents(tmp_path / "empty") == FILES


def test_replacing_leaves_only_the_new_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"old": b"old"})
    write_folder(tmp_path / "x", FILES, replace=True)
    assert contents(tmp_path) == {f"x/{name}": data for name, data in FILES.items()}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "io"), KeyboardInterrupt()])
@pytest.mark.parametrize("on_call", [1, 2, 3])
def test_an_error_in_the_middle_leaves_what_was_there(
    tmp_path: Path, failing_sync: Callable[..., None], error: BaseException, on_call: int
) -> None:
    write_folder(tmp_path / "x", {"old": b"old"})
    failing_sync(error, on_call)
    with pytest.raises((StorageError, KeyboardInterrupt)):
        write_folder(tmp_path / "x", FILES, replace=True)
    assert contents(tmp_path) == {"x/old": b"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


def test_a_failing_second_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "x", {"old": b"old"})
    real, calls = os.rename, iter(range(1, 100))

    def rename(source: Path, target: Path) -> None:
        if next(calls) == 2:
            raise OSError(errno.EIO, "io")
        real(source, target)

    monkeypatch.setattr(atomic.os, "rename", rename)
    with pytest.raises(StorageError, match="cannot write"):
        write_folder(tmp_path / "x", FILES, replace=True)
    assert contents(tmp_path) == {"x/old": b"old"}


def test_files_are_all_staged_before_the_first_is_renamed(tmp_path: Path, failing_sync: Callable[..., None]) -> None:
    write_files(tmp_path, {"a.bin": b"old a", "b.json": b"old b", "kept": b"k"})
    failing_sync(OSError(errno.ENOSPC, "full"), 2)
    with pytest.raises(StorageError, match=r"no space left on the disk for .*b\.json \(2 bytes\)"):
        write_files(tmp_path, FILES)
    assert contents(tmp_path) == {"a.bin": b"old a", "b.json": b"old b", "kept": b"k"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "metrics").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="no space left on the disk"):
        append_line(tmp_path / "metrics", b"{}")


def test_a_full_disk_leaves_the_old_files_whole(tmp_path: Path) -> None:
    """A tmpfs of 64 KiB, in a mount namespace of its own."""
    code = (
        f"{ATOMIC}from softprompt.errors import StorageError\n"
        "write_folder = atomic.write_folder\n"
        "disk = Path(sys.argv[1])\n"
        "write_folder(disk / 'x', {'old': b'old'})\n"
        "try: write_folder(disk / 'x', {'a': b'a' * 1000, 'b': b'b' * 10**6}, replace=True)\n"
        "except StorageError as error: print(error)\n"
        "print(sorted(str(p.relative_to(disk)) for p in disk.rglob('*')))\n"
    )
    script = f'mount -t tmpfs -o size=64k none {tmp_path} && exec {sys.executable} -c "$CODE" {tmp_path}'
    environment = {**os.environ, "CODE": code, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script], env=environment, capture_output=True, text=True, timeout=60
        )
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"may not mount a tmpfs: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    said, left = done.stdout.strip().splitlines()
    assert "no space left on the disk" in said
    assert "1,000,000 bytes" in said
    assert left == "['x', 'x/old']"


def test_a_killed_process_leaves_the_old_folder_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"old": b"old"})
    code = (
        f"{ATOMIC}import os, signal\n"
        "real, calls = os.fsync, iter(range(1, 100))\n"
        "def fsync(fd):\n"
        "    if next(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(fd)\n"
        "atomic.os.fsync = fsync\n"
        "atomic.write_folder(Path(sys.argv[1]), {'a': b'a', 'b': b'b'}, replace=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert contents(tmp_path / "x") == {"old": b"old"}
    assert all(path.name == "x" or path.name.startswith(".x.") for path in tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot write .*file/x"):
        write_folder(tmp_path / "file" / "x", FILES)
    with pytest.raises(StorageError, match="cannot write"):
        write_file(tmp_path / "absent" / "x", b"")


def test_a_folder_is_removed_and_a_line_appended(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", FILES)
    remove_folder(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    append_line(tmp_path / "lines", b"one")
    append_line(tmp_path / "lines", b"two")
    assert (tmp_path / "lines").read_bytes() == b"one\ntwo\n"
