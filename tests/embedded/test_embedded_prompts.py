"""The soft prompts that the package carries: they load on the embedded base, and do their tasks better than none."""

import pytest

from softprompt.base import load_base
from softprompt.config import BaseConfig
from softprompt.data import split_rows
from softprompt.demo.tasks import TASKS
from softprompt.embedded import prompts_folder
from softprompt.evaluation import compare
from softprompt.storage import Library, load_prompt


@pytest.fixture(scope="module")
def embedded_base():
    return load_base(BaseConfig(base="embedded", dtype="float32"))


def test_the_library_holds_one_prompt_per_task(embedded_base):
    library = Library(prompts_folder())
    assert library.names() == tuple(sorted(task.name for task in TASKS))
    assert [check.problem for check in library.check(embedded_base)] == [None] * len(TASKS)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["coach", "quotes"])
def test_each_lowers_the_loss_of_rows_that_it_never_saw(embedded_base, name):
    prompt = load_prompt(prompts_folder() / name, embedded_base)
    test = split_rows(next(task for task in TASKS if task.name == name).data).test
    found = compare(embedded_base, {name: prompt}, held_out={name: test})
    losses = {loss.prompt: loss.loss for loss in found.losses}
    assert losses[name] < 0.85 * losses[None]
