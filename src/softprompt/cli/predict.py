"""softprompt predict"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.command import Command, config_of, options_of
from softprompt.cli.console import load, print_json, say, warnings_as_lines
from softprompt.config import BaseConfig, DataConfig, PredictConfig

if TYPE_CHECKING:
    from softprompt.base import Base
    from softprompt.data.stream import RecordStream
    from softprompt.evaluation.predict import Answerer
    from softprompt.prompt import SoftPrompt
    from softprompt.runs.prediction_file import PredictionFile

_LEFT_OUT = ("label_column", "template", "completion", "shuffle", "validation", "test")
_SHOWN_LABELS = 12
_SECTIONS = {
    "Prompt": ("prompt", "library", "force"),
    "Rows": [item.name for item in dataclasses.fields(DataConfig) if item.name not in _LEFT_OUT],
    "Answers": ("out", "overwrite", "resume", *(item.name for item in dataclasses.fields(PredictConfig)), "strict"),
    "Base": BaseConfig,
}
_EXAMPLES = (
    "softprompt predict --base BASE --prompt prompts/reviews --data reviews.csv --out answers.csv",
    "softprompt predict --base BASE --prompt prompts/reviews --data reviews.parquet --out answers.parquet \\\n"
    "  --probabilities --target-accuracy 0.9",
)


@click.command("predict", cls=Command, sections=_SECTIONS, examples=_EXAMPLES)
@options_of(BaseConfig)
@options_of(DataConfig, leave_out=_LEFT_OUT)
@options_of(PredictConfig)
@click.option("--prompt", required=True, help="Adapter: a folder with a separator in it, or a name in --library.")
@click.option("--library", type=click.Path(), help="Folder of adapters that names refer to.")
@click.option("--force", is_flag=True, help="Use a prompt that was trained on another base of the same width.")
@click.option("--out", required=True, type=click.Path(), help="File for the answers: .csv, .jsonl or .parquet.")
@click.option("--overwrite", is_flag=True, help="Replace --out, and the answers of a job that did not end.")
@click.option("--resume", is_flag=True, help="Go on with a job that was stopped; answered rows are not computed again.")
@click.option("--strict", is_flag=True, help="Exit with code 2 where a row could not be answered.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def command(
    prompt: str, library: str | None, force: bool, out: str, overwrite: bool, resume: bool, strict: bool,
    as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Answer each row of a file, and write the rows with their answers to another.

    The rows need the columns that the prompt's template names, and no labels. All columns are kept, in order, and
    behind them stand the answer's: label, confidence and unsure of a prompt with labels; tags, confidence and unsure of
    one that tags words; answer, start, end, confidence and unsure of one that finds a span of a context; answer,
    mean_log_probability and finish_reason of one that writes text; embedding of one that gives vectors; then truncated
    and error. A name that the file has already begins with predicted_.

    Confidence is the probability of the label, calibrated if the prompt's training had labelled validation rows. An
    answer is unsure below the smallest confidence at which those rows were right in --target-accuracy of them.
    """
    base_config, data, config = (
        config_of(BaseConfig, flags),
        config_of(DataConfig, flags),
        config_of(PredictConfig, flags),
    )
    from softprompt.data.inputs import input_columns
    from softprompt.data.stream import open_stream
    from softprompt.evaluation.predict import answerer_of
    from softprompt.runs.prediction_file import PredictionFile, check_target
    from softprompt.storage import load_prompt, resolve_prompt

    target = Path(out)
    check_target(target, Path(data.data).expanduser(), overwrite=overwrite, resume=resume)
    folder, stream = resolve_prompt(prompt, library), open_stream(data, offline=base_config.offline)
    for note in stream.notes:
        say(f"note: {stream.source}: {note}")
    base = load(base_config)
    with warnings_as_lines():
        soft = load_prompt(folder, base, force=force)
    answerer, columns = answerer_of(base, soft, config), input_columns(soft.record.form, stream.columns, data)
    file = PredictionFile(target, stream, answerer.columns, _job(base, soft, stream, columns, data, config))
    file.resume() if resume else file.begin()
    _say_plan(soft, file, answerer, config)
    _answer(file, answerer, stream, columns, data.rows)
    _say_result(file, as_json)
    if strict and file.counts.errors:
        raise click.exceptions.Exit(2)


