"""Everything a run can be told, as one checked tree: defaults < settings file < command line."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from softprompts.errors import UsageError
from softprompts.settings import Settings

COLUMNS = ("inputs", "target", "labels", "kind")
"""Settings that say what the columns of own data are."""


class DataSettings(Settings):
    """What the task's rows are and how they become tokens."""

    protocol: Literal["clean", "paper"] = "clean"
    """clean mends the reference code's defects; paper reproduces its splits, templates and metrics."""
    folder: str | None = None
    """Local folder of data sets, <folder>/<task>/<split>.jsonl.gz; else SOFTPROMPTS_DATA, else the hub."""
    mirror: str | None = None
    """Local folder of hub repositories, <mirror>/<owner>/<name>/, used in place of the hub."""
    path: str | None = None
    """Own data instead of a task: a csv, tsv, jsonl or parquet file, a folder of splits, or a hub id."""
    inputs: tuple[str, ...] | None = None
    """Own data: the input columns. None = guessed and printed."""
    target: str | None = None
    """Own data: the target column. None = guessed and printed."""
    labels: dict[str, str] | None = None
    """Own data: the word to write for each label value. None = the values themselves."""
    kind: Literal["classes", "text", "number"] | None = None
    """Own data: labels, free answers or a regression. None = guessed and printed."""
    shots: int | None = Field(None, ge=1)
    """Train on this many examples in total (few-shot). None = on all."""
    shot_seed: int = 0
    """Which draw of the few shots; separate from the training seed."""
    max_source_tokens: int | None = Field(None, ge=2)
    """Longer texts are cut, counted and reported. None = the task's own (256; MultiRC 348; MRQA and summaries 512;
    CNN/DailyMail 1,024)."""
    max_target_tokens: int | None = Field(None, ge=2)
    """Longest target in training and generation. None = the longest label word, the task's own for texts (64 to 128),
    or 20 for other open answers."""
    padding: Literal["dynamic", "max"] = "dynamic"
    """Pad to the longest text of the batch, or always to max_source_tokens (the papers; slower, same logits)."""
    cache: bool = True
    """Keep the tokens of large splits in SOFTPROMPTS_CACHE (default ~/.cache/softprompts) for the next run."""
    train_limit: int | None = Field(None, ge=1)
    """Use only the first rows of the training split."""
    validation_limit: int | None = Field(None, ge=1)
    """Use only the first rows of the validation split."""
    test_limit: int | None = Field(None, ge=1)
    """Use only the first rows of the test split."""


class ModelSettings(Settings):
    """The frozen backbone."""

    name: str = "t5-nano"
    """The embedded t5-nano, a folder, or a hub id such as google-t5/t5-base."""
    revision: str | None = None
    """Commit of a hub id; None = its main branch."""
    head: Literal["auto", "language", "classification"] = "auto"
    """Answer in words, or through a trained linear head (auto: words if the model can write)."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the backbone; the prompt stays fp32. auto = bf16 where the hardware has it."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Keep the linear layers in 8 or 4 bits (bitsandbytes, the extra `quant`); embeddings, output layer and heads
    stay as they are."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the training step with torch.compile, once for all batch shapes: for long runs, one at a time."""


