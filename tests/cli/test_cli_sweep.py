"""softprompt sweep: many prompts of several tasks in one pass, each as it becomes alone."""

from __future__ import annotations

import os
import shutil
import signal
import threading

import pytest
import torch
from support.command_line import run, succeed
from support.material import review, sentence, write_csv, write_jsonl

from softprompt.runs import RunFolder
from softprompt.storage import is_set, load_prompt, load_set

TWO_TASKS = """
[base]
base = "{base}"
dtype = "float32"
[data]
text_column = "prompt"
rows = 24
[train]
virtual_tokens = 3
epochs = 4
batch_rows = 6
[grid]
relative_learning_rate = [0.03, 0.3]
seed = [0, 1]
[candidates.from-text]
init = "text"
init_text = "w7 w8 w9"
schedule = "cosine"
[tasks.texts]
data = "texts.csv"
validation = "texts-held.csv"
[tasks.reviews]
data = "reviews.jsonl"
template = "w5 {{text}} w6"
completion = " {{label}}"
validation = "reviews-held.jsonl"
"""
CANDIDATES = {
    **{
        f"rate{rate}-seed{seed}": ("--relative-learning-rate", rate, "--seed", seed)
        for rate in (0.03, 0.3)
        for seed in (0, 1)
    },
    "from-text": ("--init", "text", "--init-text", "w7 w8 w9", "--schedule", "cosine"),
}
TASKS = {
    "texts": ("--data", "texts.csv", "--validation", "texts-held.csv", "--text-column", "prompt"),
    "reviews": (
        "--data", "reviews.jsonl", "--validation", "reviews-held.jsonl",
        "--template", "w5 {text} w6", "--completion", " {label}",
    ),
}  # fmt: skip
SHARED = ("--dtype", "float32", "--rows", 24, "--virtual-tokens", 3, "--epochs", 4, "--batch-rows", 6)


def write_data(folder):
    write_csv(folder / "texts.csv", [{"prompt": sentence(i)} for i in range(40)])
    write_csv(folder / "texts-held.csv", [{"prompt": sentence(i)} for i in range(60, 66)])
    write_jsonl(folder / "reviews.jsonl", [review(i) for i in range(40)])
    write_jsonl(folder / "reviews-held.jsonl", [review(i) for i in range(60, 66)])


