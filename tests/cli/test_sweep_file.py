"""A sweep's file: what it means, and that every mistake is one sentence with file, section and key."""

from __future__ import annotations

import pytest

from softprompt.cli.sweep_file import grid_of, read_sweep
from softprompt.config import DataConfig, TrainConfig
from softprompt.errors import ConfigError
from softprompt.runs.run_folder import is_part_name

DATA = '[data]\ndata = "rows.csv"\n'


@pytest.fixture
def read(tmp_path):
    def call(text):
        (tmp_path / "s.toml").write_text(text, encoding="utf-8")
        return read_sweep(tmp_path / "s.toml")

    return call


def refusal(read, text):
    with pytest.raises(ConfigError) as caught:
        read(text)
    message = str(caught.value)
    assert "s.toml" in message
    assert "\n" not in message
    return message


def test_one_prompt_of_one_task_needs_no_names(read, tmp_path):
    sweep = read(DATA + "[train]\nvirtual_tokens = 4\nseed = 3")
    assert sweep.tasks == {"": DataConfig(data=str(tmp_path / "rows.csv"))}
    assert sweep.candidates == {"": TrainConfig(virtual_tokens=4, seed=3)}
    assert (sweep.halving, sweep.ensemble, sweep.seed, sweep.base) == (True, False, 3, {})


def test_the_whole_file(read, tmp_path):
    (tmp_path / "quotes.jsonl").write_text("{}")
    sweep = read(
        """
        halving = false
        [base]
        base = "embedded"
        dtype = "float32"
        [data]
        text_column = "quote"
        validation = 0.2
        rows = 20
        [train]
        virtual_tokens = 8
        [grid]
        relative_learning_rate = [0.1, 1]
        seed = [0, 1]
        [candidates.from-text]
        init = "text"
        init_text = "A quote:"
        [tasks.quotes]
        data = "quotes.jsonl"
        [tasks.reviews]
        data = "reviews.csv"
        template = "{text}"
        completion = " {label}"
        validation = "held.csv"
        """
    )
    assert list(sweep.candidates) == ["rate0.1-seed0", "rate0.1-seed1", "rate1-seed0", "rate1-seed1", "from-text"]
    assert sweep.candidates["rate1-seed1"] == TrainConfig(virtual_tokens=8, relative_learning_rate=1.0, seed=1)
    assert sweep.candidates["from-text"] == TrainConfig(virtual_tokens=8, init="text", init_text="A quote:")
    assert sweep.tasks == {
        "quotes": DataConfig(
            data=str(tmp_path / "quotes.jsonl"), text_column="quote", validation="0.2", rows=20
        ),
        "reviews": DataConfig(
            data=str(tmp_path / "reviews.csv"), template="{text}", completion=" {label}", rows=20,
            validation=str(tmp_path / "held.csv"),
        ),
    }  # fmt: skip
    assert sweep.base == {"base": "embedded", "dtype": "float32"}
    assert not sweep.halving


class TestOver:
    """A more specific section replaces what it excludes in a shared one."""

    def test_rates(self, read):
        text = DATA + "[train]\nrelative_learning_rate = 0.5\n[candidates.a]\nlearning_rate = 0.01\n[candidates.b]\n"
        found = read(text).candidates
        assert (found["a"].learning_rate, found["a"].relative_learning_rate) == (0.01, None)
        assert (found["b"].learning_rate, found["b"].relative_learning_rate) == (None, 0.5)

    def test_starts(self, read):
        text = DATA + '[train]\ninit = "text"\ninit_text = "w5"\n[grid]\ninit = ["text", "vocab"]\n'
        found = read(text).candidates
        assert [(name, config.init, config.init_text) for name, config in found.items()] == [
            ("init_text", "text", "w5"), ("init_vocab", "vocab", None),
        ]  # fmt: skip

    def test_forms(self, read):
        found = read(
            '[data]\ndata = "x.csv"\ntemplate = "{a}"\ncompletion = "{b}"\n'
            '[tasks.a]\ncompletion = "{c}"\n[tasks.b]\ntext_column = "t"\n[tasks.c]\nmessages_column = "m"\n'
        ).tasks
        forms = [(each.template, each.completion, each.text_column, each.messages_column) for each in found.values()]
        assert forms == [("{a}", "{c}", None, None), (None, None, "t", None), (None, None, None, "m")]


