"""The eight GLUE tasks of the papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from softprompts.tasks import metrics as measures
from softprompts.tasks.base import Example, Hub, Protocol, Row, Task
from softprompts.tasks.registry import register
from softprompts.tasks.splits import LARGE, Part, Rule

BY_GENRE: Rule = {
    "train": Part("train"),
    "validation": Part("validation_mismatched"),
    "test": Part("validation_matched"),
}
"""MNLI's two validation splits: genres that are not in the training data, and genres that are."""
SCALE = (0.0, 5.0)
"""Ends of the similarity scale of STS-B."""


def _glue(config: str) -> Hub:
    return Hub("nyu-mll/glue", config, "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")


@register
class MNLI(Task):
    """Natural language inference over several genres."""

    name = "glue/mnli"
    folder = "mnli"
    hub = _glue("mnli")
    template = "premise: {premise} hypothesis: {hypothesis}"
    columns = ("premise", "hypothesis", "label")
    label_words = ("0", "1", "2")
    label_names = ("entailment", "neutral", "contradiction")
    split_rule = BY_GENRE
    sizes = (392_702, 9_832, 9_815)


@register
class QQP(Task):
    """Are two Quora questions duplicates?"""

    name = "glue/qqp"
    folder = "qqp"
    hub = _glue("qqp")
    template = "question1: {question1} question2: {question2}"
    columns = ("question1", "question2", "label")
    label_names = ("not_duplicate", "duplicate")
    split_rule = LARGE
    sizes = (362_846, 1_000, 40_430)
    metric_names = ("accuracy", "f1")


@register
class QNLI(Task):
    """Does the sentence answer the question?"""

    name = "glue/qnli"
    folder = "qnli"
    hub = _glue("qnli")
    template = "question: {question} sentence: {sentence}"
    columns = ("question", "sentence", "label")
    label_names = ("entailment", "not_entailment")
    split_rule = LARGE
    sizes = (103_743, 1_000, 5_463)


@register
class SST2(Task):
    """Sentiment of a phrase from a film review."""

    name = "glue/sst2"
    folder = "sst2"
    hub = _glue("sst2")
    template = "sentence: {sentence}"
    columns = ("sentence", "label")
    label_names = ("negative", "positive")
    split_rule = LARGE
    sizes = (66_349, 1_000, 872)


@register
class STSB(Task):
    """How similar are two sentences, from 0 to 5? The model writes the number.

    The reference rounds to 0.1 and scores against the rounded numbers; T5, and the clean protocol, round
    the targets to 0.2. The clean protocol scores against the labels themselves, and an answer that is no
    number counts as the end of the scale farther from its label.
    """

    name = "glue/stsb"
    folder = "stsb"
    hub = _glue("stsb")
    template = "sentence1: {sentence1} sentence2: {sentence2}"
    columns = ("sentence1", "sentence2", "label")
    label_words = None
    sizes = (5_749, 750, 750)
    metric_names = ("pearson", "spearmanr")
    report_metric = "pearson"
    task_defects = ("stsb-step-0.1", "stsb-rounded-references")

    def render(self, row: Row, protocol: Protocol) -> list[Example]:
        value = float(row["label"])
        steps = self.steps(protocol)
        target = f"{round(value * steps) / steps:.1f}"
        return [Example(self.source(row, protocol), target, (target,), value=value)]

    def steps(self, protocol: Protocol) -> int:
        """Targets per unit of the scale."""
        return 10 if protocol == "paper" else 5

    def target_words(self, protocol: Protocol) -> tuple[str, ...]:
        steps = self.steps(protocol)
        return tuple(f"{step / steps:.1f}" for step in range(int(SCALE[1]) * steps + 1))

    def is_valid(self, answer: str) -> bool:
        return measures.parse_number(answer) is not None

    def measure(
        self,
        answers: Sequence[str],
        examples: Sequence[Example],
        protocol: Protocol,
        cut: Callable[[str], str] | None,
    ) -> dict[str, float]:
        if protocol == "paper":
            references = [float(example.target) for example in examples]
            invalid = [-1.0] * len(examples)
        else:
            references = [_value(example) for example in examples]
            invalid = [SCALE[value < sum(SCALE) / 2] for value in references]
        numbers = [measures.parse_number(answer) for answer in answers]
        values = [end if number is None else number for number, end in zip(numbers, invalid, strict=True)]
        return {
            "pearson": measures.pearson(values, references),
            "spearmanr": measures.spearman(values, references),
        }

    def shot_classes(self, examples: Sequence[Example], protocol: Protocol) -> tuple[list[int], int]:
        scores = [float(e.target) if protocol == "paper" else _value(e) for e in examples]
        return [int(score > 2.5) for score in scores], 2


def _value(example: Example) -> float:
    return float(example.target) if example.value is None else example.value


@register
class MRPC(Task):
    """Is one sentence a paraphrase of the other?"""

    name = "glue/mrpc"
    folder = "mrpc"
    hub = _glue("mrpc")
    template = "sentence1: {sentence1} sentence2: {sentence2}"
    columns = ("sentence1", "sentence2", "label")
    label_names = ("not_equivalent", "equivalent")
    sizes = (3_668, 204, 204)
    metric_names = ("accuracy", "f1")


@register
class RTE(Task):
    """Does the first sentence entail the second?"""

    name = "glue/rte"
    folder = "rte"
    hub = _glue("rte")
    template = "sentence1: {sentence1} sentence2: {sentence2}"
    columns = ("sentence1", "sentence2", "label")
    label_names = ("entailment", "not_entailment")
    sizes = (2_490, 138, 139)


@register
class CoLA(Task):
    """Is the sentence acceptable English? In the clean protocol an invalid answer is the wrong class."""

    name = "glue/cola"
    folder = "cola"
    hub = _glue("cola")
    template = "sentence: {sentence}"
    columns = ("sentence", "label")
    label_names = ("unacceptable", "acceptable")
    sizes = (8_551, 521, 522)
    metric_names = ("matthews",)
    report_metric = "matthews"
    task_defects = ("unguarded-matthews",)

    def measure(
        self,
        answers: Sequence[str],
        examples: Sequence[Example],
        protocol: Protocol,
        cut: Callable[[str], str] | None,
    ) -> dict[str, float]:
        if protocol == "clean":
            targets = [example.target for example in examples]
            answers = measures.oppose_invalid(answers, targets, self.words)
        return super().measure(answers, examples, protocol, cut)