@pytest.fixture
def sweep(tmp_path, base_folder):
    """Runs a sweep of the text given, in its own folder with data in it."""
    write_data(tmp_path)

    def call(text, *flags, out="run", command=succeed):
        (tmp_path / "sweep.toml").write_text(text.format(base=base_folder), encoding="utf-8")
        return command("sweep", "sweep.toml", "--out", out, *flags, cwd=tmp_path)

    return call


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory, base_folder):
    """A finished sweep of five candidates for each of two tasks, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("two-tasks")
    write_data(folder)
    (folder / "sweep.toml").write_text(TWO_TASKS.format(base=base_folder), encoding="utf-8")
    return folder, succeed("sweep", "sweep.toml", "--out", "run", "--json", cwd=folder)


def difference(one, other):
    found, wanted = load_prompt(one).tensor, load_prompt(other).tensor
    return float((found - wanted).norm() / wanted.norm())


class TestTwoTasks:
    def test_the_folder(self, two_tasks):
        folder, ran = two_tasks
        place = folder / "run"
        assert {item.name for item in place.iterdir()} == {
            "run.json", "metrics.jsonl", "checkpoints", "texts", "reviews",
        }  # fmt: skip
        for task in TASKS:
            assert {item.name for item in (place / task / "candidates").iterdir()} == set(CANDIDATES)
            kept = ran.json["kept"][task].removeprefix(f"{task}/")
            assert difference(place / task, place / task / "candidates" / kept) == 0.0
            values = {name: ran.json["candidates"][f"{task}/{name}"]["value"] for name in CANDIDATES}
            assert kept == min(values, key=values.__getitem__)
        plan = RunFolder(place).read_plan()
        assert plan["tasks"]["reviews"]["data"]["data"] == "reviews.jsonl"
        assert plan["settings"]["dtype"] == "float32"

    def test_weak_candidates_are_dropped_within_their_task(self, two_tasks):
        _, ran = two_tasks
        for task in TASKS:
            after = [ran.json["candidates"][f"{task}/{name}"]["dropped_after"] for name in CANDIDATES]
            assert after.count(None) == 1

    @pytest.mark.parametrize("task", TASKS)
    def test_what_is_kept_is_what_train_makes_alone(self, two_tasks, task, base_folder, tmp_path):
        folder, ran = two_tasks
        kept = ran.json["kept"][task].removeprefix(f"{task}/")
        others = [name for name in CANDIDATES if name != kept]
        fixed = ("train", "--base", base_folder, *SHARED, *TASKS[task])
        succeed(*fixed, *CANDIDATES[kept], "--out", tmp_path / "alone", cwd=folder)
        succeed(*fixed, *CANDIDATES[others[0]], "--out", tmp_path / "other", cwd=folder)
        assert difference(folder / "run" / task, tmp_path / "alone") < 1e-3
        assert difference(folder / "run" / task, tmp_path / "other") > 0.01  # the control
        mine, alone = (load_prompt(place).record for place in (folder / "run" / task, tmp_path / "alone"))
        assert mine.form == alone.form
        assert mine.run["kept_step"] == alone.run["kept_step"]
        assert mine.run["validation_losses"] == [
            [step, pytest.approx(loss, rel=1e-3)] for step, loss in alone.run["validation_losses"]
        ]
        assert mine.run["test"] == alone.run["test"]

    def test_resumed_it_prints_again_what_it_printed(self, two_tasks):
        folder, ran = two_tasks
        again = succeed("sweep", "sweep.toml", "--out", "run", "--resume", "--json", cwd=folder)
        assert "is finished; there is nothing to resume" in again.err
        assert again.json == ran.json

    def test_compare_finds_the_rows_that_each_task_set_aside(self, two_tasks, base_folder):
        folder, _ = two_tasks
        flags = [part for task in TASKS for part in ("--prompt", folder / "run" / task)]
        found = succeed("compare", "--base", base_folder, "--dtype", "float32", *flags, "--json").json
        assert {(loss["held_out"], loss["num_rows"]) for loss in found["losses"]} == {
            ("texts.csv", 16), ("reviews.jsonl", 16),
        }  # fmt: skip
        assert [item["prompt"] for item in found["accuracies"]] == [None, *TASKS]


ONE = """
[data]
data = "texts.csv"
text_column = "prompt"
rows = 24
[train]
virtual_tokens = 3
epochs = 2
"""


def test_one_prompt_of_one_task_is_the_run_of_train_to_the_bit(sweep, base_folder, tmp_path):
    ran = sweep(ONE, "--base", base_folder, "--dtype", "float32", "--json")
    flags = ("--data", "texts.csv", "--text-column", "prompt", "--rows", 24, "--virtual-tokens", 3, "--epochs", 2)
    succeed("train", "--base", base_folder, "--dtype", "float32", *flags, "--out", "alone", cwd=tmp_path)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "alone")]
    assert weights[0] == weights[1]
    assert ran.json["content_hash"] == load_prompt(tmp_path / "run").content_hash
    plans = [RunFolder(tmp_path / name).read_plan() for name in ("run", "alone")]
    assert plans[0]["plan"] == plans[1]["plan"]
    assert not (tmp_path / "run" / "candidates").exists()


def test_one_named_candidate_of_one_named_task(sweep, base_folder, tmp_path):
    text = ONE.replace('data = "texts.csv"\n', "") + '[candidates.only]\nseed = 2\n[tasks.mine]\ndata = "texts.csv"'
    ran = sweep(text, "--base", base_folder, "--json")
    assert ran.json["kept"] == {"mine": "mine/only"}
    assert load_prompt(tmp_path / "run" / "mine").record.run["plan"]["config"]["seed"] == 2
    assert not (tmp_path / "run" / "mine" / "candidates").exists()


def test_flags_override_the_file_and_progress_is_told(sweep, base_folder, tmp_path):
    text = '[base]\nbase = "nobody/nothing"\ndtype = "bfloat16"\n' + ONE + "[grid]\nseed = [1, 2]\n"
    ran = sweep(text.replace("rows = 24", "rows = 24\nvalidation = 6"), "--base", base_folder, "--dtype", "float32")
    assert "float32 on cpu" in ran.err
    assert "2 prompts train together, " in ran.err
    assert "seed1" in ran.out
    assert "(kept)" in ran.out
    assert (tmp_path / "run" / "candidates" / "seed2" / "adapter_model.safetensors").exists()


def test_a_candidate_of_another_seed_finds_its_held_out_rows_again(sweep, base_folder, tmp_path):
    """Once they were dealt by the candidate's own seed when they were read again, and so not found."""
    text = ONE.replace("rows = 24", "rows = 24\nshuffle = true\nvalidation = 6") + "[grid]\nseed = [4, 5]\n"
    sweep(text, "--base", base_folder, "--dtype", "float32")
    candidates = tmp_path / "run" / "candidates"
    flags = [part for name in ("seed4", "seed5") for part in ("--prompt", candidates / name)]
    ran = succeed("compare", "--base", base_folder, "--dtype", "float32", *flags, "--json")
    assert "note:" not in ran.err
    assert [(loss["held_out"], loss["prompt"]) for loss in ran.json["losses"]] == [
        ("texts.csv", None), ("texts.csv", "seed4"), ("texts.csv", "seed5"),
    ]  # fmt: skip


