"""Settings are checked where they are made: types, closed sets and names, alike in Python, TOML, flags and HTTP."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from support.command_line import run

from softprompt.config import (
    BaseConfig,
    DataConfig,
    EngineConfig,
    Reparameterisation,
    SamplingConfig,
    Schedule,
    ServerConfig,
    Start,
    TrainConfig,
    check_start_stays,
    make_config,
)
from softprompt.errors import ConfigError
from softprompt.evaluation import ScoreConfig
from softprompt.server.errors import ApiError
from softprompt.server.jobs.schemas import CreateJob
from softprompt.server.jobs.settings import job_settings

CONFIGS = [BaseConfig, DataConfig, TrainConfig, SamplingConfig, EngineConfig, ServerConfig, ScoreConfig]
NEEDED = {BaseConfig: {"base": "x"}, DataConfig: {"data": "x"}}
FIELDS = [(kind, item.name) for kind in CONFIGS for item in dataclasses.fields(kind)]
WRONG = [object(), b"x", [object()], {"a": object()}, 1j, type]


def refusal(kind, **settings):
    with pytest.raises(ConfigError) as caught:
        kind(**{**NEEDED.get(kind, {}), **settings})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda part: getattr(part, "__name__", part))
def test_a_value_of_a_wrong_type_is_refused_by_its_name(kind, name):
    for value in WRONG:
        assert refusal(kind, **{name: value}).startswith(name)
    hint = kind.__dataclass_fields__[name].type
    if not hint.startswith("bool"):
        assert refusal(kind, **{name: True}).startswith(f"{name} is True; ")
    if hint.startswith(("int", "float")):
        assert refusal(kind, **{name: "4"}).startswith(f"{name} is '4'; ")
        assert refusal(kind, **{name: float("nan")}).startswith(f"{name} is nan; it must be ")
        assert refusal(kind, **{name: float("inf")}).startswith(f"{name} is inf; it must be ")
        assert refusal(kind, **{name: 10**5000}).startswith(f"{name} is a number of very many digits; ")
    if hint.startswith("int"):
        assert refusal(kind, **{name: 1.0}).startswith(f"{name} is 1.0; ")
        assert refusal(kind, **{name: -1}).startswith(f"{name} is -1; ")


@pytest.mark.parametrize(
    ("name", "value", "near", "known"),
    [
        ("reparameterisation", "mlp", "residual-mlp", Reparameterisation),
        ("schedule", "linaer", "linear", Schedule),
        ("schedule", "poly", None, Schedule),
        ("init", "Vocab", "vocab", Start),
        ("init", "foo", None, Start),
    ],
)
def test_a_value_outside_of_a_closed_set_comes_with_the_nearest_and_all(name, value, near, known):
    hint = f"did you mean {near!r}? " if near else ""
    listed = ", ".join(map(repr, get_args(known)))
    assert refusal(TrainConfig, **{name: value}) == f"{name} is {value!r}; {hint}it must be one of {listed}"


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        (TrainConfig, "virtual_token", "did you mean 'virtual_tokens'?"),
        (TrainConfig, "num_virtual_tokens", "did you mean 'virtual_tokens'?"),
        (TrainConfig, "num_train_epochs", "did you mean 'epochs'?"),
        (TrainConfig, "per_device_train_batch_size", "did you mean 'batch_rows'?"),
        (TrainConfig, "lr", "did you mean 'learning_rate'?"),
        (TrainConfig, "text_column", "text_column is a setting of DataConfig"),
        (TrainConfig, "max_length", "max_length is a setting of BaseConfig"),
        (SamplingConfig, "max_length", "did you mean 'max_new_tokens'?"),
        (BaseConfig, "model_name_or_path", "did you mean 'base'?"),
        (EngineConfig, "nonsense", "known are max_rows, "),
    ],
)
def test_an_unknown_name_comes_with_the_one_that_was_meant(kind, name, hint):
    with pytest.raises(TypeError, match="there is no setting") as caught:
        kind(**{**NEEDED.get(kind, {}), name: 1})
    assert isinstance(caught.value, ConfigError)
    assert str(caught.value).startswith(f"there is no setting {name!r} here; ")
    assert hint in str(caught.value)


def test_a_setting_without_its_name_is_refused_with_an_example():
    with pytest.raises(TypeError, match=r"takes its settings by name, TrainConfig\(virtual_tokens=\.\.\.\) say"):
        TrainConfig(20)


def test_a_bare_string_is_no_list_of_strings():
    assert refusal(SamplingConfig, stop="###") == "stop is '###'; it must be a list, ['###'] say"
    assert refusal(SamplingConfig, stop=["a", 1]) == "stop[1] is 1; it must be text in quotes"


def test_lists_numpy_numbers_paths_and_shares_become_what_the_setting_holds():
    sampling = SamplingConfig(stop=["a"], stop_ids=[np.int32(3)], logit_bias={5: 1}, temperature=np.float32(0.5))
    assert (sampling.stop, sampling.stop_ids, sampling.logit_bias) == (("a",), (3,), ((5, 1.0),))
    assert hash(sampling) is not None
    assert type(TrainConfig(virtual_tokens=np.int64(4)).virtual_tokens) is int
    assert type(TrainConfig(max_grad_norm=1).max_grad_norm) is float
    data = DataConfig(data=Path("rows.csv"), validation=0.1, test=200)
    assert (data.data, data.validation, data.test) == ("rows.csv", "0.1", "200")


def test_half_of_a_surrogate_pair_is_no_text():
    assert refusal(TrainConfig, init="text", init_text="a\ud83d") == (
        "init_text holds half of a surrogate pair, which is no text"
    )


def test_settings_that_contradict_are_refused_when_they_are_made():
    assert (
        refusal(DataConfig, template="{a}")
        == "template '{a}' needs a completion too: the two together make one example"
    )
    assert refusal(DataConfig, text_column="a", messages_column="b") == (
        "text_column and messages_column exclude each other; give one"
    )
    assert refusal(DataConfig, label_column="a", messages_column="b") == (
        "label_column and messages_column exclude each other; give one"
    )
    assert refusal(DataConfig, delimiter="::") == "delimiter is '::'; it must be one character, such as ';' or a tab"
    assert DataConfig(data="x", delimiter=r"\t").delimiter == r"\t"


@pytest.mark.parametrize("kind", CONFIGS)
def test_help_shows_what_each_setting_means(kind):
    shown = inspect.getdoc(kind)
    for item in dataclasses.fields(kind):
        default = "" if item.default is dataclasses.MISSING else f" = {item.default!r}"
        assert f"{item.name}: {item.type}{default}\n    " in shown
    assert "--" not in shown, "Python's names, not the command line's"
    assert "virtual_tokens" in str(inspect.signature(TrainConfig))


# Of one mistake: the flags, the TOML lines of its section, the hyperparameters of a job, and the one sentence.
TRAINING_MISTAKES = [
    (("--virtual-token", 3), "virtual_token = 3", {"virtual_token": 3},
     "there is no setting 'virtual_token' here; did you mean 'virtual_tokens'?"),
    (("--lr", 0.1), "lr = 0.1", {"lr": 0.1}, "there is no setting 'lr' here; did you mean 'learning_rate'?"),
    (("--epochs", "many"), "epochs = 'many'", {"epochs": "many"}, "epochs is 'many'; it must be a whole number"),
    (("--epochs", 1.5), "epochs = 1.5", {"epochs": 1.5}, "epochs is 1.5; it must be a whole number"),
    (("--learning-rate", "fast"), "learning_rate = 'fast'", {"learning_rate": "fast"},
     "learning_rate is 'fast'; it must be a number"),
    (("--schedule", "linaer"), "schedule = 'linaer'", {"schedule": "linaer"}, "schedule is 'linaer'; did you mean "
     "'linear'? it must be one of 'linear', 'cosine', 'constant', 'stable-decay'"),
    (("--epochs", 0), "epochs = 0", {"epochs": 0}, "epochs is 0; it must be at least 1"),
    (("--seed", 2**63), f"seed = {2**63}", {"seed": 2**63},
     "seed is 9223372036854775808; it must be a whole number of 63 bits at most"),
    (("--weight-decay", "nan"), "weight_decay = nan", {"weight_decay": float("nan")},
     "weight_decay is nan; it must be 0 or more, and finite"),
    (("--init", "text"), "init = 'text'", {"init": "text"},
     "init 'text' needs init_text, the instruction to start from"),
    (("--learning-rate", 0.1, "--relative-learning-rate", 0.2), "learning_rate = 0.1\nrelative_learning_rate = 0.2",
     {"learning_rate": 0.1, "relative_learning_rate": 0.2},
     "learning_rate=0.1 and relative_learning_rate=0.2 exclude each other; give one"),
]  # fmt: skip
# Of one mistake: the flags, the environment, the TOML line of [server], and the one sentence.
SERVER_MISTAKES = [
    (("--prot", 1), {"SOFTPROMPT_PROT": "1"}, "prot = 1", "there is no setting 'prot' here; did you mean 'port'?"),
    (("--port", "80OO"), {"SOFTPROMPT_PORT": "80OO"}, "port = '80OO'", "port is '80OO'; it must be a whole number"),
    (("--port", 99999), {"SOFTPROMPT_PORT": "99999"}, "port = 99999", "port is 99999; it must be between 0 and 65535"),
    (("--log-format", "xml"), {"SOFTPROMPT_LOG_FORMAT": "xml"}, "log_format = 'xml'",
     "log_format is 'xml'; it must be one of 'text', 'json'"),
    (("--drain-s", "inf"), {"SOFTPROMPT_DRAIN_S": "inf"}, "drain_s = inf",
     "drain_s is inf; it must be 0 or more, and finite"),
    (None, {"SOFTPROMPT_REQUIRE_KEYS": "maybe"}, "require_keys = 'maybe'",
     "require_keys is 'maybe'; it must be true or false"),
]  # fmt: skip


def as_setting(complaint):
    """The sentence with names as settings have them, not as flags or environment variables."""
    return re.sub(r"'(?:--|SOFTPROMPT_)([^']+)'", lambda name: f"'{name[1].lower().replace('-', '_')}'", complaint)


@pytest.mark.parametrize(("flags", "toml", "asked", "sentence"), TRAINING_MISTAKES, ids=lambda part: str(part)[:30])
def test_a_mistake_in_training_has_one_message_as_flag_in_toml_and_over_http(flags, toml, asked, sentence, tmp_path):
    train = run("train", "--base", "embedded", "--data", "data", "--out", tmp_path / "out", *flags)
    assert as_setting(train.complaint) == sentence
    file = tmp_path / "sweep.toml"
    file.write_text(f"[base]\nbase = 'embedded'\n[data]\ndata = 'x.csv'\n[train]\n{toml}\n")
    assert run("sweep", file, "--out", tmp_path / "out").complaint == f"{file} [train]: {sentence}"
    with pytest.raises(ApiError) as refused:
        job_settings(CreateJob(model="base", training_file="file", hyperparameters=asked), base=None, start=None)
    assert (refused.value.status, refused.value.message) == (400, sentence)


@pytest.mark.parametrize(("flags", "variables", "toml", "sentence"), SERVER_MISTAKES, ids=lambda part: str(part)[:30])
def test_a_mistake_in_serving_has_one_message_as_flag_variable_and_in_toml(
    flags, variables, toml, sentence, tmp_path, monkeypatch
):
    if flags is not None:  # a switch has no value on the command line
        assert as_setting(run("serve", *flags).complaint) == sentence
    file = tmp_path / "serve.toml"
    file.write_text(f"[server]\n{toml}\n")
    complaint = run("serve", "--config", file).complaint
    assert complaint.removeprefix(f"{file} [server]: ") == sentence
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert as_setting(run("serve").complaint) == sentence


def test_further_training_keeps_its_start_and_its_length_alike_as_flag_and_over_http():
    for given, sentence in (
        ({"init": "random"}, "'coach' is trained further, from what it is; leave init and init_text out"),
        ({"virtual_tokens": 9}, "virtual_tokens is 9, but 'coach' has 3 and keeps them in further training; "),
    ):
        with pytest.raises(ConfigError) as caught:
            check_start_stays(given, 3, "'coach'")
        assert str(caught.value).startswith(sentence)
        assert caught.value.param == next(iter(given))
    check_start_stays({"virtual_tokens": 3, "epochs": 2}, 3, "'coach'")


def test_the_former_way_to_make_a_config_still_works_and_names_the_new_one():
    with pytest.warns(DeprecationWarning, match=r"TrainConfig\(\*\*settings\)"):
        assert make_config(TrainConfig, {"seed": 3}) == TrainConfig(seed=3)
