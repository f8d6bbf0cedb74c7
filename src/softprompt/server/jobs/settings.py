"""A job's hyperparameters and a TrainConfig: OpenAI's names and ours, checked before the job is accepted."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple

from softprompt.base import Base
from softprompt.config import TASK_DEFAULTS, DataConfig, TaskKind, TrainConfig, check_start_stays
from softprompt.data.rows import require_fields, template_fields
from softprompt.data.split import check_validation
from softprompt.data.tasks import check_task, mask_in
from softprompt.errors import ConfigError, DataError, shortened
from softprompt.prompt import SoftPrompt
from softprompt.server.errors import ApiError
from softprompt.server.jobs.schemas import CreateJob, Hyperparameters, Json
from softprompt.server.state.schema import JobRow
from softprompt.settings import check_names, checked_value, require
from softprompt.training.train import as_started
from softprompt.types import Task, is_row_count

_MULTIPLIER = "learning_rate_multiplier"
_OPENAI = {"n_epochs": "epochs", "batch_size": "batch_rows", _MULTIPLIER: _MULTIPLIER}
_OURS = tuple(item.name for item in fields(TrainConfig))
_SERVERS = {"micro_batch_rows": "the server fits it to its memory"}  # what a client may not choose
_ROWS = "validation"  # which of the training file's rows choose the checkpoint; no setting of TrainConfig
_TEMPLATE = "template"  # of texts with labels; likewise
_LONGEST_TEMPLATE = 16_384  # characters
_TASKS: dict[str, tuple[Task, ...]] = {  # that rows of each form can be read for
    "template": ("generate", "cloze", "classify"), "label": ("generate", "cloze", "classify"), "chat": ("generate",),
    "plain": ("generate",), "tag": ("tag",), "answer": ("answer",), "embed": ("embed",),
}  # fmt: skip
_LEAST_WIDTH_LIMIT = 1024  # of a residual MLP; wider than four times the base's width it learns nothing more
_LARGEST_MULTIPLIER = 1_000_000  # of the default learning rate
MAX_EPOCHS = 1_000
MAX_ROW_VISITS = 5_000_000  # the order of all epochs is planned ahead, in memory


class JobSettings(NamedTuple):
    """The settings that are asked for. Defaults by task are filled in when the rows are read."""

    train: TrainConfig
    rate_multiplier: float | None  # of the task's default relative learning rate


def job_settings(asked: CreateJob, base: Base, start: SoftPrompt | None) -> JobSettings:
    """The settings that are asked for; "auto" and null are the defaults.

    Raises ApiError 400 for a name that is unknown, a value of the wrong type or out of range, and settings that
    contradict each other or the prompt to start from.
    """
    try:
        settings = _settings(asked)
        multiplier = settings.pop(_MULTIPLIER, None)
        _check_one_rate(multiplier, settings)
        config = TrainConfig(**settings)
        _check_limits(config, base)
        if start is not None:
            check_start_stays(settings, start.num_virtual_tokens, repr(asked.model))
    except ConfigError as error:
        raise _refusal(error.param, str(error)) from None
    return JobSettings(config, multiplier)


def with_rate(config: TrainConfig, multiplier: float | None, task: TaskKind) -> TrainConfig:
    """The settings with the learning rate that a multiplier asks for."""
    if multiplier is None:
        return config
    return replace(config, relative_learning_rate=multiplier * TASK_DEFAULTS[task]["relative_learning_rate"])


def hyperparameters(row: JobRow) -> Hyperparameters:
    """OpenAI's three of a job: "auto" for what goes by task, until the rows are read."""
    config = TrainConfig.of_record(row.outcome.get("settings") or row.settings["train"])
    return Hyperparameters(
        n_epochs=config.epochs or "auto",
        batch_size=config.batch_rows,
        learning_rate_multiplier=_multiplier(row, config),
    )


def _multiplier(row: JobRow, config: TrainConfig) -> float | Literal["auto"] | None:
    asked: float | None = row.settings.get(_MULTIPLIER)
    if asked is not None:
        return asked
    if config.relative_learning_rate is None:
        return "auto" if config.learning_rate is None else None
    usual: float = TASK_DEFAULTS[row.outcome.get("task", "text")]["relative_learning_rate"]
    return config.relative_learning_rate / usual


def validation_setting(asked: CreateJob) -> str | None:
    """The hyperparameter `validation`: a share of the training file's rows, their number or "none"; None: the default.

    Raises ApiError 400 for anything else, and beside a validation file.
    """
    try:
        given = _last_given(asked, _ROWS)
        config = DataConfig(data=asked.training_file, validation=None if given == "auto" else given)
        check_validation(config)
        value = config.validation
        is_part = value is None or is_row_count(value)
        require(is_part, _ROWS, given, "a share of the rows, their number or 'none'")
        if value is not None and asked.validation_file is not None:
            raise ConfigError("a validation_file is given, and validation too; give one", param="validation")
    except ConfigError as error:
        raise _refusal(_ROWS, str(error)) from None
    return value


def template_setting(asked: CreateJob, form: str) -> str | None:
    """The hyperparameter `template` of texts with labels, "{text} It was [MASK]." say; None: the default.

    Raises ApiError 400 for anything else, and for rows of another form.
    """
    try:
        given = _last_given(asked, _TEMPLATE)
        if given is None:
            return None
        require(form == "label", _TEMPLATE, given, "left out: it is for rows with text and label")
        require(isinstance(given, str), _TEMPLATE, given, "text")
        require(len(given) <= _LONGEST_TEMPLATE, _TEMPLATE, given, f"at most {_LONGEST_TEMPLATE:,} characters")
        require_fields(given, ("text",))
        unknown = next((name for name in template_fields(given) if name != "text"), None)
        require(unknown is None, _TEMPLATE, given, "a text whose one field is {text}")
        require("text" in template_fields(given), _TEMPLATE, given, "a text with the field {text}")
    except (ConfigError, DataError) as error:
        raise _refusal(_TEMPLATE, str(error)) from None
    return str(given)


