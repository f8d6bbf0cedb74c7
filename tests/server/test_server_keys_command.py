"""softprompt keys: a key is shown once, and what is kept does not give it back."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from softprompt.cli.main import commands
from softprompt.errors import ConfigError
from softprompt.server.clients.keys import Limits, clients_by_hash, hash_of
from softprompt.server.state.database import Database


def keys(state: Path, *arguments: str) -> Result:
    return CliRunner().invoke(commands, ["keys", *arguments, "--state", str(state)], env={"COLUMNS": "160"})


def test_a_key_is_made_listed_and_revoked(tmp_path: Path) -> None:
    made = keys(tmp_path, "create", "alice", "--max-jobs", "3", "--tokens-per-minute", "1000", "--max-files", "9")
    assert re.fullmatch(r"sp-[A-Za-z0-9_-]{43}\n", made.stdout)
    assert keys(tmp_path, "create", "root", "--admin").exit_code == 0
    alice, root = json.loads(keys(tmp_path, "list", "--json").stdout)
    assert (alice["name"], alice["is_admin"], alice["revoked"]) == ("alice", False, None)
    assert alice["limits"] == {
        "requests_per_minute": None,
        "tokens_per_minute": 1000,
        "max_concurrent": None,
        "max_jobs": 3,
        "max_prompts": None,
        "max_files": 9,
        "max_stored_bytes": None,
    }
    assert root["is_admin"]
    shown = keys(tmp_path, "list").stdout
    assert alice["id"] in shown
    assert "valid" in shown
    assert keys(tmp_path, "revoke", alice["id"]).exit_code == 0
    assert json.loads(keys(tmp_path, "list", "--json").stdout)[0]["revoked"] is not None
    assert "revoked" in keys(tmp_path, "list").stdout


def test_only_the_hash_is_kept(tmp_path: Path) -> None:
    made = json.loads(keys(tmp_path, "create", "alice", "--json").stdout)
    secret = made["key"]
    assert hash_of(secret) == hashlib.sha256(secret.encode()).hexdigest()
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()
    assert secret not in keys(tmp_path, "list", "--json").stdout
    database = Database.in_folder(tmp_path)
    client = clients_by_hash(database)[hash_of(secret)]
    database.close()
    assert (client.id, client.name, client.is_admin, client.limits) == (made["id"], "alice", False, Limits())


def test_two_keys_are_never_alike(tmp_path: Path) -> None:
    made = [json.loads(keys(tmp_path, "create", "same", "--json").stdout) for _ in range(5)]
    assert len({key["id"] for key in made}) == len({key["key"] for key in made}) == 5
    assert all(len(bytes.fromhex(key["id"].removeprefix("key-"))) * 8 >= 96 for key in made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("revoke", "key-0"), "there is no key 'key-0'"),
        (("create", ""), "1 to 100 printable characters"),
        (("create", "a\nb"), "1 to 100 printable characters"),
        (("create", "x" * 101), "1 to 100 printable characters"),
    ],
)
def test_an_impossible_name_or_id_is_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = keys(tmp_path, *arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_the_servers_environment_says_where_keys_are(tmp_path: Path) -> None:
    place = {"SOFTPROMPT_STATE": str(tmp_path / "state"), "SOFTPROMPT_MAX_JOBS": "3"}
    made = json.loads(CliRunner().invoke(commands, ["keys", "create", "alice", "--json"], env=place).stdout)
    assert [key["id"] for key in json.loads(keys(tmp_path / "state", "list", "--json").stdout)] == [made["id"]]
    assert made["limits"]["max_jobs"] is None  # the server's default, which may change, is not the key's own


def test_a_limit_is_at_least_1(tmp_path: Path) -> None:
    refused = keys(tmp_path, "create", "alice", "--max-jobs", "0")
    assert refused.exit_code and str(refused.exception) == "max_jobs is 0; it must be at least 1"
