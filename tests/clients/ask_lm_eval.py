"""lm-evaluation-harness over a running server: `python ask_lm_eval.py URL MODEL TOKENIZER ITEMS.jsonl OUT.json`.

Each item has `context`, `choices` and `gold`. Runs where lm_eval is installed; knows nothing of softprompt.
"""

from __future__ import annotations

import json
import sys

from lm_eval import simple_evaluate

url, model, tokenizer, items, out = sys.argv[1:]
task = {
    "task": "items",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": items}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
arguments = {
    "model": model, "base_url": f"{url}/v1/completions", "tokenizer": tokenizer, "tokenizer_backend": "huggingface",
    "num_concurrent": 1, "max_retries": 1,
}  # fmt: skip
found = simple_evaluate("local-completions", arguments, tasks=[task], batch_size=4, bootstrap_iters=0)
samples = sorted(found["samples"]["items"], key=lambda sample: sample["doc_id"])
with open(out, "w", encoding="utf-8") as file:
    json.dump(
        {
            "accuracy": found["results"]["items"]["acc,none"],
            "log_likelihoods": [[choice[0] for choice in sample["filtered_resps"]] for sample in samples],
        },
        file,
    )
