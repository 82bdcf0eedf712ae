"""Training, read top to bottom: data, backbone, prompt, the loop (`loop.py`), the record.

`train` runs one set of settings; `train_together` runs several on one backbone, whose rows pass through it in one
batch. The first is the second with one member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from softprompts import results
from softprompts.attach import adapters_of, attach
from softprompts.backbone import default_device, load_backbone
from softprompts.config import RunSettings
from softprompts.data import Encoder, Rows, load_data, make_encoder, num_labels, truncation_notes
from softprompts.errors import SoftPromptsError, UsageError
from softprompts.loop import Progress, Run
from softprompts.member import Member
from softprompts.population import Halving, check_fit
from softprompts.scored import scored_rows
from softprompts.start import run_stages, started


def train(
    settings: RunSettings,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train one prompt, score it, and leave a run record in `out`. Returns the record.

    Args:
        settings: of the run.
        out: its folder.
        resume: continue where the folder says.
        overwrite: begin again.
        about: further entries of the record, for example how the settings were found.
        progress: hears of every step.

    Raises:
        UsageError: settings, data or folder that cannot be used; nothing is written then.
        SoftPromptsError: the loss is not a number, or the disk refuses.
    """
    return train_together([settings], [out], resume=resume, overwrite=overwrite, about=about, progress=progress)[0]


