"""softprompt serve"""

from __future__ import annotations

import gc
import importlib.util
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.command import Command, config_of, options_of
from softprompt.cli.serve_settings import ENVIRONMENT, check_environment, take_file
from softprompt.config import EMBEDDED_BASE, BaseConfig, EngineConfig, ServerConfig
from softprompt.embedded import prompts_folder
from softprompt.errors import MissingDependencyError
from softprompt.openmp import release_omp_threads

if TYPE_CHECKING:
    from fastapi import FastAPI

_PACKAGES = (
    "fastapi",
    "uvicorn",
    "httptools",
    "sqlalchemy",
    "alembic",
    "prometheus_client",
    "watchfiles",
    "python_multipart",
)


_SECTIONS = {"Server": ServerConfig, "Base": BaseConfig, "Engine": EngineConfig}
_EXAMPLES = (
    "softprompt serve",
    "softprompt serve --base bigscience/bloomz-560m --library prompts --port 9000",
    "softprompt keys create me && softprompt serve --base BASE --host 0.0.0.0",
    "SOFTPROMPT_PORT=9000 softprompt serve --config serve.toml",
)


@click.command(
    "serve", cls=Command, context_settings={"auto_envvar_prefix": ENVIRONMENT}, sections=_SECTIONS, examples=_EXAMPLES
)
@options_of(BaseConfig, optional=True)
@options_of(ServerConfig)
@options_of(EngineConfig)
@click.option("--config", type=click.Path(), is_eager=True, expose_value=False, callback=take_file,
              help="TOML file with settings: these flags' names, with underscores.")  # fmt: skip
def command(**flags: Any) -> None:
    """Serve a base and its prompts over OpenAI's API, and train new prompts meanwhile.

    Without --base it is the embedded one, with the prompts that the package carries unless --library names others.
    Every flag can also be given in the environment, as SOFTPROMPT_PORT is for --port, or in a file (--config); flags
    come before the environment, and that before the file.
    """
    check_environment({*flags, "config"})
    flags["base"] = EMBEDDED_BASE if flags["base"] is None else flags["base"]
    configs = (config_of(BaseConfig, flags), config_of(ServerConfig, flags), config_of(EngineConfig, flags))
    _require_packages()
    _serve(configs[0], _with_prompts(configs[0], configs[1]), configs[2])


def _with_prompts(base_config: BaseConfig, config: ServerConfig) -> ServerConfig:
    if base_config.base != EMBEDDED_BASE or config.library is not None:
        return config
    return replace(config, library=str(prompts_folder()))


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"serving needs {', '.join(missing)}; pip install 'softprompt[serve]'")


def _serve(base_config: BaseConfig, config: ServerConfig, engine_config: EngineConfig) -> None:
    """The port first: whether it can be had is known before the base is loaded, which may take minutes."""
    from softprompt.cli.console import load
    from softprompt.server.lifecycle import bind, run_server, url_of
    from softprompt.server.start import serving_app
    from softprompt.server.telemetry.request_log import set_up_logging

    with bind(config.host, config.port) as place:
        _check_keys(config)
        base = load(base_config, training=True)  # for its jobs
        set_up_logging(config.log_format)
        app = serving_app(base, config, engine_config, offline=base_config.offline)
        _say_notes(app)
        url = url_of(place)
        release_omp_threads()
        _spare_the_collector()
        run_server(app, place, config, lambda: click.echo(_start_message(app, url)))


def _say_notes(app: FastAPI) -> None:
    from softprompt.base import Base
    from softprompt.cli.console import say
    from softprompt.engine import AsyncEngine
    from softprompt.server.dependencies import dependency_of
    from softprompt.server.prompts.capabilities import endpoints_note

    for note in (*dependency_of(app, AsyncEngine).notes, endpoints_note(dependency_of(app, Base))):
        say(f"note: {note}")


def _spare_the_collector() -> None:
    """A full collection looks at every object of torch and transformers while all streams wait: up to 0.8 s."""
    gc.collect()
    gc.freeze()


def _check_keys(config: ServerConfig) -> None:
    """Before the base is loaded, too. Raises ConfigError where keys are asked for and nobody has one."""
    from softprompt.server.clients.auth import check_listening
    from softprompt.server.state.database import Database

    with closing(Database.of(config)) as database:
        check_listening(config, database)


def _start_message(app: FastAPI, url: str) -> str:
    from softprompt.server.clients.auth import asks_for_keys
    from softprompt.server.dependencies import dependency_of
    from softprompt.server.prompts.registry import PromptRegistry

    registry = dependency_of(app, PromptRegistry)
    num_prompts = sum(1 for _ in registry.all_prompts())
    keys = "API keys are asked for" if asks_for_keys(dependency_of(app, ServerConfig)) else "no API key is asked for"
    prompts = f"{num_prompts} prompt{'' if num_prompts == 1 else 's'}"
    return f"{url}/v1 serves {registry.base.id} and {prompts}; {keys}; Ctrl-C stops it"
