"""What others build on: names, signatures in use, flags and errors. Changing one is allowed; unnoticed it is not."""

from __future__ import annotations

import dataclasses
import inspect

import click
import pytest

import softprompt
from softprompt import config, errors
from softprompt.cli.main import commands
from softprompt.config import (
    BaseConfig,
    DataConfig,
    EngineConfig,
    PredictConfig,
    SamplingConfig,
    ServerConfig,
    TrainConfig,
)
from softprompt.evaluation import ScoreConfig

CONFIGS = [BaseConfig, DataConfig, TrainConfig, SamplingConfig, EngineConfig, ServerConfig, ScoreConfig, PredictConfig]
FLAGS = {
    "train": [BaseConfig, DataConfig, TrainConfig],
    "compare": [BaseConfig, SamplingConfig, DataConfig, ScoreConfig],
    "sweep": [BaseConfig],
    "generate": [BaseConfig, SamplingConfig, EngineConfig],
    "predict": [BaseConfig, DataConfig, PredictConfig],
    "serve": [BaseConfig, ServerConfig, EngineConfig],
}
OWN_FLAGS = {
    "train": {
        "init_from",
        "library",
        "base_id",
        "preset",
        "out",
        "overwrite",
        "tensorboard",
        "as_json",
        "resume",
        "keep_checkpoints",
        "candidates",
        "vary",
        "halving",
        "ensemble",
        "processes",
    },
    "compare": {"prompts", "sets", "library", "texts", "fields", "raw", "force", "markdown", "as_json"},
    "sweep": {"file", "out", "overwrite", "resume", "keep_checkpoints", "tensorboard", "as_json", "processes"},
    "generate": {"texts", "prompt", "library", "fields", "messages", "raw", "force", "as_json"},
    "predict": {"prompt", "library", "force", "out", "overwrite", "resume", "strict", "as_json"},
    "serve": {"config"},
}
LEFT_OUT = {  # settings of a command's configs that have no flag there
    "compare": {"validation", "test", "score_tokens"},
    "generate": {item.name for item in dataclasses.fields(EngineConfig)} - {"weights"},
    "predict": {"label_column", "template", "completion", "shuffle", "validation", "test"},
}
SOMETIMES_NEEDED = {  # a run that is resumed knows them, and so may a sweep's file; a server has the embedded base
    "compare": ("data",),
    "train": ("base", "data"),
    "sweep": ("base",),
    "serve": ("base",),
}


def test_the_public_names_are_these():
    assert sorted(softprompt.__all__) == [
        "Answer", "AsyncEngine", "Base", "BaseConfig", "Candidate", "Comparison", "DataConfig", "Engine",
        "EngineConfig", "Library", "PredictConfig", "Prediction", "Request", "SamplingConfig", "SoftPrompt",
        "SoftpromptError", "TrainConfig", "TrainResult", "compare", "freeze_base", "generate", "load_base",
        "load_prompt", "predict", "read_rows", "rows_from_records", "rows_from_texts", "save_prompt", "split_rows",
        "train", "train_together",
    ]  # fmt: skip


@pytest.mark.parametrize("name", softprompt.__all__)
def test_each_public_name_exists_and_is_documented(name):
    value = getattr(softprompt, name)
    assert value.__doc__, name
    assert not value.__doc__.startswith(f"{name}("), "a dataclass's own signature is no documentation"
    assert value.__module__.startswith(f"softprompt.{softprompt._HOME[name]}")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        softprompt.trian  # noqa: B018