def train_together(
    settings: Sequence[RunSettings],
    outs: Sequence[str | Path],
    *,
    resume: bool = False,
    overwrite: bool = False,
    halving: Halving | None = None,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
    begin: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Train several prompts on one backbone at once, each as if alone, and leave a run record in each folder.

    Args:
        settings: of the members; they may differ in method, rates, seed and few-shot draw.
        outs: a folder for each.
        resume: continue where the folders' common state says.
        overwrite: begin again.
        halving: drop the worse half after some evaluations; such a member's record has the status "dropped".
        about: further entries of every record.
        progress: hears of every step.
        begin: called when everything is found to be usable, before anything is written.

    Raises:
        UsageError: settings, data or folders that cannot be used, or members that do not fit each other.
        SoftPromptsError: a loss is not a number, or the disk refuses.
    """
    folders, progress = [Path(out) for out in outs], progress or Progress()
    if len({out.name for out in folders}) < len(folders):
        raise UsageError("two folders have the same last name, which tells the runs apart; name them differently")
    first = settings[0]
    check_fit(settings)
    if len(first.tasks) > 1:
        from softprompts.multitask import train_tasks

        whole = train_tasks(first, outs[0], resume=resume, overwrite=overwrite, about=about, progress=progress)
        return [whole]
    accelerator = Accelerator(cpu=default_device().type == "cpu")
    if len(settings) > 1 and accelerator.num_processes > 1:
        raise UsageError(
            "several prompts on one backbone train in one process; start one process, or one run at a time"
        )
    earlier = [unfinished(one, out, resume) for one, out in zip(settings, folders, strict=True)]
    if all(record is not None and record["status"] in ("done", "dropped") for record in earlier):
        for out in folders:
            progress.note(f"{out} is finished; nothing to resume")
            if accelerator.is_main_process:
                (out / results.STATE).unlink(missing_ok=True)  # killed just before it was removed
        return [record for record in earlier if record is not None]
    for out in folders:
        results.check_folder(out, resume, overwrite)
    begun = resume and (folders[0] / results.STATE).exists()
    task_data = load_data(first)  # before the stages: what cannot be read ends the run here
    if first.start.kind != "random":
        # Once the run itself has begun, its stages may be gone.
        parts = {"start": earlier[0]["start"]} if begun and earlier[0] is not None else None
        parts = parts or run_stages(first, folders[0], resume=resume, overwrite=overwrite, progress=progress)
        about = (about or {}) | parts
        resume, overwrite = True, False  # the parts trained alone are the beginning of the run
    torch.manual_seed(first.seed)
    backbone = load_backbone(first.model, num_labels(task_data.task))
    names = ["default"] if len(settings) == 1 else [f"member-{number}" for number in range(len(settings))]
    for number, (one, out, name) in enumerate(zip(settings, folders, names, strict=True)):
        if number:
            torch.manual_seed(one.seed)
        # A saved state holds the weights: the adapters they started from may be gone.
        attach(
            backbone.model,
            started(one, out).method_config(),
            name,
            tokenizer=backbone.tokenizer,
            also_train=backbone.untrained,
            initialise=not begun,
        )
        if not any(parameter.requires_grad for parameter in backbone.model.parameters()):
            raise UsageError(f"method '{one.method['name']}' trains nothing here; take a prompt method, or a head")
    adapters = adapters_of(backbone.model)
    for note in task_data.notes:
        progress.note(note)
    # Each adapter reaches as far as it would alone; those that reach equally far share their tokens.
    encoded: dict[int, tuple[Encoder, dict[str, Rows]]] = {}
    members: list[Member] = []
    for one, out, name, before in zip(settings, folders, names, earlier, strict=True):
        encoder = make_encoder(backbone, task_data.task, first.data, adapters.reach(name))
        if encoder.max_source not in encoded:
            made = {split: encoder.encode(getattr(task_data, split)) for split in ("train", "validation", "test")}
            encoded[encoder.max_source] = encoder, made
            for note in truncation_notes(made, encoder):
                progress.note(note)
        encoder, splits = encoded[encoder.max_source]
        data = task_data
        if (one.data.shots, one.data.shot_seed) != (first.data.shots, first.data.shot_seed):
            data = load_data(one)
            splits = {**splits, "train": encoder.encode(data.train)}
        scored, limits = scored_rows(one, encoder, splits)
        for note in limits if not members else ():
            progress.note(note)
        member = Member(one, out, name, encoder, data, {**splits, **scored})
        member.record = results.new_record(one, data, backbone, splits, name, member.parameters.values())
        member.record |= about or {}
        known = (before or {}).get("data")
        if known is not None and known["provenance"] != member.record["data"]["provenance"]:
            raise UsageError(f"the data have changed since {out} was begun; take --overwrite to begin again")
        members.append(member)
    # Every process draws its own dropout; the first one's numbers are those of a run alone.
    if accelerator.process_index:
        torch.manual_seed(first.seed + 7919 * accelerator.process_index)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if accelerator.is_main_process:
        begin()
    accelerator.wait_for_everyone()
    return carry_out(Run(members, accelerator, progress, halving), overwrite=overwrite and not resume)


def carry_out(run: Run, *, overwrite: bool) -> list[dict[str, Any]]:
    """Train and score the members of a run, writing their records before, after, and when it fails; return them."""
    if run.main:
        for member in run.members:
            if overwrite:
                results.clear_folder(member.out)
            results.write_record(member.out, member.record)
    run.accelerator.wait_for_everyone()
    try:
        run.steps()
        records = run.finish()
    except Exception as error:
        if run.main:
            for member in run.members:
                failed = {**member.record, "status": "failed", "error": f"{type(error).__name__}: {error}"}
                with suppress(SoftPromptsError):
                    results.write_record(member.out, failed)
        raise
    if run.main:
        run.keep(records)
        run.state_file.unlink(missing_ok=True)
    run.accelerator.wait_for_everyone()
    return records


def unfinished(settings: RunSettings, out: Path, resume: bool) -> dict[str, Any] | None:
    """Return the record that a resumed run has left, None if there is none.

    Raises:
        UsageError: it was begun with other settings.
    """
    if not (resume and (out / results.RECORD).exists()):
        return None
    record = results.read_record(out)
    # Compared as settings: an older record lacks the settings that came later.
    if RunSettings(**record["settings"]) != settings:
        raise UsageError(f"{out} was begun with other settings; resume with --out alone, or take --overwrite")
    return record
