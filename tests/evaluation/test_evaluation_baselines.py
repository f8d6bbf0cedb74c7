"""What an accuracy stands beside, and the sentence that says whether it is any better."""

from __future__ import annotations

import pytest
from support.tiny_bases import random_ids, random_prompt

from softprompt.data import rows_from_records
from softprompt.data.rows import with_labels
from softprompt.evaluation import (
    Baselines,
    Verdict,
    accuracy_by_likelihood,
    compare,
    to_markdown,
    verdict_lines,
    verdict_of,
)
from softprompt.evaluation.baselines import verdicts, written_templates
from softprompt.evaluation.classification import LabelledRows, accuracy_from_labels
from softprompt.families import forward_of
from softprompt.prompt import SoftPrompt

NUM_ROWS = 200


def judged(num_right_of_each, truth=(104, 96), template=0.74, num_templates=4) -> Verdict:
    """A prompt that is right on so many rows of each label, beside a bare base."""
    own = [label for label, count in enumerate(truth) for _ in range(count)]
    found = [
        label if number < right else 1 - label
        for label, (count, right) in enumerate(zip(truth, num_right_of_each, strict=True))
        for number in range(count)
    ]
    known = LabelledRows(("",) * len(own), tuple(own), tuple(range(len(own))), (" positive", " negative"), ())
    accuracy = accuracy_from_labels("reviews.csv", "critic", known, found, None, calibrated=False)
    beside = Baselines("reviews.csv", "positive", max(truth) / len(own), template, num_templates)
    (verdict,) = verdicts([accuracy], {"reviews.csv": beside})
    return verdict


class TestVerdict:
    def test_a_verdict_states_accuracy_interval_majority_and_best_template_in_one_sentence(self):
        assert judged((95, 87)).text == (
            "On 200 rows of reviews.csv, critic is right 91 times in 100 (86 to 94); always answering 'positive' would "
            "be right 52, the bare base with the best of 4 templates 74. That is better than both."
        )

    def test_a_prompt_that_always_answers_one_label_is_called_no_better(self):
        verdict = judged((104, 0), template=0.44)
        assert not verdict.is_better
        assert verdict.text.endswith(
            "It answers 'positive' to every row. That is no better than always answering 'positive'."
        )

    @pytest.mark.parametrize(
        ("right", "template", "end"),
        [
            ((95, 87), 0.93, "That is no better than the bare base."),  # inside the interval
            ((95, 87), 0.97, "That is worse than the bare base."),
            ((40, 40), 0.30, "That is worse than always answering 'positive'."),
            ((60, 50), 0.50, "That is no better than always answering 'positive'."),
        ],
    )
    def test_a_verdict_compares_with_the_better_baseline(self, right, template, end):
        verdict = judged(right, template=template)
        assert verdict.text.endswith(end)
        assert not verdict.is_better
        assert "to every row" not in verdict.text

    def test_a_share_below_1_is_never_rounded_to_always(self):
        assert "critic is right 99.5 times in 100 (97 to 99.9)" in judged((104, 95)).text
        assert "critic is right 100 times in 100 (98 to 100)" in judged((104, 96)).text

    def test_a_verdict_names_the_same_template_where_no_other_was_tried(self):
        assert "the bare base with the same template 74." in judged((95, 87), num_templates=1).text


@pytest.fixture(scope="module")
def rows():
    records = [
        {"text": " ".join(f"w{token}" for token in random_ids(2 + i % 5, i)), "label": f"w{56 + 35 * (i % 3 == 0)}"}
        for i in range(30)
    ]
    return with_labels(rows_from_records(records, template="w5 {text} w6", completion=" {label}"))


class TestBaselines:
    @pytest.fixture(scope="class")
    def found(self, tiny_llama, rows):
        prompts = {"a": SoftPrompt(random_prompt(tiny_llama, 4, 0)), "b": SoftPrompt(random_prompt(tiny_llama, 4, 1))}
        return compare(tiny_llama, prompts, held_out={"set": rows})

    def test_the_baselines_are_the_commonest_label_and_the_best_of_all_templates(self, tiny_llama, rows, found):
        known = found.baselines["set"]
        assert (known.majority_label, known.majority) == ("w56", 20 / 30)
        own = accuracy_by_likelihood(tiny_llama, forward_of(tiny_llama), rows, None)
        assert found.accuracies[0].by_likelihood == own
        assert known.num_templates == 1 + len(written_templates(rows))
        assert known.template >= own

    def test_baselines_are_the_tables_last_rows_and_verdicts_follow_it(self, found):
        page = to_markdown(found)
        assert f"{found.baselines['set'].majority:.1%}" in page
        assert page.index("Accuracy on set") < page.index("always 'w56'") < page.index("On 30 rows of set, a is right")
        assert page.index("On 30 rows of set, b is right") < page.index("Held-out loss on set")
        assert len(verdict_lines(found)) == 2

    def test_json_has_baselines_and_verdicts(self, found):
        record = found.to_json()
        assert record["baselines"]["set"]["majority"] == 20 / 30
        assert [item["prompt"] for item in record["verdicts"]] == ["a", "b"]

    def test_the_verdict_after_training_is_that_of_compare_with_one_template(self, tiny_llama, rows, found):
        prompt = SoftPrompt(random_prompt(tiny_llama, 4, 0))
        verdict = verdict_of(tiny_llama, "set", rows, "a", prompt)
        assert verdict.accuracy == found.accuracies[1].by_likelihood
        assert verdict.baselines.template == found.accuracies[0].by_likelihood
        assert verdict.baselines.num_templates == 1


def test_written_templates_keep_braces_of_labels_and_the_space_before_one():
    records = [{"a": "x", "b": "y", "label": label} for label in ("{no}", "yes") for _ in range(2)]
    plain = with_labels(rows_from_records(records, template="{a}? {b}: ", completion="{label}"))
    for template in written_templates(plain):
        assert "{a}\n{b}" in template
        assert template.endswith(": ")
    assert "yes or {{no}}" in written_templates(plain)[1]