class TestPlaces:
    """Paths are as seen from the file's folder, whatever folder the command runs in."""

    @pytest.mark.parametrize("name", ["rows.csv", "deep/rows.csv", "../rows.csv"])
    def test_what_is_there(self, read, tmp_path, monkeypatch, name):
        place = tmp_path / name
        place.parent.mkdir(exist_ok=True)
        place.write_text("x")
        monkeypatch.chdir("/")
        assert read(f'[data]\ndata = "{name}"').tasks[""].data == str(place)

    def test_a_hub_id_stays(self, read):
        assert read('[data]\ndata = "org/name"').tasks[""].data == "org/name"

    def test_a_file_where_the_command_runs_is_never_taken_for_one_beside_the_sweep(self, read, tmp_path, monkeypatch):
        elsewhere = tmp_path / "elsewhere"
        (elsewhere / "data").mkdir(parents=True)
        (elsewhere / "data" / "rows.csv").write_text("x")
        monkeypatch.chdir(elsewhere)
        assert read('[data]\ndata = "data/rows.csv"').tasks[""].data == str(tmp_path / "data" / "rows.csv")

    def test_absolute_ones_and_shares_stay(self, read):
        found = read('[data]\ndata = "/x/rows.csv"\nvalidation = "/x/held.csv"\ntest = 20').tasks[""]
        assert (found.data, found.validation, found.test) == ("/x/rows.csv", "/x/held.csv", "20")

    def test_a_base(self, read, tmp_path):
        (tmp_path / "tiny").mkdir()
        (tmp_path / "embedded").mkdir()
        given = [read(DATA + f'[base]\nbase = "{name}"').base["base"] for name in ("tiny", "embedded", "org/model")]
        assert given == [str(tmp_path / "tiny"), "embedded", "org/model"]


