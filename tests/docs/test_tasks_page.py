"""The commands of docs/tasks.md work as they stand there, on rows of the columns that it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from support.command_line import succeed
from support.encoders import save_encoder
from support.material import write_jsonl

from softprompt.storage import load_prompt

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
WORDS = ["great", "good", "terrible", "bad", "It", "was"]


def commands() -> list[str]:
    return "".join(re.findall(r"^```console\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)).splitlines()


@pytest.mark.medium
def test_the_commands_of_the_page_train_each_its_task(tmp_path):
    save_encoder("bert", tmp_path / "BASE", words=WORDS)
    texts = [f"w{20 + i} w{30 + i}" for i in range(48)]
    data = {
        "reviews": [{"text": text, "label": ("negative", "positive")[i % 2]} for i, text in enumerate(texts)],
        "words": [{"tokens": text.split(), "ner_tags": ["O", "B-LOC"]} for text in texts],
        "questions": [
            {"question": "w9", "context": text, "answers": {"text": [text[4:]], "answer_start": [4]}} for text in texts
        ],
        "pairs": [{"anchor": text, "positive": text[4:], "negative": "w9"} for text in texts],
    }
    for name, rows in data.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    assert len(commands()) == 5
    for command in commands():
        succeed(*shlex.split(command)[1:], "--epochs", 1, "--virtual-tokens", 2, "--dtype", "float32", cwd=tmp_path)
    tasks = {path.name: load_prompt(path).record.form.task for path in (tmp_path / "prompts").iterdir()}
    assert tasks == {name: name for name in ("classify", "cloze", "tag", "answer", "embed")}
