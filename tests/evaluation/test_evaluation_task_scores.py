"""Scores of greedy answers: those of a plain greedy loop, cut and ended where they should be, beside the base's."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from support.slow_truth import plain_greedy
from support.tiny_bases import EOS, LIMIT, build_base, build_tokenizer, random_ids, random_prompt

from softprompt.base import freeze_base
from softprompt.data import chat_prompt_ids, rows_from_records, rows_from_texts
from softprompt.errors import ConfigError, LengthError, MissingDependencyError
from softprompt.evaluation import ScoreConfig, compare
from softprompt.evaluation.scores import check_scores, greedy_answers, questions_of, text_scores
from softprompt.families import forward_of
from softprompt.prompt import SoftPrompt

CHRF = ScoreConfig(score=("chrf",))


def words(count, seed):
    return " ".join(f"w{token}" for token in random_ids(count, seed))


def questions_and_answers(count, length=3):
    records = [{"q": words(2 + i % 5, i), "a": words(1 + i % length, 50 + i)} for i in range(count)]
    return rows_from_records(records, template="w5 {q} w6", completion=" {a}")


def soft(base, seed=0, length=4):
    return SoftPrompt(random_prompt(base, length, seed))


def true_answers(base, rows, prompt, num_new):
    """Texts of a plain greedy loop."""
    texts = []
    for record in rows.records:
        before = base.bos_ids + base.encode(f"w5 {record['q']} w6")
        ids, _, _ = plain_greedy(base, before, None if prompt is None else prompt.tensor, num_new)
        texts.append(base.decode([token for token in ids if token not in base.stop_ids]))
    return texts


def answers(base, rows, prompt, **limits):
    return greedy_answers(base, forward_of(base), questions_of(base, rows).items, prompt, **limits)


class TestAnswers:
    @pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
    @pytest.mark.parametrize("seed", [None, 0], ids=["bare", "prompted"])
    def test_greedy_answers_are_those_of_a_plain_loop_up_to_the_longest_reference_plus_one(self, request, family, seed):
        base = request.getfixturevalue(family)
        prompt = None if seed is None else soft(base, seed)
        rows = questions_and_answers(20)
        found = [answer.split() for answer in answers(base, rows, prompt)]
        assert found == [text.split() for text in true_answers(base, rows, prompt, 3 + 1)]
        assert found != [text.split() for text in true_answers(base, rows, soft(base, 7), 3 + 1)]  # control

    def test_an_answer_ends_at_eos_or_at_the_limit(self, tiny_llama):
        rows = questions_and_answers(6)
        silent = freeze_base(tiny_llama.model, build_tokenizer(has_bos=True), name="endless")
        endless = replace(silent, stop_ids=())
        assert {len(text.split()) for text in answers(endless, rows, soft(endless))} <= {3, 4}  # EOS shows no word
        first = plain_greedy(endless, questions_of(endless, rows).items[0].ids, soft(endless).tensor, 1)[0][0]
        ended = replace(silent, stop_ids=(EOS, first))
        assert answers(ended, rows, soft(ended))[0] == ""

    def test_max_new_tokens_lowers_the_limit_of_answers(self, tiny_llama):
        rows = questions_and_answers(6)
        found = answers(tiny_llama, rows, None, max_new_tokens=2)
        assert [text.split() for text in found] == [text.split() for text in true_answers(tiny_llama, rows, None, 2)]
        assert answers(tiny_llama, rows, None, max_new_tokens=50) == answers(tiny_llama, rows, None)

    def test_a_long_question_keeps_its_end_and_shortens_no_other(self, tiny_llama):
        """A long reference elsewhere takes no room from a question."""
        ending = words(LIMIT, 3)
        records = [{"q": words(60, 1), "a": "w7"}, {"q": f"w9 {ending}", "a": "w7"}, {"q": ending, "a": "w7"}]
        rows = rows_from_records([*records, {"q": "w8", "a": words(50, 2)}], template="w5 {q} w6", completion=" {a}")
        asked = questions_of(tiny_llama, rows).items
        found = greedy_answers(tiny_llama, forward_of(tiny_llama), asked, soft(tiny_llama))
        (whole,) = plain_greedy(tiny_llama, asked[0].ids, soft(tiny_llama).tensor, 20)[:1]
        assert found[0].split()[:20] == tiny_llama.decode(whole).split()
        assert found[1] == found[2]
        assert len(found[1].split()) <= 2

    def test_a_prompt_that_fills_the_context_is_refused(self, tiny_llama):
        with pytest.raises(LengthError, match="no text fits before the answer"):
            answers(tiny_llama, questions_and_answers(2), soft(tiny_llama, length=LIMIT - 1))


class TestQuestions:
    def test_the_question_of_a_chat_ends_before_its_last_answered_turn(self, tiny_llama):
        turns = [("user", "w5 w6"), ("assistant", "w7"), ("user", "w8"), ("assistant", "w9 w10"), ("user", "w11")]
        messages = [{"role": role, "content": text} for role, text in turns]
        rows = rows_from_records([{"m": messages}, {"m": messages[:1] + messages[1:2]}], messages_column="m")
        first, second = questions_of(tiny_llama, rows).items
        assert (first.reference, second.reference) == ("w9 w10", "w7")
        assert first.ids == chat_prompt_ids(tiny_llama, messages[:3])
        assert second.ids == chat_prompt_ids(tiny_llama, messages[:1])

    def test_rows_without_an_answer_are_left_out(self, tiny_llama):
        opening = [{"role": "assistant", "content": "w5"}, {"role": "user", "content": "w6"}]
        silent = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": " "}]
        rows = rows_from_records([{"m": opening}, {"m": silent}], messages_column="m")
        assert questions_of(tiny_llama, rows).items == ()
        records = [{"q": "w5", "a": "w6"}, {"q": "w7", "a": ""}, {"q": "w8", "a": "w9"}]
        asked = questions_of(tiny_llama, rows_from_records(records, template="{q}", completion=" {a}"))
        assert [question.index for question in asked.items] == [0, 2]
        assert asked.num_available == 2
        assert questions_of(tiny_llama, rows_from_texts(["w5 w6"])).items == ()


class TestScores:
    def test_scores_are_means_over_rows_with_differences_to_the_base(self, tiny_llama):
        prompt, rows = soft(tiny_llama), questions_and_answers(12)
        references = [record["a"] for record in rows.records]
        config = ScoreConfig(score=("chrf", "f1", "chrf"))
        found = compare(tiny_llama, {"p": prompt}, held_out={"set": rows}, scoring=config).scores
        assert [(item.name, item.prompt) for item in found] == [
            ("chrf", None), ("chrf", "p"), ("f1", None), ("f1", "p"),
        ]  # fmt: skip
        bare = text_scores("chrf", true_answers(tiny_llama, rows, None, 4), references)
        ours = text_scores("chrf", true_answers(tiny_llama, rows, prompt, 4), references)
        assert (found[0].value, found[1].value) == pytest.approx((sum(bare) / 12, sum(ours) / 12))
        assert found[1].difference == pytest.approx(sum(ours) / 12 - sum(bare) / 12)
        assert found[1].interval.low <= found[1].difference <= found[1].interval.high
        assert found[1].better_rows == tuple(i for i in range(12) if ours[i] > bare[i])
        assert found[1].worse_rows == tuple(i for i in range(12) if ours[i] < bare[i])
        assert found[1].better_rows
        assert found[0].difference is found[0].interval is None
        other = compare(tiny_llama, {"p": soft(tiny_llama, 5)}, held_out={"set": rows}, scoring=CHRF).scores
        assert other[0] == found[0]
        assert other[1].value != found[1].value

    def test_score_rows_limits_the_rows_and_sets_without_answers_have_no_score(self, tiny_llama):
        sets = {"texts": rows_from_texts(["w5 w6"]), "set": questions_and_answers(12)}
        config = ScoreConfig(score=("rouge_l",), score_rows=5)
        found = compare(tiny_llama, {"p": soft(tiny_llama)}, held_out=sets, scoring=config).scores
        assert {(item.held_out, item.num_rows, item.num_available) for item in found} == {("set", 5, 12)}
        alone = compare(
            tiny_llama, {"p": soft(tiny_llama)}, held_out={"set": sets["set"].select(range(5))}, scoring=config
        )
        assert [item.value for item in alone.scores] == [item.value for item in found]

    def test_a_single_question_has_no_interval(self, tiny_llama):
        config = ScoreConfig(score=("chrf",), score_rows=1)
        found = compare(
            tiny_llama, {"p": soft(tiny_llama)}, held_out={"set": questions_and_answers(3)}, scoring=config
        ).scores
        assert found[1].interval is None
        assert found[1].difference is not None

    def test_nothing_is_generated_without_a_score(self, tiny_llama):
        assert compare(tiny_llama, {"p": soft(tiny_llama)}, held_out={"set": questions_and_answers(3)}).scores == ()

    def test_prompts_of_different_lengths_are_scored_on_the_same_tokens(self):
        base = build_base("llama")
        rows = rows_from_records(
            [{"q": words(LIMIT, i), "a": "w7"} for i in range(3)], template="{q}", completion=" {a}"
        )
        prompts = {"short": soft(base, length=1), "long": soft(base, length=30)}
        both = compare(base, prompts, held_out={"set": rows}, scoring=CHRF).scores
        cut = replace(rows, records=tuple({**r, "q": " ".join(r["q"].split()[-(LIMIT - 33) :])} for r in rows.records))
        assert [item.value for item in compare(base, prompts, held_out={"set": cut}, scoring=CHRF).scores] == [
            item.value for item in both
        ]


class TestRefusals:
    def test_a_score_that_suits_no_set_is_refused(self, tiny_llama):
        with pytest.raises(ConfigError, match=r"score 'chrf' compares answers with completions, .* \(texts\)"):
            compare(tiny_llama, {}, held_out={"texts": rows_from_texts(["w5 w6"])}, scoring=CHRF)
        with pytest.raises(ConfigError, match="no set at all"):
            check_scores(CHRF, {})

    def test_calibration_without_labels_is_refused(self):
        with pytest.raises(ConfigError, match="calibrate needs labels"):
            check_scores(ScoreConfig(calibrate=True), {"set": questions_and_answers(3)})

    def test_a_score_rows_below_1_is_refused(self):
        with pytest.raises(ConfigError, match="score_rows is 0; it must be at least 1"):
            ScoreConfig(score_rows=0)

    def test_a_score_without_torchmetrics_is_refused_before_generation(self, tiny_llama, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchmetrics.functional.text", None)
        sets = {"set": questions_and_answers(3)}
        with pytest.raises(MissingDependencyError, match="need torchmetrics"):
            compare(tiny_llama, {}, ["w5"], held_out=sets, scoring=CHRF)
        assert compare(tiny_llama, {}, ["w5"], held_out=sets).losses
