"""Settings, one frozen dataclass for each part. A default is written here and nowhere else: the flags of the command
line are made from these fields, with `help` as their text. `None` means "resolve it for me"; runs record the result.

No torch here: `softprompt --help` reads this module.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

from softprompt.errors import ConfigError, shortened
from softprompt.settings import ConfigT, check_types, option, require, required, settings_class, typed_text

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Start = Literal["data", "text", "vocab", "labels", "random", "peft"]
Schedule = Literal["linear", "cosine", "constant", "stable-decay"]
HeadStart = Literal["fit", "random"]
Reparameterisation = Literal["none", "residual-mlp", "low-rank"]
Loss = Literal["auto", "tokens", "labels"]
# What rows are trained for, by which defaults go. Of task "generate": text, labels, chat or answers (a template's
# completions that are no set of labels); the other tasks by their names.
TaskKind = Literal["text", "labels", "chat", "answers", "cloze", "classify", "tag", "answer", "embed"]
TaskChoice = Literal["auto", "generate", "cloze", "classify", "tag", "answer", "embed"]
PlacementChoice = Literal["auto", "front", "after-cls"]
PoolingChoice = Literal["auto", "cls", "mean", "last", "peft"]
Kernels = Literal["measured", "fixed"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Weights = Literal["loaded", "int8"]
Criterion = Literal["loss", "accuracy", "f1_macro", "exact_match", "f1", "rouge_l", "chrf"]
TextScore = Literal["exact_match", "f1", "rouge_l", "chrf"]

# The defaults of TrainConfig that go by task, and nowhere else; docs/decisions/2026-11-29-defaults-by-task.md.
_USUAL_DEFAULTS: Mapping[str, Any] = {
    "loss": "tokens", "relative_learning_rate": 0.3, "reparameterisation": "residual-mlp", "epochs": 6,
    "averaging": 0.0,
}  # fmt: skip
_DEFAULTS_WITH_COLUMNS = {**_USUAL_DEFAULTS, "reparameterisation": "none", "epochs": 10}
_RATE_OF_RANDOM_HEAD, _RATE_OF_FITTED_HEAD = 1e-3, 1e-4
_DEFAULTS_WITH_HEAD = {
    **_DEFAULTS_WITH_COLUMNS, "head_init": "random", "head_learning_rate": _RATE_OF_RANDOM_HEAD,
}  # fmt: skip
TASK_DEFAULTS: Mapping[TaskKind, Mapping[str, Any]] = {
    "text": _USUAL_DEFAULTS,
    "labels": {**_USUAL_DEFAULTS, "loss": "labels", "reparameterisation": "none", "averaging": 0.5},
    "chat": _USUAL_DEFAULTS,
    "answers": _USUAL_DEFAULTS,
    **dict.fromkeys(("cloze", "embed"), _DEFAULTS_WITH_COLUMNS),
    **dict.fromkeys(("tag", "answer"), _DEFAULTS_WITH_HEAD),
    "classify": {
        **_DEFAULTS_WITH_HEAD,
        "relative_learning_rate": 0.1,
        "epochs": 6,
        "averaging": 0.5,
        "head_init": "fit",
        "head_learning_rate": _RATE_OF_FITTED_HEAD,
    },
}
# Of releases without defaults by task, which recorded None for them or knew no such setting.
DEFAULTS_BEFORE: Mapping[str, Any] = {"loss": "tokens", "relative_learning_rate": 0.3, "averaging": 0.0}
EMBEDDED_BASE = "embedded"
SMOLLM2_BASE = "smollm2"
MINILM_BASE = "minilm"
NAMED_BASES = (EMBEDDED_BASE, SMOLLM2_BASE, MINILM_BASE)  # by a name of ours, whatever lies in the working folder
KEPT_CHECKPOINTS = 3  # the latest ones of each run
_SEEDS = 2**63  # torch's generators accept seeds below it
_LARGEST_RATE = 1e30  # float32 still multiplies by it without overflow


@settings_class
@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The frozen base: where it is loaded from, and how it lies in memory."""

    base: str = required("Hub id, folder or GGUF file of a language model, 'embedded', 'smollm2' or 'minilm'.")
    revision: str | None = option(None, "Branch, tag or commit on the Hub.")
    dtype: Dtype = option(
        "auto", "Dtype of the weights; auto is bfloat16 where the machine computes it fast, else float32."
    )
    device: str = option("auto", "Device to run on: auto, cpu, cuda, cuda:N or mps.")
    device_map: DeviceMap | None = option(
        None, "Spread a big base over all devices: auto, balanced, balanced_low_0 or sequential."
    )
    kernels: Kernels = option(
        "measured",
        "How products with the frozen weights run on a CPU: as measured once per machine (see softprompt info), or by "
        "fixed rules for its kind of processor.",
    )
    trust_remote_code: bool = option(False, "Run the model code in the base's own repository.")
    offline: bool = option(False, "Use local files only; never connect to the Hub.")
    max_length: int | None = option(None, "Longest sequence (tokens); required where the model itself sets no limit.")

    def __post_init__(self) -> None:
        check_types(self)
        require(self.max_length is None or self.max_length >= 1, "max_length", self.max_length, "at least 1")