def _job(
    base: Base, soft: SoftPrompt, stream: RecordStream, columns: Mapping[str, str], data: DataConfig,
    config: PredictConfig,
) -> dict[str, Any]:  # fmt: skip
    """What the answers depend on."""
    return {
        "base": base.fingerprint, "dtype": str(base.dtype), "max_length": base.max_length, "prompt": soft.content_hash,
        "data": stream.digest, "--rows": data.rows, "columns read": dict(columns), "settings": asdict(config),
    }  # fmt: skip


def _answer(
    file: PredictionFile, answerer: Answerer, stream: RecordStream, columns: Mapping[str, str], rows: int | None
) -> None:
    """Ends with exit code 130 where it is interrupted."""
    from softprompt.cli.progress import ProgressLine
    from softprompt.evaluation.predict import predict_chunks

    num_rows = stream.num_rows if rows is None else min(rows, stream.num_rows)
    try:
        with ProgressLine("answering", "row") as progress:
            num_before = file.num_done
            progress.begin(num_rows, num_before)
            records = stream.records(file.num_done, num_rows)
            for chunk in predict_chunks(answerer, records, columns, stream.source, file.num_done):
                file.add(chunk, [answerer.cells(item) for item in chunk.predictions])
                progress.show(file.num_done, f"{(file.num_done - num_before) / progress.seconds:,.1f} rows/s")
        file.finish()
    except KeyboardInterrupt:
        again = shlex.join([*sys.argv[1:], *([] if "--resume" in sys.argv else ["--resume"])])
        say(f"interrupted; {file.num_done:,} of {num_rows:,} rows are answered; go on with: softprompt {again}")
        raise click.exceptions.Exit(130) from None


def _say_plan(soft: SoftPrompt, file: PredictionFile, answerer: Answerer, config: PredictConfig) -> None:
    renamed = [(old.name, new.name) for old, new in zip(answerer.columns, file.columns, strict=True) if old != new]
    for old, new in renamed:
        say(f"note: the rows have a column {old!r}, so the answer's is {new!r}")
    if file.num_done:
        say(f"{file.num_done:,} rows are answered already")
    if any(column.name == "confidence" for column in answerer.columns):
        for line in _confidence_lines(soft, config):
            say(line)


def _confidence_lines(soft: SoftPrompt, config: PredictConfig) -> Iterator[str]:
    from softprompt.evaluation.calibrate import threshold_line
    from softprompt.evaluation.predict import sureness

    calibration = sureness(soft, config).calibration
    if calibration is None:
        is_fitted = soft.record.form.task not in ("tag", "answer")
        why = "the prompt was trained without labelled validation rows" if is_fitted else "only those of labels can be"
        marks = "" if config.threshold is not None else ", and no answer is marked unsure unless --threshold is given"
        yield f"note: confidences are uncalibrated: {why}{marks}"
        return
    temperature = f"temperature {calibration.temperature:.3g}"
    yield f"confidences are calibrated on {calibration.rows:,} validation rows ({temperature})"
    if config.threshold is None:
        yield threshold_line(calibration, config.target_accuracy)


def _say_result(file: PredictionFile, as_json: bool) -> None:
    counts = file.counts
    labels = ", ".join(f"{label} {count:,}" for label, count in counts.labels.most_common(_SHOWN_LABELS))
    parts = [
        f"{counts.rows:,} rows", *([labels] if labels else []),
        *([f"{counts.unsure:,} unsure"] if counts.unsure or labels else []),
        *([f"{counts.truncated:,} cut to fit"] if counts.truncated else []),
        *([f"{counts.errors:,} without an answer (see the column error)"] if counts.errors else []),
    ]  # fmt: skip
    say(f"saved to {file.path}: {'; '.join(parts)}")
    if as_json:
        print_json({"out": str(file.path), **counts.to_json()})
