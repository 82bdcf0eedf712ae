"""Where rows come from: files, folders of splits, and data sets in the hub's format.

Rows are plain dictionaries; class labels are the integers of the data set. Whatever goes wrong is a
`UsageError` of one line. Only a data set named by its hub id can reach the network.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softprompts.errors import UsageError, suggest
from softprompts.tasks.base import Hub

Row = dict[str, Any]

ENDINGS = (".jsonl.gz", ".jsonl", ".csv", ".tsv", ".parquet")
_CAUSE_LENGTH = 200


def read_split(
    folder_name: str, hub: Hub, split: str, data_dir: Path | None = None, mirror: Path | None = None
) -> tuple[list[Row], str]:
    """Read one split of a benchmark task; return its rows and where they came from.

    `<data_dir>/<folder_name>/` is used when that folder exists, then `<mirror>/<hub.path>/`, then the hub.
    A task is never put together from two of them, because their rows may overlap.
    """
    folder = Path(data_dir) / folder_name if data_dir is not None else None
    if folder is not None and folder.is_dir():
        path = find_table(folder, split)
        if path is None:
            tables = sorted(entry.name for entry in folder.iterdir() if has_known_ending(entry))
            raise UsageError(
                f"no '{split}' split in {folder}, which holds {', '.join(tables) or 'no data files'}; "
                f"add {split}.jsonl.gz there, or choose another data folder"
            )
        return read_table(path), f"local:{folder_name}/{path.name}"
    rows, provenance, _ = read_hub(hub, split, mirror)
    return rows, provenance


# ---------------------------------------------------------------------------------------- files


def has_known_ending(path: str | Path) -> bool:
    """Whether `read_table` knows the kind of this file by its name."""
    return str(path).lower().endswith(ENDINGS)


def find_table(folder: Path, name: str) -> Path | None:
    """The data file called `name` in `folder`, whatever its kind; None if there is none."""
    found = [folder / f"{name}{ending}" for ending in ENDINGS if (folder / f"{name}{ending}").is_file()]
    if len(found) > 1:
        files = ", ".join(path.name for path in found)
        raise UsageError(f"{folder} holds '{name}' {len(found)} times: {files}; keep one")
    return found[0] if found else None


def read_table(path: str | Path) -> list[Row]:
    """Read a csv, tsv, jsonl, jsonl.gz or parquet file into rows; texts of csv and tsv stay texts."""
    path = Path(path)
    if not has_known_ending(path):
        raise UsageError(f"cannot tell what kind of file {path} is; name it with one of {' '.join(ENDINGS)}")
    if not path.exists():
        raise UsageError(f"no file {path}{_neighbour(path)}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a file; name a file in it")
    readers: dict[str, Callable[[Path], list[Row]]] = {
        ".csv": _read_csv, ".tsv": _read_tsv, ".parquet": _read_parquet
    }  # fmt: skip
    try:
        rows = readers.get(path.suffix.lower(), _read_jsonl)(path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    if not rows:
        raise UsageError(f"{path} holds no rows; it needs at least one")
    return rows


def _neighbour(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return suggest(path.name, siblings) or "; check the path"


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UsageError(f"{path} is a damaged gzip file ({error}); copy or download it again") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The position counts from behind the byte order mark, which holds no line break.
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path} line {line} is not UTF-8 text; save the file as UTF-8") from error


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    # Not splitlines(): that also breaks at U+2028 and the like, which JSON allows inside a text.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path} line {number} is not JSON: {error}; mend or remove that line") from error
        if not isinstance(row, dict):
            raise UsageError(
                f"{path} line {number} is a {type(row).__name__}, not an object; "
                'write one {"column": value} object a line'
            )
        rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Row]:
    text = _read_text(path)
    header = text.split("\n", 1)[0]
    # Spreadsheets of many countries write semicolons.
    return _read_delimited(path, text, ";" if ";" in header and "," not in header else ",")


def _read_tsv(path: Path) -> list[Row]:
    """Rows of a tab-separated file, with quotes as plain characters or in the manner of spreadsheets."""
    text = _read_text(path)
    lines = [line.removesuffix("\r").split("\t") for line in text.split("\n") if line.strip("\r")]
    if any(len(fields) != len(lines[0]) for fields in lines):
        return _read_delimited(path, text, "\t")
    return _to_rows(path, [[_unquote(field) for field in fields] for fields in lines])


def _unquote(field: str) -> str:
    inside = field[1:-1]
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if quoted else field


def _read_delimited(path: Path, text: str, delimiter: str) -> list[Row]:
    records: list[list[str]] = []
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for record in reader:
            if not record:
                continue
            if records and len(record) != len(records[0]):
                separator = {"\t": "tab"}.get(delimiter, delimiter)
                raise UsageError(
                    f"{path} line {reader.line_num} has {len(record)} fields, the header has "
                    f"{len(records[0])}; put quotes around texts that hold a {separator} or a quote"
                )
            records.append(record)
    except csv.Error as error:
        raise UsageError(
            f"{path} line {reader.line_num}: {error}; "
            "put quotes around texts that hold quotes, and double the quotes inside"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return _to_rows(path, records)


def _to_rows(path: Path, records: list[list[str]]) -> list[Row]:
    if not records:
        return []
    header = [name.strip() for name in records[0]]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UsageError(f"{path} names the column '{twice[0]}' twice in its first line; rename one")
    return [dict(zip(header, record, strict=True)) for record in records[1:]]


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UsageError(
            f"{path} is a damaged parquet file ({_first_line(error)}); copy or download it again"
        ) from error
    return rows


# ---------------------------------------------------------------------------------------- hub


def read_hub(hub: Hub, split: str, mirror: Path | None = None) -> tuple[list[Row], str, dict[str, tuple[str, ...]]]:
    """Read one split of a hub data set, or of its copy under `mirror`.

    Returns the rows, where they came from, and the class names of each column of class labels.
    """
    import datasets

    hub_split = hub.splits.get(split, split)
    location = _location(hub, mirror)
    with _quiet(), _one_line_errors(hub, mirror, hub_split):
        data = datasets.load_dataset(location, hub.config, split=hub_split, revision=hub.revision)
        rows = data.to_list()
    names = {
        column: tuple(feature.names)
        for column, feature in data.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    if mirror is not None:
        return rows, f"mirror:{location}", names
    return rows, f"hub:{hub.path}@{_loaded_revision(hub, data)}", names


def hub_splits(hub: Hub, mirror: Path | None = None) -> tuple[str, ...]:
    """The hub's own names of the splits of a data set."""
    import datasets

    location = _location(hub, mirror)
    with _quiet(), _one_line_errors(hub, mirror, None):
        names = datasets.get_dataset_split_names(location, hub.config, revision=hub.revision)
    return tuple(str(name) for name in names)


