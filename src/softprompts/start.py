"""Transfer starts of a method with two parts: each part is trained alone on a source, then both go on together.

ACCEPT (arXiv 2410.12847, section 4.1) names three starts: random, an intermediate task (MNLI for GLUE and SuperGLUE,
SQuAD for MRQA), and the target task itself. `start.kind` chooses one; the source runs lie in `start/` of the run's
folder and are read once: the trained adapter does not need them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from softprompts.config import RunSettings
from softprompts.core import MethodConfig
from softprompts.errors import Diverged, UsageError
from softprompts.member import check_rates
from softprompts.results import ADAPTER, RECORD, SCHEMA, START, clear_folder, read_record, write_record

if TYPE_CHECKING:
    from softprompts.loop import Progress

PARTS = ("prompt", "offset")
INTERMEDIATE = {"glue": "glue/mnli", "superglue": "glue/mnli", "mrqa": "squad"}
"""The paper's intermediate task, by the family of the target."""


def run_stages(
    settings: RunSettings,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the parts alone into `out/start/prompt` and `out/start/offset`; return what the run's record says of them.

    Raises:
        UsageError: a method without two parts, no source, or settings that cannot be used.
    """
    from softprompts.sweep import has_head, several_processes
    from softprompts.train import train_together

    runs = [stage(settings, part) for part in PARTS]
    folders = [out / START / part for part in PARTS]

    def begin() -> None:
        # Only now is it known that the stages can be trained: what was there before may go.
        if overwrite and not resume:
            clear_folder(out)
        if not (out / RECORD).exists():
            write_record(out, {"schema": SCHEMA, "status": "running", "settings": settings.model_dump(mode="json")})

    # A head belongs to one prompt, so that such parts are trained one after the other.
    together = [[0], [1]] if has_head(settings) or several_processes() else [[0, 1]]
    records: list[dict[str, Any]] = []
    try:
        for numbers in together:
            some, outs = [runs[i] for i in numbers], [folders[i] for i in numbers]
            first = begin if not records else lambda: None
            records += train_together(some, outs, resume=resume, overwrite=overwrite, progress=progress, begin=first)
        if lost := next((record for record in records if record["status"] != "done"), None):
            raise Diverged(f"start.kind={settings.start.kind}: {lost['reason']}")
    except Diverged as error:
        write_record(out, {**read_record(out), "status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    about: dict[str, Any] = {"kind": settings.start.kind, "task": runs[0].task, "steps": runs[0].train.steps}
    for part, record in zip(PARTS, records, strict=True):
        metric = record["metric"]["select"]
        about[part] = {"folder": f"{START}/{part}", metric: record["scores"]["validation"][metric]}
    return {"start": about}


def started(settings: RunSettings, out: Path) -> RunSettings:
    """Return settings whose parts start from the stages in the run's folder, if they are to."""
    if settings.start.kind == "random":
        return settings
    sources = {f"{part}_from": str(out / START / part / ADAPTER) for part in PARTS}
    return settings.updated(method={**settings.method, **sources})


def stage(settings: RunSettings, part: str) -> RunSettings:
    """Return the settings of the run that trains one part alone, in the size it has beside the other.

    Raises:
        UsageError: a method without two parts, parts that start elsewhere, or no source.
    """
    config = settings.method_config()
    if any(config.sources().values()):
        raise UsageError(
            f"start.kind={settings.start.kind} trains what both parts start from; leave prompt_from and offset_from out"
        )
    width = width_of(settings)
    check_rates(settings.train.rates, parameter_names(config, width))
    single = part_alone(config, part, width)
    changes: dict[str, Any] = {"method": described(single)}
    if settings.start.kind == "intermediate":
        no_data = {"path": None, "inputs": None, "target": None, "labels": None, "kind": None, "shots": None}
        changes |= {"task": source_task(settings), "data": settings.data.updated(**no_data)}
    own = parameter_names(single, width)
    known = {*own, *(key.rpartition(".")[2] for key in own)}
    train = settings.train.updated(rates={key: rate for key, rate in settings.train.rates.items() if key in known})
    if settings.start.steps is not None:
        train = train.updated(steps=settings.start.steps, eval_every=None, warmup=None)
    return settings.updated(
        **changes, start=type(settings.start)(), train=train, eval=settings.eval.updated(untuned=False)
    )


def parameter_names(config: MethodConfig, width: int) -> list[str]:
    """Return the names of what a method trains."""
    with torch.device("meta"):
        return [name for name, _ in config.build(width).named_parameters()]


def source_task(settings: RunSettings) -> str:
    """Return the intermediate task.

    Raises:
        UsageError: the paper names none for the target, or it is the target itself.
    """
    if settings.start.task is not None:
        return settings.start.task
    from softprompts.tasks import get_task

    target = None if settings.task is None else get_task(settings.task).name
    source = INTERMEDIATE.get(str(target).partition("/")[0])
    if source is None or source == target:
        raise UsageError(
            f"start.kind=intermediate has no usual source for {target or 'your own data'}; name one with "
            f"-s start.task=TASK"
        )
    return source


def part_alone(config: MethodConfig, part: str, width: int) -> MethodConfig:
    """Return the config of one part, in the size it has beside the other.

    Raises:
        UsageError: the method has no such part, or cannot leave the other one out.
    """
    sized = config.resolved(width)
    other = {"prompt": "offset_positions", "offset": "prompt_length"}[part]
    if other not in type(config).model_fields or not (config.prompt_part(width) and config.offset_part(width)):
        raise UsageError(f"start.kind: {config.name} has no two parts that can be trained alone; take accept or dept")
    return sized.updated(**{other: 0})


def described(config: MethodConfig) -> dict[str, Any]:
    """Return a config as `RunSettings.method` has it."""
    fields = config.to_dict()
    return {"name": fields.pop("method"), **fields}


def width_of(settings: RunSettings) -> int:
    """Return D of the backbone, without loading it.

    Raises:
        UsageError: no such model.
    """
    import transformers

    from softprompts.backbone import embedded_path, first_line

    try:
        source = embedded_path(settings.model.name)
        config = transformers.AutoConfig.from_pretrained(source, revision=settings.model.revision)
    except (OSError, ValueError) as error:
        raise UsageError(f"model '{settings.model.name}' cannot be loaded ({first_line(error)})") from None
    text = config.get_text_config()
    narrow = (getattr(text, name, None) for name in ("embedding_size", "word_embed_proj_dim"))
    return next((width for width in narrow if width), text.hidden_size)