def test_the_python_example_of_the_readme_works(tiny_llama, tmp_path):
    from softprompt import DataConfig, TrainConfig, compare, load_prompt, read_rows, save_prompt, train

    data = tmp_path / "texts.csv"
    data.write_text("prompt\n" + "w5 w6 w7\n" * 4)
    texts = read_rows(DataConfig(data=str(data), text_column="prompt", rows=3))
    settings = TrainConfig(virtual_tokens=2, epochs=1)
    coach = train(tiny_llama, texts, settings).prompt
    quotes = train(tiny_llama, ["w8 w9", "w10 w11"], settings).prompt
    found = compare(tiny_llama, {"coach": coach, "quotes": quotes}, ["w5 w6"])
    assert list(found.answered[0].answers) == [None, "coach", "quotes"]
    save_prompt(coach, tmp_path / "coach")
    assert load_prompt(tmp_path / "coach", tiny_llama).content_hash == coach.content_hash


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_setting_has_its_meaning(kind):
    assert kind.__doc__
    for item in dataclasses.fields(kind):
        text = item.metadata["help"]
        assert text.endswith((".", ".)", '".', "loss on it alone).")), (item.name, text)
        assert item.kw_only


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_unknown_setting_comes_with_the_nearest(kind):
    name = dataclasses.fields(kind)[0].name
    with pytest.raises(errors.ConfigError, match=f"did you mean '{name}'"):
        kind(**{f"{name}s": 1})


def test_every_error_is_in_the_tree_with_its_builtin():
    classes = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]
    tree = errors.__doc__.splitlines()
    for value in classes:
        (line,) = [line for line in tree if value.__name__ in line.split() and ("──" in line or line == value.__name__)]
        assert value.__doc__
        assert issubclass(value, errors.SoftpromptError)
        builtin = line.rpartition("(")[2].rstrip(")") if "(" in line else None
        if builtin is not None:
            assert issubclass(value, getattr(__builtins__, builtin, None) or __builtins__[builtin]), line
        parent = value.__bases__[0]
        if parent not in (errors.SoftpromptError, Exception):
            assert line.startswith(("│   ", "    ")), f"{value.__name__} hangs below {parent.__name__}"


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_the_configs_fields(name):
    command = commands.get_command(click.Context(commands), name)
    parameters = {parameter.name: parameter for parameter in command.params}
    fields = {
        item.name: (kind, item)
        for kind in FLAGS[name]
        for item in dataclasses.fields(kind)
        if item.metadata.get("flag", True)
    }
    left_out = LEFT_OUT.get(name, set())
    assert set(parameters) == (set(fields) - left_out) | OWN_FLAGS[name]
    for field in set(fields) - left_out:
        _, item = fields[field]
        parameter = parameters[field]
        assert f"--{field.replace('_', '-')}" in parameter.opts
        assert parameter.help == item.metadata["help"]
        if item.default is not dataclasses.MISSING:
            assert parameter.get_default(click.Context(command)) in (
                item.default,
                *([None] if item.default == () else []),
            )
        needed = item.default is dataclasses.MISSING
        assert parameter.required == (needed and field not in SOMETIMES_NEEDED.get(name, ()))


@pytest.mark.parametrize("name", FLAGS)
def test_a_command_line_without_flags_gives_the_configs_own_defaults(name):
    from softprompt.cli.command import config_of

    command = commands.get_command(click.Context(commands), name)
    given = {"--base": "x", "--data": "x", "--out": "x", "--prompt": "x/y"}
    known = {option for parameter in command.params for option in parameter.opts}
    arguments = [part for flag, value in given.items() if flag in known for part in (flag, value)]
    arguments += {"sweep": ["x.toml"], "generate": ["x"]}.get(name, [])
    context = command.make_context(name, arguments, click.Context(commands, **commands.context_settings))
    for kind in FLAGS[name]:
        required = {"base": "x"} if kind is BaseConfig else {"data": "x"} if kind is DataConfig else {}
        assert config_of(kind, context.params) == kind(**required)


def test_presets_are_made_of_settings():
    names = {item.name for kind in (BaseConfig, DataConfig, TrainConfig) for item in dataclasses.fields(kind)}
    assert all(set(preset) <= names for preset in config.PRESETS.values())
    TrainConfig(**config.NOTEBOOK_PRESET)


def test_every_public_function_is_annotated():
    for name in softprompt.__all__:
        value = getattr(softprompt, name)
        if inspect.isfunction(value):
            assert set(value.__annotations__) == {*inspect.signature(value).parameters, "return"}, name