def _location(hub: Hub, mirror: Path | None) -> str:
    if mirror is None:
        if Path(hub.path).is_dir():
            # `datasets` prefers a folder of that name to the hub, without a word.
            raise UsageError(f"the folder {hub.path} here hides the hub data set of that name; run from another folder")
        return hub.path
    folder = Path(mirror) / hub.path
    if not folder.is_dir():
        raise UsageError(f"no data set '{hub.path}' in the mirror {mirror}; copy it to {folder}")
    return str(folder)


def _loaded_revision(hub: Hub, data: Any) -> str:
    """The commit that was loaded; an error if another one was pinned.

    Offline, `datasets` takes the newest cached copy of any revision. The cache folder is named by the commit.
    """
    found = Path(data.cache_files[0]["filename"]).parent.name if data.cache_files else hub.revision
    if re.fullmatch("[0-9a-f]{40}", hub.revision) and found != hub.revision:
        raise UsageError(
            f"the hub could not give revision {hub.revision[:12]} of '{hub.path}', and the cached copy is "
            f"of {found[:12]}; connect to the network, or delete the cached copy"
        )
    return found


def _describe(hub: Hub, mirror: Path | None) -> str:
    config = f" config '{hub.config}'" if hub.config else ""
    return f"data set '{hub.path}'{config}" + (f" in the mirror {mirror}" if mirror is not None else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress bars, log lines and warnings of the hub's libraries away from the user's screen."""
    import datasets
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", "httpx", "fsspec")]
    levels = [logger.level for logger in loggers]
    datasets_bars, hub_bars = datasets.are_progress_bars_disabled(), are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL + 1)
            datasets.disable_progress_bars()
            disable_progress_bars()
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if not datasets_bars:
                datasets.enable_progress_bars()
            if not hub_bars:
                enable_progress_bars()


@contextmanager
def _one_line_errors(hub: Hub, mirror: Path | None, split: str | None) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(_explain(error, hub, mirror, split)) from error


def _explain(error: Exception, hub: Hub, mirror: Path | None, split: str | None) -> str:
    """One line for what `datasets` raised; it has few classes, so some cases are told by their text."""
    what, text = _describe(hub, mirror), str(error)
    listed = re.findall("'([^']+)'", text.partition("[")[2].partition("]")[0])
    exists = ", ".join(listed)
    if isinstance(error, ConnectionError):
        return (
            f"cannot reach the hub for {what}, and there is no cached copy; "
            "connect to the network (unset HF_HUB_OFFLINE), or name a local data folder or mirror"
        )
    if text.startswith("Unknown split"):
        return f"{what} has no split '{split}'{suggest(split or '', listed) or ';'} it has {exists}"
    if "BuilderConfig" in text or text.startswith("Couldn't find cache"):
        hint = suggest(hub.config or "", listed) or ";"
        where = "there is no connection, and the cache holds" if "cache" in text else "it has"
        return f"data set '{hub.path}' has no config '{hub.config}'{hint} {where} {exists or 'none'}"
    if "Config name is missing" in text or "Please specify which configuration" in text:
        return f"{what} needs a config: one of {exists}; write {hub.path}:{listed[0] if listed else 'CONFIG'}"
    if "corresponds to no data" in text:
        return f"{what} split '{split}' holds no rows; it needs at least one"
    if text.startswith("Revision"):
        return f"{what} has no revision '{hub.revision}'; check it on the page of the data set"
    if "gated" in text:
        return f"{what} is gated; ask for access on its page, then log in with 'hf auth login'"
    if "doesn't exist on the Hub" in text:
        return f"no {what} on the hub, or it is private; check the name, or log in with 'hf auth login'"
    if "scripts are no longer supported" in text:
        return f"{what} is a loading script, which 'datasets' no longer runs; use a copy stored as parquet"
    part = f" split '{split}'" if split else ""
    files = f"check the files in {Path(mirror) / hub.path}" if mirror else "check its page, or delete the cached copy"
    return f"cannot load {what}{part}: {_first_line(error)}; {files}"


def _first_line(error: BaseException) -> str:
    """The innermost cause, on one line; `datasets` wraps it in sentences that say less."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line if len(line) <= _CAUSE_LENGTH else line[:_CAUSE_LENGTH] + "..."
