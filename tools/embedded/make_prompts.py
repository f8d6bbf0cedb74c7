"""Train the soft prompts that the package carries, with the demo's settings: coach, quotes and reviews.

python tools/embedded/make_prompts.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from softprompt import BaseConfig, SoftPrompt, load_base, save_prompt, split_rows, train
from softprompt.base import Base
from softprompt.demo.tasks import TASKS, Task
from softprompt.storage.hub import publishable_record
from softprompt.storage.save import record_to_bytes

PLACE = Path(__file__).parents[2] / "src/softprompt/embedded/prompts"
_LEFT_OUT = ("seconds", "losses", "drift")  # of the run


def main() -> None:
    base = load_base(BaseConfig(base="embedded", dtype="float32"))
    for task in TASKS:
        save_prompt(_trained(base, task), PLACE / task.name, overwrite=True)
        print(PLACE / task.name)


def _trained(base: Base, task: Task) -> SoftPrompt:
    rows = split_rows(replace(task.data, validation="none")).train  # none is chosen by
    found = train(base, rows, task.train).prompt
    public = json.loads(publishable_record(record_to_bytes(found), task.name))["run"]
    run = {name: value for name, value in public.items() if name not in _LEFT_OUT}
    return SoftPrompt(found.tensor, replace(found.record, run={**run, "source": Path(task.data.data).name}))


if __name__ == "__main__":
    main()
