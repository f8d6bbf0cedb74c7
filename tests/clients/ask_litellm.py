"""litellm over a running server: `python ask_litellm.py URL MODEL OUT.json`. Knows nothing of softprompt."""

from __future__ import annotations

import json
import sys

import litellm

url, model, out = sys.argv[1:]
litellm.num_retries = 0
settings = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "max_tokens": 4}
short, long = [[{"role": "user", "content": "There are two " * times}] for times in (1, 2000)]
found = {"answer": litellm.completion(messages=short, temperature=0, **settings).choices[0].message.content}
for kind, ask in {
    "chat": lambda: litellm.completion(messages=long, **settings),
    "text": lambda: litellm.text_completion(
        prompt=long[0]["content"], **{**settings, "model": f"text-completion-openai/{model}"}
    ),
}.items():
    try:
        ask()
    except Exception as error:
        found[kind] = type(error).__name__
with open(out, "w", encoding="utf-8") as file:
    json.dump(found, file)
