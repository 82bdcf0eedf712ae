"""Questions about a passage, answered in free text: the four MRQA tasks, and what SQuAD shares with them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from softprompts.errors import UsageError
from softprompts.tasks import metrics as measures
from softprompts.tasks.base import Example, Hub, Protocol, Row, Task
from softprompts.tasks.registry import register
from softprompts.tasks.splits import LARGE


class _Padding(dict[int, str]):
    """Translation table of `pad`, filled as characters turn up; texts are long and characters few."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        keep = char == "_" or char.isspace() or unicodedata.category(char)[0] in "NLM"
        self[code] = char if keep else f" {char} "
        return self[code]


_PADDING = _Padding()


def pad(text: str) -> str:
    """Put spaces around every character but letters, marks, numbers and underscores; join whitespace."""
    return re.sub(r"\s+", " ", text.translate(_PADDING))


class QuestionAnswering(Task):
    """A question and a passage in, an answer out.

    The paper protocol trains on and scores against the first answer, padded and, with `cut`, shortened.
    The clean protocol trains on the first answer as it stands and scores against all of them; `em_paper`
    and `f1_paper` are then the scores of the paper protocol, for which the predictions are padded too.
    """

    template = "question: {question} context: {context}"
    columns = ("question", "context", "answers")
    label_words = None
    split_rule = LARGE
    metric_names = ("em", "f1")
    report_metric = "f1"
    paper_select_metric = "em"
    task_defects: tuple[str, ...] = ("qa-padded-first-answer",)
    reports_paper_scores: bool = True

    def normalise(self, row: Row) -> Row:
        changed = dict(row)
        if "answers" not in row and "answer" in row:
            changed["answers"] = [row["answer"]]
        if isinstance(row.get("context"), (list, tuple)):
            changed["context"] = " ".join(f"{part['title']} {part['text']}" for part in row["context"])
        return changed

    def answers(self, row: Row) -> tuple[str, ...]:
        """All different answers of a normalised row, in order."""
        return tuple(dict.fromkeys(row["answers"]))

    def source(self, row: Row, protocol: Protocol) -> str:
        return self.template.format(question=pad(row["question"]), context=pad(row["context"]))

    def render(self, row: Row, protocol: Protocol) -> list[Example]:
        answers = self.answers(row)
        if not answers:
            raise UsageError(f"{self.name}: a row has no answer: {row['question']!r}; leave such rows out")
        if protocol == "paper":
            answers = (self.paper_target(row),)
        return [Example(self.source(row, protocol), answers[0], answers)]

    def paper_target(self, row: Row) -> str:
        """What the reference code trains on and scores against."""
        return pad(self.answers(row)[0])

    def metrics(self, protocol: Protocol) -> tuple[str, ...]:
        both = protocol == "clean" and self.reports_paper_scores
        return (*self.metric_names, *(["em_paper", "f1_paper"] if both else []))

    def measure(
        self,
        answers: Sequence[str],
        examples: Sequence[Example],
        protocol: Protocol,
        cut: Callable[[str], str] | None,
    ) -> dict[str, float]:
        shorten = cut or str
        padded = [[shorten(pad(example.references[0])).strip()] for example in examples]
        references = padded if protocol == "paper" else [example.references for example in examples]
        scores = {
            "em": measures.exact_match(answers, references),
            "f1": measures.token_f1(answers, references),
        }
        if "em_paper" in self.metrics(protocol):
            answers = [pad(answer) for answer in answers]
            scores["em_paper"] = measures.exact_match(answers, padded)
            scores["f1_paper"] = measures.token_f1(answers, padded)
        return scores


@register
class NaturalQuestions(QuestionAnswering):
    """Natural Questions with short answers."""

    name = "mrqa/nq"
    folder = "nq"
    hub = Hub("lucadiliello/naturalquestionsshortqa", None, "49435450b0abb287be45639fdaa49a9b56512f9b")
    sizes = (103_071, 1_000, 12_836)
    max_source_tokens = 512


@register
class HotpotQA(QuestionAnswering):
    """HotpotQA, whose answers need more than one passage."""

    name = "mrqa/hotpotqa"
    folder = "hotpotqa"
    # No commit of this data set is documented: the hub's own conversion to parquet.
    hub = Hub("lucadiliello/hotpotqa", None, "refs/convert/parquet")
    sizes = (71_928, 1_000, 5_901)
    max_source_tokens = 512


@register
class SearchQA(QuestionAnswering):
    """SearchQA: quiz clues with search results."""

    name = "mrqa/searchqa"
    folder = "searchqa"
    hub = Hub("lucadiliello/searchqa", None, "c1a979068ba118d85467179b704031d113d689cc")
    sizes = (116_384, 1_000, 16_980)
    max_source_tokens = 512


@register
class NewsQA(QuestionAnswering):
    """NewsQA: questions about news stories."""

    name = "mrqa/newsqa"
    folder = "newsqa"
    # No commit of this data set is documented: the hub's own conversion to parquet.
    hub = Hub("lucadiliello/newsqa", None, "refs/convert/parquet")
    sizes = (73_160, 1_000, 4_212)
    max_source_tokens = 512