class TestEnsemble:
    @pytest.fixture(scope="class")
    def team(self, tmp_path_factory, base_folder):
        folder = tmp_path_factory.mktemp("team")
        write_data(folder)
        (folder / "sweep.toml").write_text(
            'ensemble = true\n[data]\ndata = "reviews.jsonl"\nrows = 24\ntemplate = "w5 {text} w6"\n'
            'completion = " {label}"\n[train]\nvirtual_tokens = 3\nepochs = 2\n[grid]\nseed = [0, 1, 2]\n'
        )
        succeed("sweep", "sweep.toml", "--base", base_folder, "--dtype", "float32", "--out", "team", cwd=folder)
        return folder / "team"

    def test_is_kept_as_a_set(self, team):
        assert is_set(team)
        members = load_set(team)
        assert list(members) == ["candidates/seed0", "candidates/seed1", "candidates/seed2"]
        assert len({prompt.content_hash for prompt in members.values()}) == 3
        assert all(line["kind"] != "dropped" for line in RunFolder(team).read_metrics())
        load_prompt(team)

    def test_votes_in_compare(self, team, base_folder, tmp_path):
        flags = ("compare", "--base", base_folder, "--dtype", "float32", "--ensemble", team)
        found = succeed(*flags, "--json").json
        assert [item["prompt"] for item in found["accuracies"]] == [None, "team"]
        voted = found["accuracies"][1]
        assert list(voted["members"]) == ["candidates/seed0", "candidates/seed1", "candidates/seed2"]
        assert (voted["num_rows"], voted["generated"]) == (16, None)
        assert found["ensembles"] == {"team": 3}
        ran = succeed(*flags, "--markdown", tmp_path / "report.md")
        mean = sum(voted["members"].values()) / 3
        title = f"Members of team on reviews.jsonl: 3 vote, {mean:.1%} on average"
        assert title in " ".join(ran.out.split())
        assert title in (tmp_path / "report.md").read_text()
        assert "Classes of reviews.jsonl by team" in " ".join(ran.out.split())

    def test_beside_its_own_best_prompt(self, team, base_folder):
        flags = ("--prompt", team, "--ensemble", team, "--json")
        found = succeed("compare", "--base", base_folder, "--dtype", "float32", *flags).json
        assert [item["prompt"] for item in found["accuracies"]] == [None, "team", "team (vote)"]

    def test_what_cannot_vote(self, team, base_folder, library):
        fixed = ("compare", "--base", base_folder)
        assert "is no set of prompts" in run(*fixed, "--ensemble", library / "coach").complaint
        assert "Missing option '--prompt' or '--ensemble'" in run(*fixed).complaint
        assert "is given twice" in run(*fixed, "--ensemble", team, "--ensemble", team).complaint


LONG = (
    ONE.replace("epochs = 2", "epochs = 12\nbatch_rows = 4\nsave_every = 8").replace(
        "rows = 24", "rows = 24\nvalidation = 6"
    )
    + "[grid]\nseed = [0, 1]\n[tasks.one]\n[tasks.two]\nshuffle = true\n"
)


def untimed(folder):
    return [{**line, "seconds": 0} for line in RunFolder(folder).read_metrics()]


