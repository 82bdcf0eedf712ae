"""Errors that a user can act on: one line with the setting, the numbers and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SoftPromptsError(Exception):
    """Something went wrong while running; the command line prints the line and exits with `exit_code`."""

    exit_code = 1


class Diverged(SoftPromptsError):
    """A loss is no finite number anymore."""


class UsageError(SoftPromptsError, ValueError):
    """The user asked for something that cannot be: a bad setting, name, file or column."""

    exit_code = 2


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest of `choices`, or an empty string."""
    close = get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
