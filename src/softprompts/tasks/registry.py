"""Tasks by name."""

from __future__ import annotations

from typing import TypeVar

from softprompts.errors import UsageError, suggest
from softprompts.tasks.base import Task

TaskClass = TypeVar("TaskClass", bound=type[Task])

_TASKS: dict[str, type[Task]] = {}


def register(task: TaskClass) -> TaskClass:
    """Class decorator: make a task known under its `name`."""
    if task.name in _TASKS:
        raise ValueError(f"task '{task.name}' is registered twice")
    _TASKS[task.name] = task
    return task


def task_names() -> tuple[str, ...]:
    """Full names of all tasks, in the order of their registration."""
    return tuple(_TASKS)


def get_task(name: str) -> Task:
    """The task of a full name (`glue/rte`) or of its last part alone (`rte`)."""
    if name in _TASKS:
        return _TASKS[name]()
    matches = [full for full in _TASKS if full.split("/")[-1] == name]
    if len(matches) == 1:
        return _TASKS[matches[0]]()
    if matches:
        raise UsageError(f"task '{name}' can be {' or '.join(matches)}; use the full name")
    # A short name is compared with short names, or the family alone would decide what looks close.
    short = {full.split("/")[-1]: full for full in _TASKS}
    close = suggest(name, _TASKS) or suggest(name.split("/")[-1], short)
    raise UsageError(f"unknown task '{name}'{close or ';'} 'softprompts list' shows all")