@pytest.fixture
def interrupted(sweep, base_folder, tmp_path):
    """A sweep in `run` that Ctrl-C stopped on the way."""
    ended = threading.Event()
    metrics = tmp_path / "run" / "metrics.jsonl"

    def interrupt():
        while not metrics.exists() or metrics.read_bytes().count(b'"step"') < 60:
            if ended.wait(0.005):
                return
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        ran = sweep(LONG, "--base", base_folder, "--dtype", "float32", command=run)
    finally:
        ended.set()
        thread.join()
    assert ran.code == 130
    return ran


def forget_result(folder):
    run_folder = RunFolder(folder)
    run_folder.write_plan({key: value for key, value in run_folder.read_plan().items() if key != "result"})


@pytest.mark.medium
class TestResume:
    def test_goes_on_as_if_it_had_never_stopped(self, sweep, base_folder, interrupted, tmp_path):
        said = "interrupted; the prompts so far are kept; go on with: softprompt sweep sweep.toml --resume --out run"
        assert said in interrupted.err
        assert RunFolder(tmp_path / "run").read_plan()["result"]["interrupted"] is True
        load_prompt(tmp_path / "run" / "one")
        ran = sweep(LONG, "--resume")  # the flags of the base are known from the run
        assert "resumed after step" in ran.err
        sweep(LONG, "--base", base_folder, "--dtype", "float32", out="straight")
        assert untimed(tmp_path / "run") == untimed(tmp_path / "straight")
        for task in ("one", "two"):
            for inner in ("", "candidates/seed0", "candidates/seed1"):
                weights = [
                    (tmp_path / out / task / inner / "adapter_model.safetensors").read_bytes()
                    for out in ("run", "straight")
                ]
                assert weights[0] == weights[1]
        again = sweep(LONG, "--resume")
        assert "is finished; there is nothing to resume" in again.err


class TestAnotherSweep:
    """Resuming a run that has no result, as after a kill, and its last checkpoint."""

    TEXT = LONG.replace("epochs = 12", "epochs = 2")

    @pytest.fixture(scope="class")
    def killed(self, tmp_path_factory, base_folder):
        folder = tmp_path_factory.mktemp("killed")
        write_data(folder)
        (folder / "sweep.toml").write_text(self.TEXT)
        succeed("sweep", "sweep.toml", "--base", base_folder, "--dtype", "float32", "--out", "run", cwd=folder)
        forget_result(folder / "run")
        return folder / "run"

    @pytest.fixture
    def resume(self, sweep, killed, tmp_path):
        shutil.copytree(killed, tmp_path / "run")

        def call(text, command=run):
            return sweep(text, "--resume", command=command)

        return call

    def test_the_same_otherwise_written_is_the_same(self, resume):
        text = self.TEXT.replace("virtual_tokens = 3", "virtual_tokens = 3\nschedule = 'stable-decay'  # the default")
        ran = resume(text, command=succeed)
        assert "resumed after step 10" in ran.err

    def test_a_sweep_of_a_release_without_defaults_by_task_goes_on(self, resume, tmp_path):
        folder = RunFolder(tmp_path / "run")
        plan = folder.read_plan()
        for name, each in plan["sweep"]["candidates"].items():
            plan["sweep"]["candidates"][name] = {**each, "reparameterisation": "residual-mlp", "epochs": 2}
        plans = [each["plan"] for each in plan["candidates"].values()]
        for known in (*plan["sweep"]["candidates"].values(), *(each["config"] for each in plans)):
            del known["loss"]
            known["relative_learning_rate"] = None
        folder.write_plan(plan)
        assert "resumed after step 10" in resume(self.TEXT, command=succeed).err

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ("seed = [0, 1]", "seed = [0, 2]", "has the candidates seed0, seed2, but the sweep in run was begun with"),
            ("[tasks.two]", "[tasks.three]", "has the tasks one, three, but"),
            (
                "virtual_tokens = 3",
                "virtual_tokens = 4",
                "says candidates.seed0.virtual_tokens = 4, but the sweep in r",
            ),
            ("shuffle = true", "shuffle = false", "says tasks.two.shuffle = False, but"),
            ("[data]", "halving = false\n[data]", "says halving = False, but the sweep in run was begun with True;"),
            ("[data]", "[base]\nrevision = 'x'\n[data]", "--revision is 'x', but the run in run was begun with None"),
            ("validation = 6", "validation = 7", "is of another run"),
        ],
    )
    def test_another_is_refused(self, resume, old, new, said):
        assert old in self.TEXT
        assert said in resume(self.TEXT.replace(old, new)).complaint

    def test_train_and_sweep_know_their_own_runs(self, sweep, killed, base_folder, tmp_path):
        complaint = run("train", "--resume", "--out", killed).complaint
        assert complaint == f"{killed} is a run of softprompt sweep; resume it with that"
        flags = ("--data", "texts.csv", "--text-column", "prompt", "--max-steps", 1, "--out", "trained")
        succeed("train", "--base", base_folder, *flags, cwd=tmp_path)
        forget_result(tmp_path / "trained")
        refused = sweep(self.TEXT, "--resume", out="trained", command=run)
        assert refused.complaint == "trained is a run of softprompt train; resume it with that"


