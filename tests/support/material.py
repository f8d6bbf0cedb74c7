"""Tiny bases on disk and small data sets of their words."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from support.tiny_bases import build_model, build_tokenizer, random_ids

TEMPLATE = ("--template", "w5 {text} w6", "--completion", " {label}")
QUICK = ("--virtual-tokens", 3, "--epochs", 2, "--dtype", "float32", "--micro-batch-rows", 8)


def save_base(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    build_model(family, seed).save_pretrained(folder)
    build_tokenizer(has_bos=family == "llama").save_pretrained(folder)
    return folder


def sentence(seed: int, low: int = 3, high: int = 12) -> str:
    return " ".join(f"w{token}" for token in random_ids(low + seed % (high - low), seed))


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def review(seed: int) -> dict[str, str]:
    return {"text": f"{sentence(seed)} w{40 + seed % 2}", "label": f"w{90 + seed % 2}"}


def chat(seed: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": sentence(seed)}, {"role": "assistant", "content": sentence(seed + 50)}]
    return {"messages": turns}
