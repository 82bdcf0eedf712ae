"""SQuAD, SciTail, WinoGrande, Yelp and PAWS."""

from __future__ import annotations

from softprompts.tasks.base import Hub, Protocol, Row, Task
from softprompts.tasks.mrqa import QuestionAnswering, pad
from softprompts.tasks.registry import register
from softprompts.tasks.splits import LARGE, OFFICIAL, SMALL, Part, Rule

CAPPED: Rule = {**LARGE, "train": Part("train", "rest", cap=100_000), "test": Part("test")}
"""Yelp's rule: large, with a test split, and the first 100,000 of the training rows."""
SCITAIL_CLASSES = {"entailment": 0, "entails": 0, "neutral": 1}


@register
class SQuAD(QuestionAnswering):
    """SQuAD 1.1, a source task of the papers.

    The reference code trains on the text of the dictionary that holds the answers. The clean protocol
    trains on the first answer; there is nothing to compare it with, so it has no `em_paper`.
    """

    name = "squad"
    folder = "squad"
    hub = Hub("rajpurkar/squad", None, "7b6d24c440a36b6815f21b70d25016731768db1f")
    sizes = (86_599, 1_000, 10_570)
    task_defects = ("squad-dict-target", "qa-padded-first-answer")
    reports_paper_scores = False

    def answers(self, row: Row) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row["answers"]["text"]))

    def paper_target(self, row: Row) -> str:
        # In the order of the hub's columns, whatever the order in the file.
        return pad(str({name: list(row["answers"][name]) for name in ("text", "answer_start")}))


@register
class SciTail(Task):
    """Does a sentence entail an answer to a science question?

    The clean protocol uses the published validation and test splits.
    """

    name = "scitail"
    folder = "scitail"
    hub = Hub("allenai/scitail", "snli_format", "0cc4353235b289165dfde1c7c5d1be983f99ce44")
    template = "premise: {premise} hypothesis: {hypothesis}"
    columns = ("premise", "hypothesis", "label")
    label_names = ("entailment", "neutral")
    split_rule = SMALL
    sizes = (None, 652, 652)
    task_defects = ("scitail-unused-test",)

    def rule(self, protocol: Protocol) -> Rule:
        return OFFICIAL if protocol == "clean" else SMALL

    def normalise(self, row: Row) -> Row:
        names = {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}
        return {names.get(column, column): value for column, value in row.items()}

    def class_of(self, row: Row) -> int:
        return SCITAIL_CLASSES.get(row["label"], -1)


@register
class WinoGrande(Task):
    """Which of two options fills the gap? The paper protocol never shows the second one."""

    name = "winogrande"
    folder = "winogrande"
    hub = Hub("allenai/winogrande", "winogrande_xl", "01e74176c63542e6b0bcb004dcdea22d94fb67b5")
    template = "sentence: {sentence} option0: {option1} option1: {option2}"
    columns = ("sentence", "option1", "option2", "answer")
    label_column = "answer"
    label_names = ("option1", "option2")
    split_rule = LARGE
    task_defects = ("winogrande-repeated-option",)
    has_label_table = False

    def source(self, row: Row, protocol: Protocol) -> str:
        return super().source(row if protocol == "clean" else {**row, "option2": row["option1"]}, protocol)

    def class_of(self, row: Row) -> int:
        return super().class_of(row) - 1


@register
class YelpPolarity(Task):
    """Sentiment of a Yelp review."""

    name = "yelp_polarity"
    folder = "yelp_polarity"
    hub = Hub("fancyzhx/yelp_polarity", "plain_text", "bbf1c97a1f0cf005e5aded43839fd814654a1557")
    template = "sentence: {text}"
    columns = ("text", "label")
    label_names = ("negative", "positive")
    split_rule = CAPPED
    sizes = (100_000, 1_000, 38_000)
    has_label_table = False


@register
class PAWS(Task):
    """Are two sentences of much the same words paraphrases?"""

    name = "paws"
    folder = "paws"
    hub = Hub("google-research-datasets/paws", "labeled_final", "161ece9501cf0a11f3e48bd356eaa82de46d6a09")
    template = "sentence1: {sentence1} sentence2: {sentence2}"
    columns = ("sentence1", "sentence2", "label")
    label_names = ("different", "paraphrase")
    split_rule = OFFICIAL
    sizes = (49_401, 8_000, 8_000)
    has_label_table = False
