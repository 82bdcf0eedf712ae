"""The command line: verbs, and errors as one line. Imports nothing heavy before a verb needs it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from softprompts.cli.options import app
from softprompts.errors import SoftPromptsError

# isort: off
from softprompts.cli import learn, use, look  # noqa: F401 (in the order of the help)

# isort: on

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Environment of other libraries, unless the user has set it."""
INTERRUPTED = 130
PIPE_CLOSED = 141
_CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
"""click's base of usage errors; typer carries its own copy of click from some version on."""


def _print_version(wanted: bool) -> None:
    if wanted:
        from softprompts import __version__

        print(f"softprompts {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Soft prompts for frozen language models."""


# ----------------------------------------------------------------------------------------- errors


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; errors are one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    debug = "--debug" in arguments
    try:
        with _quiet(debug), _first_process_speaks():
            command = typer.main.get_command(app)
            with command.make_context("softprompts", list(arguments)) as context:
                command.invoke(context)
            sys.stdout.flush()
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return _fail(f"stopped{_way_on(arguments)}", INTERRUPTED, word="")
    except BrokenPipeError:
        # What is still buffered must not fail again when Python flushes it on the way out.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(*_explain_error(error, debug))


def _explain_error(error: Exception, debug: bool) -> tuple[str, int]:
    if isinstance(error, SoftPromptsError):
        return str(error), error.exit_code
    if isinstance(error, _CLICK_ERROR):
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "softprompts"
        problem = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        problem = problem[:1].lower() + problem[1:] + ("" if problem.endswith("?") else ";")
        return f"{problem} '{path} --help' shows what there is", 2
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk{_at(error)}; free some, then go on with --resume", 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{_at(error)}", 1
    hint = "" if debug else "; run again with --debug for the traceback"
    return f"unexpected {type(error).__name__}: {error}{hint}", 1


def _fail(message: str, code: int, word: str = "error: ") -> int:
    print(word + " ".join(message.split()), file=sys.stderr)
    return code


def _at(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""


def _way_on(arguments: list[str]) -> str:
    """Say how to resume what Ctrl-C stopped: the same command with --resume, which a sweep does by itself."""
    if arguments[0] not in ("train", "sweep"):
        return ""
    again = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    again += ["--resume"] * (arguments[0] == "train")
    return f"; go on with: {shlex.join(['softprompts', *again])}"


@contextlib.contextmanager
def _first_process_speaks() -> Iterator[None]:
    """Under a launcher of several processes, let only the first one print."""
    if int(os.environ.get("RANK", "0")) == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Keep other libraries' warnings and advice off the user's terminal, unless debugging."""
    if debug:
        yield
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
