"""Two small tasks that come with the package, for trying things out without a download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from softprompts.tasks.base import Row, Task
from softprompts.tasks.registry import register
from softprompts.tasks.splits import OFFICIAL


class Demo(Task):
    """A sentence and one of two classes, read from the package whatever data folder is named."""

    template = "sentence: {text}"
    columns = ("text", "label")
    split_rule = OFFICIAL

    def read(self, file: str, data_dir: Path | None = None, mirror: Path | None = None) -> tuple[Sequence[Row], str]:
        from importlib import resources

        from softprompts.tasks.sources import read_table

        inside = f"demo/{self.folder}/{file}.jsonl"
        with resources.as_file(resources.files("softprompts") / "assets" / inside) as path:
            return read_table(path), f"package:{inside}"


@register
class Mood(Demo):
    """Is the sentence in a good mood?"""

    name = "demo/mood"
    folder = "mood"
    # Words that the embedded backbone was not trained to answer with, so that there is something to learn.
    label_words = ("bad", "good")
    label_names = ("negative", "positive")


@register
class Request(Demo):
    """Does the sentence ask for something?"""

    name = "demo/request"
    folder = "request"
    label_names = ("statement", "request")
