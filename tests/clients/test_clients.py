"""Programs that speak OpenAI's API, as they are published, against a real server on the embedded base."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from client_programs import SCRIPTS, Programs
from openai import OpenAI
from peft import PeftModel

from softprompt import load_base
from softprompt.base import Base
from softprompt.embedded import data_file, prompts_folder

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

LABELS = [" negative", " positive"]
NUM_ITEMS = 24


def items() -> list[dict[str, object]]:
    with data_file("reviews-heldout.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:NUM_ITEMS]
    return [{"context": f"Review: {row['text']}\nSentiment:", "choices": LABELS,
             "gold": LABELS.index(f" {row['label']}")} for row in rows]  # fmt: skip


@torch.no_grad()
def pefts_log_likelihoods(base: Base, prompt: str) -> list[list[float]]:
    model = PeftModel.from_pretrained(load_base("embedded", dtype="float32").model, str(prompts_folder() / prompt))
    found = []
    for item in items():
        context = base.encode(str(item["context"]))
        wholes = [base.encode(f"{item['context']}{label}") for label in LABELS]
        found.append([])
        for ids in wholes:
            answer = ids[len(context) :]
            rows = model(input_ids=torch.tensor([ids])).logits[0][-len(answer) - 1 : -1].log_softmax(-1)
            found[-1].append(float(rows[range(len(answer)), list(answer)].sum()))
    return found


def accuracy(log_likelihoods: list[list[float]]) -> float:
    gold = [item["gold"] for item in items()]
    return sum(row.index(max(row)) == right for row, right in zip(log_likelihoods, gold, strict=True)) / len(gold)


def test_lm_eval_has_the_accuracy_of_pefts_model_item_by_item(
    programs: Programs, url: str, base: Base, tmp_path: Path
) -> None:
    programs.need_python("lm_eval")
    base.tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items())), encoding="utf-8")
    programs.run(
        programs.python, SCRIPTS / "ask_lm_eval.py", url, "reviews", tmp_path / "tokenizer", tmp_path / "items.jsonl",
        tmp_path / "out.json", HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())
    expected = pefts_log_likelihoods(base, "reviews")
    assert [pytest.approx(row, abs=1e-3) for row in expected] == found["log_likelihoods"]
    assert found["accuracy"] == pytest.approx(accuracy(expected))
    other = pefts_log_likelihoods(base, "quotes")  # the control
    assert all(abs(a - b) > 1e-2 for x, y in zip(other, found["log_likelihoods"], strict=True) for a, b in zip(x, y))  # noqa: B905
    print(f"lm_eval: accuracy {found['accuracy']:.3f} on {NUM_ITEMS} items, PEFT's model {accuracy(expected):.3f}")


def test_litellm_knows_a_context_that_is_too_long(programs: Programs, url: str, tmp_path: Path) -> None:
    programs.need_python("litellm")
    programs.run(programs.python, SCRIPTS / "ask_litellm.py", url, "quotes", tmp_path / "out.json",
                 LITELLM_LOCAL_MODEL_COST_MAP="True")  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["answer"]
    assert found["chat"] == found["text"] == "ContextWindowExceededError"


def test_the_openai_package_for_node_reads_every_answer(programs: Programs, url: str) -> None:
    programs.need_node("openai")
    found = json.loads(programs.run(programs.node, SCRIPTS / "ask_openai.mjs", url, "coach", programs.node_folder))
    assert found["models"] == ["embedded", "coach", "quotes", "reviews"]
    assert found["text"]["choices"][0]["logprobs"]["tokens"] and found["text"]["system_fingerprint"].startswith("fp_")
    assert found["streamed"] == found["chat"]["choices"][0]["message"]["content"]
    assert {**found["usage"], "prompt_tokens_details": None} == {
        **found["chat"]["usage"],
        "prompt_tokens_details": None,
    }
    assert json.loads(found["shaped"])["mood"] in ("good", "bad")
    assert found["refused"]["isBadRequest"] and found["refused"]["code"] == "context_length_exceeded"


def test_the_openai_package_for_python_reads_every_answer(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked = {"model": "quotes", "messages": [{"role": "user", "content": "Be kind"}], "max_tokens": 5, "temperature": 0}
    answer = client.chat.completions.create(logprobs=True, **asked)  # type: ignore[call-overload]
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.content)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0 and answer.system_fingerprint
    streamed = client.chat.completions.create(stream=True, **asked)  # type: ignore[call-overload]
    text = "".join(event.choices[0].delta.content or "" for event in streamed)
    assert text == answer.choices[0].message.content


def test_promptfoo_runs_its_assertions(programs: Programs, url: str, tmp_path: Path) -> None:
    programs.need_node("promptfoo")
    provider = {"apiBaseUrl": f"{url}/v1", "apiKey": "none", "temperature": 0, "max_tokens": 3}
    config = {
        "prompts": ["Review: {{text}}\nSentiment:"],
        "providers": [{"id": f"openai:{kind}:reviews", "config": provider} for kind in ("completion", "chat")],
        "tests": [{"vars": {"text": "The lid is broken and it stopped without reason."},
                   "assert": [{"type": "icontains", "value": "negative"}]}],
    }  # fmt: skip
    (tmp_path / "promptfooconfig.json").write_text(json.dumps(config), encoding="utf-8")
    binary = programs.node_folder / "node_modules" / ".bin" / "promptfoo"
    programs.run(
        programs.node, binary, "eval", "--config", tmp_path / "promptfooconfig.json", "--output", tmp_path / "out.json",
        "--no-cache", "--no-table", "--no-progress-bar", PROMPTFOO_DISABLE_TELEMETRY="1", PROMPTFOO_DISABLE_UPDATE="1",
        PROMPTFOO_CONFIG_DIR=str(tmp_path / "promptfoo"), PROMPTFOO_DISABLE_REMOTE_GENERATION="1",
    )  # fmt: skip
    stats = json.loads((tmp_path / "out.json").read_text())["results"]["stats"]
    assert (stats["successes"], stats["failures"], stats["errors"]) == (2, 0, 0), stats