class TestGridNames:
    @pytest.mark.parametrize(
        ("values", "names"),
        [
            ({}, []),
            ({"seed": [0, 1]}, ["seed0", "seed1"]),
            ({"seed": [5]}, ["seed5"]),
            ({"seed": [5], "epochs": [1, 2]}, ["epochs1", "epochs2"]),
            ({"relative_learning_rate": [1e-05, 1.0]}, ["rate1e-05", "rate1"]),
            ({"eos": [True, False]}, ["eos_true", "eos_false"]),
            ({"virtual_tokens": [2, 4], "batch_tokens": [64]}, ["tokens2", "tokens4"]),
            ({"virtual_tokens": [2, 4], "batch_tokens": [6, 7]}, [
                "virtual-tokens2-batch-tokens6", "virtual-tokens2-batch-tokens7",
                "virtual-tokens4-batch-tokens6", "virtual-tokens4-batch-tokens7",
            ]),
            ({"init_text": ["A b/c: d", "A b c d"]}, ["text_A_b_c_d-0", "text_A_b_c_d-1"]),
            ({"weight_decay": [1e20]}, ["decay1e20"]),
        ],
    )  # fmt: skip
    def test_say_what_varies(self, values, names):
        assert list(grid_of(values)) == names

    def test_are_safe_short_and_all_different(self):
        values = {
            "init_text": ["Über " * 20, "x" * 80, "../..", "-"], "virtual_tokens": list(range(1, 4)),
            "max_grad_norm": [0.1, 0.2], "reparameterisation": ["residual-mlp", "low-rank"], "eos_weight": [0.5, 1.0],
            "warmup_steps": [0, 1], "batch_rows": [4, 8],
        }  # fmt: skip
        found = grid_of(values)
        assert len(found) == 4 * 3 * 2**5
        assert all(is_part_name(name) for name in found), [name for name in found if not is_part_name(name)]
        assert len({repr(settings) for settings in found.values()}) == len(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("= 3", "is not TOML"),
        ("halvng = true", "there is no setting 'halvng' here; did you mean 'halving'?"),
        ("[trian]", "did you mean 'train'?"),
        ("[zzz]", "known are halving, ensemble, base, data"),
        ("halving = 1", "halving is 1; it must be true or false"),
        ("train = 3", "[train] is 3; it must be a section"),
        ("[tasks]\nquotes = 3", "[tasks.quotes] is 3; it must be a section"),
        (
            "[train]\nvirtual_token = 3",
            "[train]: there is no setting 'virtual_token' here; did you mean 'virtual_tok",
        ),
        ("[grid]\nsede = [1]", "[grid]: there is no setting 'sede' here; did you mean 'seed'?"),
        ("[base]\ndtyp = 'x'", "[base]: there is no setting 'dtyp' here"),
        ("[candidates.a]\nbase = 'x'", "[candidates.a]: there is no setting 'base' here"),
        ("[tasks.a]\nseed = 1", "[tasks.a]: there is no setting 'seed' here"),
        ("[train]\nepochs = '6'", "[train]: epochs is '6'; it must be a whole number"),
        ("[train]\nepochs = 6.0", "[train]: epochs is 6.0; it must be a whole number"),
        ("[train]\nepochs = true", "[train]: epochs is True; it must be a whole number"),
        ("[train]\neos = 1", "[train]: eos is 1; it must be true or false"),
        ("[train]\nlearning_rate = 'x'", "[train]: learning_rate is 'x'; it must be a number"),
        ("[train]\ninit_text = 3", "[train]: init_text is 3; it must be text in quotes"),
        ("[train]\nschedule = 'up'", "[train]: schedule is 'up'; it must be one of 'linear', 'cosine'"),
        ("[train]\nschedule = ['linear']", "[train]: schedule is ['linear']; it must be one of"),
        ("[train]\nepochs = 0", "[train]: epochs is 0; it must be at least 1"),
        ("[data]\ndata = 1", "[data]: data is 1; it must be text in quotes"),
        ("[data]\nvalidation = true", "[data]: validation is True; it must be text"),
        ("[data]\nrows = 1979-05-27", "[data]: rows is "),
        ("[grid]\nseed = 3", "[grid]: seed is 3; it must be a list of values to try, [3] say"),
        ("[grid]\nseed = []", "[grid]: seed is an empty list"),
        ("[grid]\nseed = [1, '2']", "[grid]: seed is '2'; it must be a whole number"),
        ("[grid]\nrelative_learning_rate = [1, 1.0]", "[grid]: relative_learning_rate names 1.0 twice"),
        ("[grid]\nseed = [1, -1]", "candidate seed-1: seed is -1; it must be 0 or more"),
        ("[grid]\nseed = [1, 2]\n[candidates.seed1]", "[candidates.seed1] has the name of a candidate of the grid"),
        ("ensemble = true\n[grid]\nseed = [1]", "ensemble needs several candidates to vote"),
        ("[candidates.a]\ninit = 'text'", "candidate a: init 'text' needs init_text"),
        ("[candidates.a]\nlearning_rate = 1\nrelative_learning_rate = 1", "candidate a: learning_rate=1 and relative"),
    ],
)
def test_mistakes(read, text, said):
    assert said in refusal(read, text if "data" in text else text + "\n" + DATA)


def test_no_data(read):
    assert "[data] names no data" in refusal(read, "[train]\nseed = 1")
    assert "[tasks.b] names no data" in refusal(read, '[tasks.a]\ndata = "x.csv"\n[tasks.b]')


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the sweep file .*none.toml: No such file"):
        read_sweep(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"# Caf\xe9")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_sweep(tmp_path / "latin.toml")
