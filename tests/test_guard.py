"""Git LFS pointers are recognised wherever a file is read; other small files are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from softprompt.guard import is_lfs_pointer, lfs_pointer_problem

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:9c0e\nsize 1044992\n"


def test_a_git_lfs_pointer_is_named_with_the_command_that_fetches_the_file(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_bytes(POINTER)
    problem = lfs_pointer_problem(file)
    assert problem is not None
    assert str(file) in problem
    assert "Git LFS pointer" in problem
    assert "git lfs pull" in problem


@pytest.mark.parametrize("data", [b"", b"version 2\n", b"text\n" + POINTER, POINTER + b"x" * 2000])
def test_another_file_is_not_taken_for_a_git_lfs_pointer(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "train.csv"
    file.write_bytes(data)
    assert not is_lfs_pointer(data)
    assert lfs_pointer_problem(file) is None


def test_a_missing_file_is_not_taken_for_a_git_lfs_pointer(tmp_path: Path) -> None:
    assert lfs_pointer_problem(tmp_path / "none") is None
    assert lfs_pointer_problem(tmp_path) is None
