"""The six SuperGLUE tasks of the papers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from softprompts.tasks import metrics as measures
from softprompts.tasks.base import Example, Hub, Protocol, Row, Task
from softprompts.tasks.registry import register
from softprompts.tasks.splits import LARGE


def _superglue(config: str) -> Hub:
    return Hub("aps/super_glue", config, "3de24cf8022e94f4ee4b9d55a6f539891524d646")


@register
class BoolQ(Task):
    """A yes-no question about a passage."""

    name = "superglue/boolq"
    folder = "boolq"
    hub = _superglue("boolq")
    template = "question: {question} passage: {passage}"
    columns = ("question", "passage", "label")
    label_names = ("false", "true")
    sizes = (9_427, 1_635, 1_635)


@register
class CB(Task):
    """Does a speaker commit to the hypothesis? The classes are not in the order of MNLI."""

    name = "superglue/cb"
    folder = "cb"
    hub = _superglue("cb")
    template = "premise: {premise} hypothesis: {hypothesis}"
    columns = ("premise", "hypothesis", "label")
    label_words = ("0", "1", "2")
    label_names = ("entailment", "contradiction", "neutral")
    sizes = (250, 28, 28)
    metric_names = ("accuracy", "macro_f1")
    paper_select_metric = "macro_f1"


@register
class MultiRC(Task):
    """Is this answer to a question about a paragraph right? Several may be.

    The clean protocol also scores by question (`f1_grouped`, `em_grouped`). The partition is by answer, so
    a question's group holds those of its answers that fell into the same half.
    """

    name = "superglue/multirc"
    folder = "multirc"
    hub = _superglue("multirc")
    template = "question: {question} answer: {answer} paragraph: {paragraph}"
    columns = ("paragraph", "question", "answer", "label")
    label_names = ("false", "true")
    sizes = (27_243, 2_424, 2_424)
    report_metric = "f1"
    task_defects = ("ungrouped-multirc",)
    max_source_tokens = 348

    def metrics(self, protocol: Protocol) -> tuple[str, ...]:
        return ("f1",) if protocol == "paper" else ("f1", "f1_grouped", "em_grouped")

    def render(self, row: Row, protocol: Protocol) -> list[Example]:
        cleaned = {column: remove_markup(row[column]) for column in ("paragraph", "question", "answer")}
        (example,) = super().render({**row, **cleaned}, protocol)
        index = row.get("idx")
        # Without an index, the same question about the same paragraph is the same question.
        key = (index["paragraph"], index["question"]) if index else (row["paragraph"], row["question"])
        group = "/".join(map(str, key))
        return [Example(example.source, example.target, example.references, example.label, group=group)]

    def measure(
        self,
        answers: Sequence[str],
        examples: Sequence[Example],
        protocol: Protocol,
        cut: Callable[[str], str] | None,
    ) -> dict[str, float]:
        targets = [example.target for example in examples]
        scores = {"f1": measures.f1(answers, targets, self.words)}
        if protocol == "clean":
            groups = [str(example.group) for example in examples]
            by_question = measures.grouped(answers, targets, groups, self.words)
            scores["f1_grouped"], scores["em_grouped"] = by_question
        return scores


def remove_markup(text: str) -> str:
    """Put a space for every line break of HTML and drop its bold type."""
    return text.replace("<br>", " ").replace("<b>", "").replace("</b>", "")


@register
class WiC(Task):
    """Does a word mean the same in two sentences?"""

    name = "superglue/wic"
    folder = "wic"
    hub = _superglue("wic")
    template = "sentence1: {sentence1} sentence2: {sentence2} word: {word}"
    columns = ("sentence1", "sentence2", "word", "label")
    label_names = ("different_sense", "same_sense")
    sizes = (5_428, 319, 319)


@register
class WSC(Task):
    """Does the pronoun, marked with #, refer to the noun, marked with *?

    Where a span is not at its stated word index, the paper protocol leaves it unmarked, and the clean one
    marks its nearest occurrence.
    """

    name = "superglue/wsc.fixed"
    folder = "wsc.fixed"
    hub = _superglue("wsc.fixed")
    template = "text: {text}"
    columns = ("text", "span1_text", "span1_index", "span2_text", "span2_index", "label")
    label_names = ("different_referent", "same_referent")
    sizes = (554, 52, 52)
    task_defects = ("unmarked-spans",)

    def source(self, row: Row, protocol: Protocol) -> str:
        search = protocol == "clean"
        first, second = int(row["span1_index"]), int(row["span2_index"])
        text = mark_span(row["text"], row["span1_text"], first, "*", search)
        # The first mark has added two words in front of the second span if it comes earlier.
        text = mark_span(text, row["span2_text"], second + 2 * (first < second), "#", search)
        return self.template.format(text=text)


def mark_span(text: str, span: str, index: int, symbol: str, search: bool = False) -> str:
    """Put a symbol on both sides of the span that starts at word `index`.

    Words are split by single whitespace characters. A span that is not there stays as it is or, with
    `search`, is looked for as a whole word or phrase, nearest to the stated place.
    """
    place = re.match(r"(?:\S+\s)" + f"{{{index}}}", text)
    start = place.end() if place and text.startswith(span, place.end()) else None
    if start is None and search:
        words = [word.start() for word in re.finditer(r"\S+", text)] or [0]
        stated = words[min(index, len(words) - 1)]
        found = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(span)}(?!\w)", text)]
        start = min(found, key=lambda position: abs(position - stated), default=None)
    if start is None:
        return text
    end = start + len(span)
    return f"{text[:start]}{symbol} {span} {symbol}{text[end:]}"


@register
class ReCoRD(Task):
    """Which entity of a news text fills the gap in a query? A source task of the papers.

    A row with several answers gives one example each. The clean protocol scores a row once, against all
    of its answers; so there its `n` counts rows.
    """

    name = "superglue/record"
    folder = "record"
    hub = _superglue("record")
    template = "record query: {query} entities: {entities} passage: {passage}"
    columns = ("passage", "query", "entities", "answers")
    label_words = None
    split_rule = LARGE
    metric_names = ("em", "f1")
    report_metric = "f1"
    task_defects = ("record-one-answer",)

    def normalise(self, row: Row) -> Row:
        # The hub's rows are sorted and without repeats; other releases are not.
        lists = {name: sorted(set(row[name])) for name in ("entities", "answers") if name in row}
        return {**row, **lists}

    def source(self, row: Row, protocol: Protocol) -> str:
        passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", row["passage"]).replace("\n@highlight\n", ". ")
        return self.template.format(query=row["query"], entities=", ".join(row["entities"]), passage=passage)

    def render(self, row: Row, protocol: Protocol) -> list[Example]:
        source = self.source(row, protocol)
        answers = tuple(row["answers"]) or ("<unk>",)
        return [Example(source, text, (text,) if protocol == "paper" else answers) for text in answers]

    def score(
        self,
        predictions: Sequence[str],
        examples: Sequence[Example],
        protocol: Protocol,
        cut: Callable[[str], str] | None = None,
    ) -> dict[str, float]:
        if protocol == "clean" and len(predictions) == len(examples):
            first = {example.source: index for index, example in reversed(list(enumerate(examples)))}
            rows = sorted(first.values())
            predictions, examples = [predictions[i] for i in rows], [examples[i] for i in rows]
        return super().score(predictions, examples, protocol, cut)