@settings_class
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The rows to learn from, and how each becomes text."""

    data: str = required("CSV, TSV, JSON, JSON lines, Parquet or text file, a folder, or a Hub set.")
    split: str | None = option(None, "Split of a data set; default train.")
    subset: str | None = option(None, "Configuration name of a Hub data set.")
    delimiter: str | None = option(
        None, "Character between the cells of a CSV file; default: guessed from its first line."
    )
    text_column: str | None = option(None, "Column with plain text (loss on all of it).")
    label_column: str | None = option(
        None, "Column with labels, of texts or (a list) of words: learn to answer each text with its label."
    )
    template: str | None = option(None, 'Prompt with {column} fields, e.g. "Review: {text}\\nSentiment:".')
    completion: str | None = option(None, 'Completion with {column} fields, e.g. " {label}" (loss on it alone).')
    messages_column: str | None = option(None, "Column with chat messages (loss on the assistant's turns).")
    rows: int | None = option(None, "Use the first N rows (after --shuffle, if given).")
    shuffle: bool = option(False, "Shuffle the rows, by --seed, before --rows selects the first ones.")
    validation: str | None = option(
        None,
        "Validation set: a share of the rows (0.1), their number, a file or none; it selects the best checkpoint and "
        "shows whether the prompt helps. Default: a tenth, at least 20, of 40 or more rows with labels or --best-by.",
    )
    test: str | None = option(
        None,
        "Test set, read by compare alone: a number of rows (200), a share (0.1) or a file; default: up to 200 rows.",
    )

    def __post_init__(self) -> None:
        for name in ("validation", "test"):  # Python and TOML may give a share or a number of rows as a number
            value = getattr(self, name)
            if type(value) is not bool and isinstance(value, Real):
                object.__setattr__(self, name, str(value))
        check_types(self)
        require(self.rows is None or self.rows >= 1, "rows", self.rows, "at least 1")
        delimiter = None if self.delimiter is None else typed_text(self.delimiter)
        is_usable = delimiter is None or (len(delimiter) == 1 and delimiter not in '"\r\n')
        require(is_usable, "delimiter", self.delimiter, "one character, such as ';' or a tab")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        answers = self.completion if self.completion is not None else self.label_column
        if (self.template is None) != (answers is None) and (self.template is not None or self.completion is not None):
            given, lacking = ("template", "completion") if self.completion is None else ("completion", "template")
            value = shortened(getattr(self, given))
            raise ConfigError(f"{given} {value} needs a {lacking} too: the two together make one example")
        for names in (
            ("text_column", "template", "messages_column"), ("label_column", "completion", "messages_column"),
            ("template", "messages_column"),
        ):  # fmt: skip
            given_names = [name for name in names if getattr(self, name) is not None]
            if len(given_names) > 1:
                raise ConfigError(f"{' and '.join(given_names)} exclude each other; give one")


@settings_class
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a soft prompt is trained. Defaults by task depend on the rows: text, labels, chat or other answers."""

    virtual_tokens: int = option(20, "Length of the soft prompt (vectors).")
    task: TaskChoice = option(
        "auto",
        "What is trained: generate (text to text), cloze (label words at a mask), classify, tag or answer (a head "
        "beside the prompt, for texts, words or spans of a context) or embed (one vector per text); auto goes by base "
        "and data.",
    )
    placement: PlacementChoice = option(
        "auto",
        "Where the virtual tokens stand in an encoder's input: in front of all tokens, or after [CLS]; auto is after "
        "it.",
    )
    pooling: PoolingChoice = option(
        "auto",
        "Hidden state that classify and embed read: of [CLS], the mean over the text, of the last token, or the one "
        "that PEFT reads; auto goes by base and task.",
    )
    label_words: tuple[str, ...] = option(
        (),
        "For cloze: the words that stand for a label at the mask, as LABEL=WORD or LABEL=WORD,WORD; may be repeated. "
        "Default: the label's own text.",
    )
    decoder_prompt: bool = option(
        False, "For an encoder-decoder: train a second soft prompt of the same length in front of the decoder's tokens."
    )
    head_init: HeadStart | None = option(
        None,
        "First weights of a head that is trained beside the prompt: fit (logistic regression on the base's states "
        "behind the initial vectors) or random, as transformers draws them. Default by task.",
    )
    head_learning_rate: float | None = option(
        None, "Absolute learning rate of that head; default by task, and by how it starts."
    )
    reparameterisation: Reparameterisation | None = option(
        None,
        "Train the vectors through a residual MLP, through a low-rank update, or directly (none); the saved prompt is "
        "plain vectors in each case. Default by task.",
    )
    bottleneck: int = option(64, "Width of the residual MLP, or rank of the low-rank update.")
    init: Start = option(
        "data", "Initial vectors: data, text, vocab, labels, random or peft (N(0,1), as PEFT draws them)."
    )
    init_text: str | None = option(
        None, "Instruction whose embeddings are the initial vectors, for --init text.", typed=True
    )
    loss: Loss = option(
        "auto",
        "What is trained: tokens, to write each next token among the whole vocabulary; or labels, to choose the right "
        "one of the data's labels, beside the loss on tokens; auto is by task.",
    )
    epochs: int | None = option(None, "Passes over the training rows; default by task.")
    max_steps: int | None = option(None, "Optimiser steps at most.")
    batch_rows: int = option(8, "Rows per optimiser step.")
    batch_tokens: int | None = option(None, "Tokens per optimiser step at most, in place of --batch-rows.")
    micro_batch_rows: int | None = option(None, "Rows per forward pass; default: as many as fit into memory.")
    checkpoint_layers: bool = option(
        False, "Recompute each layer's activations in the backward pass: less memory, more time."
    )
    relative_learning_rate: float | None = option(
        None, "Learning rate, in units of the embeddings' RMS; default by task."
    )
    learning_rate: float | None = option(None, "Absolute learning rate, in place of the relative one.")
    schedule: Schedule = option(
        "stable-decay",
        "Learning rate over time: stable-decay is constant, then linear to 0 over the last third; linear and cosine "
        "fall to 0 from the start.",
    )
    warmup_steps: int = option(0, "Optimiser steps over which the learning rate rises from 0.")
    averaging: float | None = option(
        None,
        "Share of the steps, at the end, whose prompts are averaged into the kept one; 0 keeps the last. Default by "
        "task.",
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay.")
    max_grad_norm: float | None = option(
        None, "Clip the norm of each step's gradient, of the loss per target token; default: off."
    )
    eos: bool = option(True, "Train on an end of text (EOS) after each row, so that answers end.")
    eos_weight: float = option(0.3, "Weight of that EOS in the loss; a text token has weight 1.")
    validate_every: int | None = option(None, "Optimiser steps between validations; default: one after each epoch.")
    best_by: Criterion = option(
        "loss", "Criterion for the best checkpoint: the validation loss, or a task score on the validation rows."
    )
    patience: int | None = option(None, "Stop after this many validations in a row without improvement.")
    save_every: int | None = option(
        None, "Optimiser steps between checkpoints to resume from; each epoch and validation makes one too."
    )
    seed: int = option(0, "Seed of the initial vectors, of --shuffle and of the order of the rows.")

    def __post_init__(self) -> None:
        check_types(self)
        require(self.virtual_tokens >= 1, "virtual_tokens", self.virtual_tokens, "at least 1")
        require(self.batch_rows >= 1, "batch_rows", self.batch_rows, "at least 1")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        require(self.averaging is None or 0 <= self.averaging <= 1, "averaging", self.averaging, "between 0 and 1")
        require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "0 or more, and finite")
        require(0 <= self.seed < _SEEDS, "seed", self.seed, "0 or more, and below 2 to the 63rd")
        require(self.bottleneck >= 1, "bottleneck", self.bottleneck, "at least 1")
        for name in ("epochs", "max_steps", "batch_tokens", "micro_batch_rows", "validate_every", "patience",
                     "save_every"):  # fmt: skip
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        for name in ("relative_learning_rate", "learning_rate", "max_grad_norm", "eos_weight", "head_learning_rate"):
            value = getattr(self, name)
            require(value is None or 0 < value < _LARGEST_RATE, name, value, f"above 0 and below {_LARGEST_RATE:g}")
        if self.relative_learning_rate is not None and self.learning_rate is not None:
            raise ConfigError(
                f"learning_rate={self.learning_rate:g} and relative_learning_rate={self.relative_learning_rate:g} "
                "exclude each other; give one"
            )
        if self.init == "text" and not self.init_text:
            raise ConfigError("init 'text' needs init_text, the instruction to start from", param="init")
        if self.init != "text" and self.init_text is not None:
            raise ConfigError(
                f"init_text is given, but init is {self.init!r}; it must be 'text' to start from it", param="init_text"
            )

    def defaults_by_task(self, task: TaskKind) -> Mapping[str, Any]:
        """The settings that are left to the task, with their values for it."""
        left = {name: value for name, value in TASK_DEFAULTS[task].items() if getattr(self, name) in (None, "auto")}
        if self.learning_rate is not None:
            left.pop("relative_learning_rate", None)
        if "head_learning_rate" in left and self.head_init is not None:
            left["head_learning_rate"] = _RATE_OF_FITTED_HEAD if self.head_init == "fit" else _RATE_OF_RANDOM_HEAD
        return left

    def resolved(self, task: TaskKind) -> TrainConfig:
        """These settings with the task's defaults filled in."""
        return replace(self, **self.defaults_by_task(task))

    def as_begun(self, begun: TrainConfig, task: TaskKind) -> TrainConfig:
        """These settings with what they leave to the task as in `begun`, where its default has changed since."""
        left = self.defaults_by_task(task)
        return replace(self, **{name: getattr(begun, name) for name in left if getattr(begun, name) != left[name]})

    @classmethod
    def of_record(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """The settings as a run or a job recorded them; see `with_former_defaults`."""
        return cls(**{name: value for name, value in with_former_defaults(settings).items() if value is not None})


def with_former_defaults(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Recorded settings of a training; those of a release without defaults by task with the ones that it had."""
    if "loss" in settings:
        return settings
    before = {name: value for name, value in DEFAULTS_BEFORE.items() if settings.get(name) is None}
    if settings.get("learning_rate") is not None:
        before.pop("relative_learning_rate", None)
    return {**settings, **before}


@settings_class
@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the tokens of an answer are sampled."""

    max_new_tokens: int = option(50, "Tokens to generate at most.")
    min_new_tokens: int = option(0, "Tokens to generate at least; no end of text and no stop string counts before.")
    temperature: float = option(0.0, "Temperature of the sampling; 0 is greedy.")
    top_p: float = option(1.0, "Sample from the most likely tokens whose probabilities add up to this share.")
    top_k: int = option(0, "Sample from the K most likely tokens; 0 is off.")
    min_p: float = option(0.0, "Sample from the tokens at least this many times as likely as the likeliest.")
    repetition_penalty: float = option(
        1.0, "Above 1, tokens that the text or the answer already has become less likely."
    )
    presence_penalty: float = option(0.0, "Subtracted from the logit of each token that the answer already has.")
    frequency_penalty: float = option(0.0, "Subtracted from that logit once for each occurrence in the answer.")
    stop: tuple[str, ...] = option((), "End the answer before this string; may be repeated.", typed=True)
    stop_ids: tuple[int, ...] = option((), "End the answer at this token id; may be repeated.")
    ignore_eos: bool = option(False, "Continue past the base's end of text.")
    choice: tuple[str, ...] = option((), "The answer must be one of these; may be repeated.", typed=True)
    json_schema: str | None = option(None, "The answer must be JSON that satisfies this schema (JSON text).")
    logit_bias: tuple[tuple[int, float], ...] = option(
        (), "Token ids, each with a number that is added to its logit.", flag=False
    )
    seed: int = option(0, "Seed of the sampling.")

    def __post_init__(self) -> None:
        check_types(self)
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            self.min_new_tokens,
            f"between 0 and max_new_tokens ({self.max_new_tokens})",
        )
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more, and finite")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(self.top_k >= 0, "top_k", self.top_k, "0 or more")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        penalty = self.repetition_penalty
        require(0 < penalty < math.inf, "repetition_penalty", penalty, "above 0, and finite")
        require(all(token >= 0 for token in self.stop_ids), "stop_ids", self.stop_ids, "token ids, 0 or more")
        require(all(self.stop), "stop", self.stop, "not empty")
        require(all(self.choice), "choice", self.choice, "not empty")
        require(not self.choice or self.json_schema is None, "json_schema", self.json_schema, "unset beside choice")
        for name in ("presence_penalty", "frequency_penalty"):
            require(math.isfinite(getattr(self, name)), name, getattr(self, name), "finite")
        require(all(not math.isnan(b) for _, b in self.logit_bias), "logit_bias", self.logit_bias, "numbers")
        require(0 <= self.seed < _SEEDS, "seed", self.seed, "0 or more, and below 2 to the 63rd")

    @property
    def is_guided(self) -> bool:
        """Whether a grammar restricts the next token."""
        return bool(self.choice) or self.json_schema is not None


@settings_class
@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What a comparison measures besides the loss."""

    score: tuple[TextScore, ...] = option(
        (), "Score greedy answers against the rows' completions; may be repeated. Needs softprompt[scores]."
    )
    score_rows: int = option(200, "Rows of each set to score at most, from its beginning.")
    score_tokens: int | None = option(
        None, "Tokens of a scored answer at most; default: one more than the longest completion."
    )
    calibrate: bool = option(
        False, "Divide each label's likelihood by its likelihood for an input without content (arXiv 2102.09690)."
    )

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("score_rows", "score_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")


@settings_class
@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How rows are answered, and which answers count as sure."""

    probabilities: bool = option(False, "Also write the probability of every label.")
    target_accuracy: float = option(
        0.95, "Share of the sure answers that should be right; the threshold is chosen by it on the validation rows."
    )
    threshold: float | None = option(
        None, "Answers with less confidence are unsure; default: chosen by --target-accuracy."
    )
    batch_tokens: int = option(4_096, "Tokens that run together, pads included; more need more memory.")
    max_new_tokens: int = option(50, "Tokens of a written answer, where the prompt has no labels, at most.")

    def __post_init__(self) -> None:
        check_types(self)
        require(0 < self.target_accuracy <= 1, "target_accuracy", self.target_accuracy, "above 0 and at most 1")
        threshold = self.threshold
        require(threshold is None or 0 <= threshold <= 1, "threshold", threshold, "between 0 and 1")
        for name in ("batch_tokens", "max_new_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@settings_class
@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Memory and batch limits of a generation engine."""

    max_rows: int | None = option(None, "Answers generated at once, at most; default 32 on a CPU, 256 on a GPU.")
    max_step_tokens: int | None = option(
        None,
        "Prefill tokens of one step while answers are being generated, at most; default 64 on a CPU, 2,048 on a GPU.",
    )
    max_waiting: int | None = option(
        None, "Answers that may wait; further requests are refused. Default: no limit; 2,048 in a server."
    )
    kv_bytes: int | None = option(None, "KV cache of running answers (bytes); default: half of the free memory.")
    prefix_bytes: int | None = option(
        None, "KV cache of soft prompts and other shared prefixes (bytes); default: an eighth of the free memory."
    )
    weights: Weights = option(
        "loaded",
        "Weights that answers are generated with on a CPU: as loaded, or int8, a rounded copy that is read faster and "
        "computes steps of at most 32 tokens.",
    )

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (
            ("max_rows", 1),
            ("max_step_tokens", 1),
            ("max_waiting", 1),
            ("kv_bytes", 1),
            ("prefix_bytes", 0),
        ):
            value = getattr(self, name)
            require(value is None or value >= least, name, value, f"at least {least}")


@settings_class
@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a base and its prompts are served over HTTP."""

    host: str = option(
        "127.0.0.1", "Address to listen on; any other than loopback requires an API key (softprompt keys create)."
    )
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    base_name: str | None = option(None, "Name of the base in the API; default: its Hub id or folder name.")
    library: str | None = option(None, "Folder of adapters, served to all clients by their names; watched for changes.")
    state: str = option("softprompt-state", "Folder for the database, uploaded files, jobs and trained prompts.")
    database: str | None = option(None, "SQLAlchemy URL of the database; default: SQLite in --state.")
    require_keys: bool = option(False, "Require an API key on loopback too.")
    share_prefix_cache: bool = option(
        False, "Share cached texts between API keys: faster, but response times reveal what others have sent."
    )
    training_share: float = option(
        0.46, "Share of the compute time for fine-tuning jobs while requests are being answered."
    )
    training_latency_ms: float | None = option(
        None,
        "Longest turn of a job between two tokens of a running answer (milliseconds), unless one piece of it takes "
        "longer; default: as --training-share allows.",
    )
    max_jobs: int = option(100, "Fine-tuning jobs of one client that may wait or run.")
    max_prompts: int = option(1_000, "Prompts that a key may keep, and as many aliases; a key's own limit comes first.")
    max_files: int = option(
        1_000, "Files that a key may keep; a key's own limit comes first. Admins' keys have neither limit."
    )
    max_stored_bytes: int = option(
        8 * 2**30, "Files and prompts of one key together (bytes); a key's own limit comes first."
    )
    requests_per_minute: int | None = option(
        None, "Requests of one client per minute; a key's own limit comes first. Default: no limit."
    )
    tokens_per_minute: int | None = option(None, "Tokens of one client per minute, read and generated; likewise.")
    max_concurrent: int | None = option(None, "Generations of one client that may wait or run at once; likewise.")
    request_timeout_s: float = option(600.0, "Longest time for one answer, waiting included (seconds).")
    max_body_bytes: int = option(16 * 2**20, "Largest request body, uploads excepted (bytes).")
    max_upload_bytes: int = option(512 * 2**20, "Largest uploaded file (bytes).")
    client_timeout_s: float = option(
        60.0, "Longest time for a request's body to begin, and to fall behind 16 KiB per second (seconds)."
    )
    drain_s: float = option(30.0, "Time for running answers to finish when the server is stopped (seconds).")
    log_format: Literal["text", "json"] = option("text", "Format of log lines on stderr.")
    log_texts: bool = option(False, "Log clients' texts and answers.")
    traces: str | None = option(None, "OTLP endpoint for OpenTelemetry traces, e.g. http://host:4318/v1/traces.")

    def __post_init__(self) -> None:
        check_types(self)
        require(0 <= self.port < 2**16, "port", self.port, "between 0 and 65535")
        require(0 < self.training_share < 1, "training_share", self.training_share, "above 0 and below 1")
        for name in ("training_latency_ms", "request_timeout_s", "client_timeout_s"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, value, "above 0, and finite")
        for name in ("max_jobs", "max_prompts", "max_files", "max_stored_bytes", "requests_per_minute",
                     "tokens_per_minute", "max_concurrent", "max_body_bytes", "max_upload_bytes"):  # fmt: skip
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        require(0 <= self.drain_s < math.inf, "drain_s", self.drain_s, "0 or more, and finite")
        has_scheme = self.traces is None or self.traces.startswith(("http://", "https://"))
        require(has_scheme, "traces", self.traces, "a URL such as http://localhost:4318/v1/traces")


def check_start_stays(given: Mapping[str, Any], num_virtual_tokens: int, start: str) -> None:
    """Raises ConfigError where the settings given contradict the prompt `start`, of so many vectors, that is to be
    trained further."""
    if {"init", "init_text"} & given.keys():
        raise ConfigError(f"{start} is trained further, from what it is; leave init and init_text out", param="init")
    wanted = given.get("virtual_tokens", num_virtual_tokens)
    if wanted != num_virtual_tokens:
        raise ConfigError(
            f"virtual_tokens is {wanted}, but {start} has {num_virtual_tokens} and keeps them in further training; "
            "leave virtual_tokens out",
            param="virtual_tokens",
        )


# The settings of the notebook "Prompt Tuning With PEFT": PEFT's random start, transformers.Trainer's linear decay
# and clipping at 1, loss on all text, no EOS.
NOTEBOOK_PRESET: Mapping[str, Any] = {
    "virtual_tokens": 4,
    "init": "peft",
    "epochs": 6,
    "batch_rows": 8,
    "learning_rate": 3e-3,
    "schedule": "linear",
    "loss": "tokens",
    "reparameterisation": "none",
    "max_grad_norm": 1.0,
    "eos": False,
    "averaging": 0.0,
}
# What --preset sets among the flags of `train`; the notebook ran in float32.
PRESETS: Mapping[str, Mapping[str, Any]] = {"notebook": {**NOTEBOOK_PRESET, "dtype": "float32"}}


def make_config(kind: type[ConfigT], settings: Mapping[str, Any]) -> ConfigT:
    """The former way to make a config of loose settings; its class checks their names itself."""
    warnings.warn(f"make_config is now {kind.__name__}(**settings)", DeprecationWarning, stacklevel=2)
    return kind(**settings)
