"""Tasks by name."""

from __future__ import annotations

from difflib import get_close_matches
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
    # Only the last parts are compared, or the family would decide what looks close.
    full_names = {full.split("/")[-1]: full for full in _TASKS}
    close = get_close_matches(name.split("/")[-1], full_names, n=1)
    hint = suggest(full_names[close[0]], _TASKS) if close else ";"
    raise UsageError(f"unknown task '{name}'{hint} 'softprompts list' shows all")