class TrainSettings(Settings):
    """The training loop. Rates and shapes are the papers' unless said otherwise."""

    steps: int = Field(1000, ge=1)
    """Optimizer steps. 1,000 suffice for the embedded backbone; the papers take 30,000 to 300,000."""
    batch_size: int = Field(16, ge=1)
    """Rows of one optimizer step, over all processes."""
    accumulate: int = Field(1, ge=1)
    """Cut each batch into this many pieces to save memory; changes nothing else."""
    prompt_rate: float = Field(0.3, ge=0)
    """Learning rate of the prompt. Soft prompts want large rates: 0.3 to 0.5, small models up to 10."""
    offset_rate: float = Field(5e-3, ge=0)
    """Learning rate of the offset (the papers search 1e-4 to 5e-3)."""
    head_rate: float = Field(1e-3, ge=0)
    """Learning rate of a classification head (ours; the papers do not say)."""
    baseline_rate: float = Field(3e-4, ge=0)
    """Learning rate of a baseline's weights, which are not a prompt's (3e-4 in most of the papers)."""
    rates: dict[str, float] = Field(default_factory=dict)
    """Rates of single parameters, by name or the last part of it: `rates.codebooks=0.3 rates.weights=0.03`."""
    temperature: float = Field(10.0, gt=0)
    """Several tasks: one of n rows is drawn in proportion to n^(1/temperature); 1 = by size, large = all alike."""
    teachers: tuple[str, ...] = ()
    """Several tasks: a saved adapter for each, in their order, whose answers are learned too (MPT's distillation)."""
    distillation: float = Field(0.9, ge=0)
    """Weight of the distance from the teachers beside the loss of the task (0.9 in MPT)."""
    warmup: int | None = Field(None, ge=0)
    """Steps of linear warm-up. None = 6 % of the steps, the paper's 1,800 of 30,000."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay. 0, because the papers' 0.01 is inert in their code."""
    clip: float = Field(1.0, ge=0)
    """Largest global gradient norm over all groups together; 0 = no clipping."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations on the validation split. None = a tenth of the steps (at least 50)."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a better score. None = never (the papers)."""
    save_every: int | None = Field(None, ge=1)
    """Steps between resumable states. None = with every evaluation."""

    @field_validator("rates", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        # A full name has dots, which TOML and `-s` read as tables.
        return flat(value) if isinstance(value, dict) else value

    def warmup_steps(self) -> int:
        """Return the warm-up in steps."""
        return round(0.06 * self.steps) if self.warmup is None else self.warmup

    def eval_steps(self) -> int:
        """Return the steps between evaluations."""
        return self.eval_every or min(self.steps, max(50, self.steps // 10))


class StartSettings(Settings):
    """Where the two parts of a method start from, beside `method.prompt_from` and `method.offset_from`."""

    kind: Literal["random", "intermediate", "target"] = "random"
    """random: as method.init says. intermediate, target: each part is trained alone on another task, or on this one,
    first (ACCEPT's three starts); the runs are kept in the run's folder."""
    task: str | None = None
    """The intermediate task. None = the paper's: glue/mnli for GLUE and SuperGLUE, squad for MRQA."""
    steps: int | None = Field(None, ge=1)
    """Steps of the runs that train a part alone. None = as many as the run itself."""


class EvalSettings(Settings):
    """How answers are scored."""

    scoring: Literal["auto", "rank", "generate"] = "auto"
    """Rank the label words by their summed log-likelihood (words of unequal length are not on equal terms), or
    generate. auto = the protocol's: clean ranks, paper generates."""
    beams: int = Field(1, ge=1)
    """Beams of the search for generated answers; 1 = greedy, as the papers. Costs about as many times as much."""
    batch_size: int | None = Field(None, ge=1)
    """Rows of one evaluation batch. None = as many as the device is fast with, by their lengths."""
    validation_rows: Annotated[int, Field(ge=1)] | Literal["all"] | None = None
    """Validation rows scored in training, a fixed choice with every class in its share. None = as many as cost, all
    evaluations together, a twentieth of the training, at least 64; all with the paper protocol or a set
    data.validation_limit."""
    test_rows: Annotated[int, Field(ge=1)] | Literal["all"] | None = None
    """Test rows scored at the end, a fixed choice likewise. None = as many as cost a twenty-fifth of the training, at
    least 500; all with the paper protocol or a set data.test_limit. A longer run scores more of a large split, and
    `softprompts eval` all of it."""
    untuned: bool = True
    """Also score the backbone without a prompt, on the test rows; of many on as many as cost a hundredth of the
    training, at least 64 (all with the paper protocol or a set data.test_limit)."""


class RunSettings(Settings):
    """One training run."""

    task: str | None = None
    """A task of `softprompts list`, or several joined by commas to train together; leave out with data.path."""
    method: dict[str, Any] = Field(default_factory=lambda: {"name": "accept"})
    """`name` and that method's own settings; `softprompts explain NAME` lists them."""
    seed: int = Field(42, ge=0, lt=2**31)
    """Seed of the start and of the data order; the splits always use 42."""
    data: DataSettings = DataSettings()
    """See DataSettings."""
    model: ModelSettings = ModelSettings()
    """See ModelSettings."""
    train: TrainSettings = TrainSettings()
    """See TrainSettings."""
    start: StartSettings = StartSettings()
    """See StartSettings."""
    eval: EvalSettings = EvalSettings()
    """See EvalSettings."""

    @field_validator("method", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": "accept", **value} if isinstance(value, dict) else value

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names in `task`."""
        return () if self.task is None else tuple(name.strip() for name in self.task.split(","))

    def method_config(self) -> Any:
        """Return the method's checked config.

        Raises:
            UsageError: an unknown method or setting.
        """
        from softprompts.registry import method_config

        settings = dict(self.method)
        return method_config(settings.pop("name"), settings)


def resolve(file: Path | None, overrides: Iterable[tuple[str, Any]]) -> RunSettings:
    """Merge a TOML settings file (optional) with `key.sub=value` overrides and check the result.

    Raises:
        UsageError: an unreadable file, an unknown key, a value that cannot be used.
    """
    return resolve_tree(merged(file, overrides))


def merged(file: Path | None, overrides: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the tree of a TOML settings file (optional) with overrides on top, unchecked.

    Raises:
        UsageError: an unreadable file, or a key that has no room.
    """
    tree: dict[str, Any] = {} if file is None else read_toml(file)
    if isinstance(tree.get("method"), str):
        tree["method"] = {"name": tree["method"]}
    for key, value in overrides:
        insert(tree, key, value)
    return tree


def resolve_tree(tree: dict[str, Any]) -> RunSettings:
    """Check a tree of settings and return them.

    Raises:
        UsageError: an unknown key, a value that cannot be used, or nothing to train on.
    """
    settings = RunSettings(**tree)
    if (settings.task is None) == (settings.data.path is None):
        raise UsageError("name what to train on: either a task (--task glue/rte) or your own data (--data FILE)")
    given = [key for key in COLUMNS if getattr(settings.data, key) is not None]
    if given and settings.data.path is None:
        raise UsageError(
            f"data.{given[0]} describes data of your own, and {settings.task} has its columns and words; give --data "
            f"FILE, or leave it out"
        )
    if len(set(settings.tasks)) < len(settings.tasks) or "" in settings.tasks:
        raise UsageError(f"--task {settings.task} names a task twice, or none; join different names by commas")
    if settings.train.teachers and len(settings.tasks) < 2:
        raise UsageError("train.teachers are for several tasks (--task a,b); leave them out")
    if settings.start.kind == "random" and (settings.start.task or settings.start.steps):
        raise UsageError(
            "start.task and start.steps say how to train a start; give start.kind=intermediate or target too"
        )
    settings.method_config()
    return settings


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as dotted keys: `[sweep.train]` and `"train.x"` are the same."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """Read a settings file.

    Raises:
        UsageError: missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"settings file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"settings file {path} is not valid TOML: {error}") from None


def parse_assignment(text: str) -> tuple[str, Any]:
    """Turn `key=value` into (key, value); values are read as TOML where possible, else as text.

    Raises:
        UsageError: no `=`.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"-s {text!r} is not key=value; write for example -s train.steps=3000")
    try:
        return key.strip(), tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def insert(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put `value` at the dotted `key` of a nested dict."""
    *parents, leaf = key.split(".")
    for parent in parents:
        branch = tree.setdefault(parent, {})
        if not isinstance(branch, dict):
            raise UsageError(f"'{key}' cannot be set: '{parent}' is {branch!r}, not a table")
        tree = branch
    if leaf == "method" and isinstance(value, str):
        # `--method` names it; settings of a method given elsewhere stay.
        value = {**(tree.get(leaf) or {}), "name": value}
    tree[leaf] = value