class TestOverwriting:
    def write(self, sweep, base_folder, task, *flags, command=succeed):
        text = ONE.replace("epochs = 2", "epochs = 1") + f"[tasks.{task}]\n"
        return sweep(text, "--base", base_folder, "--dtype", "float32", *flags, command=command)

    def test_takes_the_earlier_sweeps_tasks_away_and_leaves_the_users_files(self, sweep, base_folder, tmp_path):
        self.write(sweep, base_folder, "old")
        (tmp_path / "run" / "notes.txt").write_text("mine")
        self.write(sweep, base_folder, "new", "--overwrite")
        assert not (tmp_path / "run" / "old").exists()
        (tmp_path / "run" / "new" / "notes.txt").write_text("mine")
        self.write(sweep, base_folder, "newer", "--overwrite")
        assert [item.name for item in (tmp_path / "run" / "new").iterdir()] == ["notes.txt"]
        assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
        load_prompt(tmp_path / "run" / "newer")

    def test_a_users_folder_in_the_place_of_a_task_is_refused(self, sweep, base_folder, tmp_path):
        self.write(sweep, base_folder, "old")
        (tmp_path / "run" / "thesis").mkdir()
        ran = self.write(sweep, base_folder, "thesis", "--overwrite", command=run)
        assert "run/thesis exists and is not of the run in run; give the task another name" in ran.complaint
        load_prompt(tmp_path / "run" / "old")

    def test_is_on_purpose(self, sweep, base_folder):
        self.write(sweep, base_folder, "old")
        assert "--overwrite" in self.write(sweep, base_folder, "old", command=run).complaint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ONE, "sweep.toml names no base; give one: --base, or base = in its [base]"),
        ("[base]\nbase = '{base}'\n" + ONE.replace("texts", "none"), "there is no data at "),
        ("[base]\nbase = '{base}'\n" + ONE + "[grid]\nseed = [1, 2]\n", "no validation rows to choose among 2 candida"),
        (ONE + "[candidates.'../up']\n", "sweep.toml [candidates]: '../up' is not a prompt's name"),
        (ONE + "[candidates.'state.json']\n", "[candidates]: 'state.json' is what a file or folder of every run is"),
        (ONE + "[tasks.checkpoints]\n", "[tasks]: 'checkpoints' is what a file or folder of every run is called"),
        (ONE + "[tasks.'']\n[tasks.b]\n", "[tasks]: '' is not a prompt's name"),
        ("[base]\nbase = '{base}'\n" + ONE.replace('"prompt"', '"promt"'), "did you mean 'prompt'?"),
        ("[base]\nbase = '{base}'\n" + ONE.replace("rows", "row"), "[data]: there is no setting 'row' here; did you"),
    ],
)
def test_refusals_leave_nothing(sweep, text, said, tmp_path):
    assert said in sweep(text, command=run).complaint
    assert not (tmp_path / "run").exists()


def test_no_such_file_and_tensorboard(sweep, base_folder, tmp_path):
    assert "cannot read the sweep file" in run("sweep", "none.toml", "--out", "x", cwd=tmp_path).complaint
    sweep(ONE + "[candidates.a]\n", "--base", base_folder, "--tensorboard")
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.*"))


def test_prompts_of_different_lengths_train_together(sweep, base_folder, tmp_path):
    text = ONE.replace("rows = 24", "rows = 24\nvalidation = 6") + "[grid]\nvirtual_tokens = [2, 5]\n"
    sweep("halving = false\n" + text, "--base", base_folder, "--dtype", "float32")
    shapes = [load_prompt(tmp_path / "run" / "candidates" / name).tensor.shape for name in ("tokens2", "tokens5")]
    assert shapes == [torch.Size([2, 16]), torch.Size([5, 16])]