def check_job_task(
    config: TrainConfig, base: Base, form: str, template: str | None, start: SoftPrompt | None
) -> None:  # fmt: skip
    """Raises ApiError 400 where the base, or rows of this form, cannot do what the settings ask for."""
    try:
        config = config if start is None else as_started(config, start)
        task = _task(config, base, form, template)
        if task not in _TASKS.get(form, (task,)):
            raise ConfigError(
                f"task {task!r} is not for rows of the form {form!r}, which are for {' or '.join(_TASKS[form])}",
                param="task",
            )
        check_task(base, task, config)
        if task == "cloze" and form == "label" and (template is None or mask_in(base, template) is None):
            raise ConfigError('task \'cloze\' needs a template with a mask; give "{text} It was [MASK]." say',
                              param=_TEMPLATE)  # fmt: skip
    except ConfigError as error:
        raise _refusal(error.param, str(error)) from None


def _task(config: TrainConfig, base: Base, form: str, template: str | None) -> Task:
    """What is trained, as far as it can be known before the rows are read."""
    if config.task != "auto":
        return config.task
    own = _TASKS.get(form, ("generate",))
    if own[0] != "generate" or base.kind != "encoder":
        return own[0]
    if "classify" not in own:
        return "generate"  # which the check refuses
    return "cloze" if template is not None and mask_in(base, template) is not None else "classify"


def check_rows(config: TrainConfig, num_rows: int) -> None:
    """Raises ApiError 400 where the passes over so many rows are more than can be planned."""
    epochs = config.epochs or max(defaults["epochs"] for defaults in TASK_DEFAULTS.values())
    if epochs * num_rows > MAX_ROW_VISITS:
        raise _refusal(
            "n_epochs",
            f"{epochs:,} epochs of {num_rows:,} rows are more than {MAX_ROW_VISITS:,} rows in all; "
            "ask for fewer epochs",
        )


def _settings(asked: CreateJob) -> Json:
    method = asked.method
    if method is not None and method.type != "supervised":
        raise ApiError(400, f"method.type is {method.type!r}; it must be 'supervised'", "invalid_value", "method.type")
    found: Json = {} if asked.seed is None else {"seed": asked.seed}
    for name, value in (pair for some in _given(asked) for pair in some.items()):
        if name in (_ROWS, _TEMPLATE):
            continue
        setting, value = _setting(name, value)
        if value is None:
            continue
        if setting in found and found[setting] != value:
            both = f"{shortened(found[setting])} and {shortened(value)}"
            raise ConfigError(f"{name} is given twice, as {both}; give one", param=name)
        found[setting] = value
    return found


def _last_given(asked: CreateJob, name: str) -> Any:  # Any: as JSON gave it
    """The value of a hyperparameter that is no setting of TrainConfig; None for "auto" too."""
    given = next((some[name] for some in reversed(_given(asked)) if some.get(name) is not None), None)
    return given if name == _ROWS or given != "auto" else None


def _given(asked: CreateJob) -> list[Json]:
    supervised = asked.method.supervised if asked.method is not None else None
    return [asked.hyperparameters or {}, (supervised.hyperparameters if supervised else None) or {}]


def _setting(name: str, value: Any) -> tuple[str, Any]:  # Any: as JSON gave it
    """Our name for it and the value; None is the default."""
    if name in _SERVERS:
        raise ConfigError(f"{name} cannot be asked for: {_SERVERS[name]}; leave it out", param=name)
    check_names([name], [*_OPENAI, *_OURS, _ROWS, _TEMPLATE])
    if value is None or value == "auto":
        return _OPENAI.get(name, name), None
    return _OPENAI.get(name, name), _rate_multiplier(value) if name == _MULTIPLIER else value


def _rate_multiplier(multiplier: Any) -> float:  # Any: as above
    number: float = checked_value(float, multiplier, _MULTIPLIER)
    require(0 < number <= _LARGEST_MULTIPLIER, _MULTIPLIER, multiplier, f"above 0 and at most {_LARGEST_MULTIPLIER:,}")
    return number


def _check_one_rate(multiplier: float | None, settings: Json) -> None:
    other = next((name for name in ("learning_rate", "relative_learning_rate") if name in settings), None)
    if multiplier is not None and other is not None:
        raise ConfigError(
            f"{_MULTIPLIER}={multiplier:g} and {other}={shortened(settings[other])} exclude each other; give one",
            param=_MULTIPLIER,
        )


def _check_limits(config: TrainConfig, base: Base) -> None:
    room = base.max_length - len(base.bos_ids) - 1
    widest = max(_LEAST_WIDTH_LIMIT, 4 * base.hidden_size)
    for name, limit in (("virtual_tokens", room), ("bottleneck", widest), ("epochs", MAX_EPOCHS)):
        value = getattr(config, name)
        if value is not None and value > limit:
            raise ConfigError(f"{name} is {value:,}; on this server it can be at most {limit:,}", param=name)


def _refusal(name: str | None, message: str) -> ApiError:
    is_known = name in (*_OPENAI, *_OURS, _ROWS, _TEMPLATE)
    return ApiError(400, message, "invalid_value", f"hyperparameters.{name}" if is_known else "hyperparameters")
