"""Rows from every kind of file, from mirrors in the hub's format, and what is said when something is wrong."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import socket
import time
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
from hub_mirror import write_mirror

from softprompts.errors import UsageError
from softprompts.tasks import load_task
from softprompts.tasks.base import Hub
from softprompts.tasks.sources import find_table, hub_splits, read_hub, read_split, read_table

ROWS = [
    {"text": 'a "quoted", text', "label": "1"},
    {"text": "two\nlines", "label": "0"},
    {"text": "\u2028 separator, größe", "label": "1"},
]
SHA, OTHER_SHA = "a" * 40, "b" * 40
RTE = {
    "sentence1": ["A cat sat.", "It rained."],
    "label": [0, 1],
    "answers": [{"text": ["x", "y"], "start": [1, 2]}, {"text": ["z"], "start": [3]}],
}
FEATURES = datasets.Features(
    {
        "sentence1": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["entailment", "not_entailment"]),
        "answers": {"text": datasets.List(datasets.Value("string")), "start": datasets.List(datasets.Value("int32"))},
    }
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    root = tmp_path / "mirror"
    write_mirror(root, "nyu/glue", {"rte": {"train": RTE, "validation": RTE}, "cb": {"train": RTE}}, FEATURES)
    return root


def fails(function, *arguments) -> str:
    """The message of the UsageError that a call raises; always one line."""
    with pytest.raises(UsageError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


# ---------------------------------------------------------------------------------------- files


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows as the kind of file that the name says, with the libraries users write it with."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(jsonl(rows).encode()))
    elif path.suffix == ".jsonl":
        path.write_text(jsonl(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl", "d.jsonl.gz", "d.parquet", "D.CSV"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, ROWS)
    assert read_table(path) == ROWS


def test_byte_order_mark_semicolons_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes("\ufefftext;label\r\nno comma;1\r\n\r\n".encode())
    assert read_table(path) == [{"text": "no comma", "label": "1"}]
    path = tmp_path / "d.jsonl"
    path.write_bytes('\ufeff{"text": "x"}\r\n\r\n'.encode())
    assert read_table(path) == [{"text": "x"}]


def test_tsv_with_quotes_as_plain_characters(tmp_path: Path) -> None:
    path = tmp_path / "d.tsv"
    path.write_text('text\tlabel\n"He said so.\t1\n"a" or "b"\t0\n"all ""of"" it"\t1\n', encoding="utf-8")
    assert [row["text"] for row in read_table(path)] == ['"He said so.', '"a" or "b"', 'all "of" it']


def test_long_fields_do_not_meet_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text(f"text,label\n{'x' * 200_000},1\n", encoding="utf-8")
    assert len(read_table(path)[0]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"a": 1}\n{"a": \n', "d.jsonl line 2 is not JSON: Expecting value: line 1 column 7 (char 6); "
         "mend or remove that line"),
        ("d.jsonl", b'{"a": 1}\n\n[1]\n', "d.jsonl line 3 is a list, not an object; "
         'write one {"column": value} object a line'),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "d.jsonl line 2 is not UTF-8 text; save the file as UTF-8"),
        ("d.csv", b"\xef\xbb\xbfa,b\nx,\xe9\n", "d.csv line 2 is not UTF-8 text; save the file as UTF-8"),
        ("d.jsonl", b"\n", "d.jsonl holds no rows; it needs at least one"),
        ("d.csv", b"text,label\n", "d.csv holds no rows; it needs at least one"),
        ("d.csv", b"", "d.csv holds no rows; it needs at least one"),
        ("d.tsv", b"text\tlabel\n", "d.tsv holds no rows; it needs at least one"),
        ("d.csv", b"a,b\n1,2\n1,2,3\n", "d.csv line 3 has 3 fields, the header has 2; "
         "put quotes around texts that hold a , or a quote"),
        ("d.tsv", b"a\tb\n1\n", "d.tsv line 2 has 1 fields, the header has 2; "
         "put quotes around texts that hold a tab or a quote"),
        ("d.csv", b'a,b\n"x,2\n', "d.csv line 2: unexpected end of data; "
         "put quotes around texts that hold quotes, and double the quotes inside"),
        ("d.csv", b"a,b,a\n1,2,3\n", "d.csv names the column 'a' twice in its first line; rename one"),
        ("d.jsonl.gz", b"no gzip", "d.jsonl.gz is a damaged gzip file (Not a gzipped file (b'no')); "
         "copy or download it again"),
        ("d.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12], "d.jsonl.gz is a damaged gzip file "
         "(Compressed file ended before the end-of-stream marker was reached); copy or download it again"),
        ("d.parquet", b"PAR1 and no more PAR1", "d.parquet is a damaged parquet file"),
        ("d.json", b"{}", "cannot tell what kind of file {folder}/d.json is; "
         "name it with one of .jsonl.gz .jsonl .csv .tsv .parquet"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    said = fails(read_table, tmp_path / name).replace(str(tmp_path), "{folder}")
    exact = message if message.startswith("cannot") else "{folder}/" + message
    assert said == exact or (name == "d.parquet" and said.startswith(exact) and said.endswith("download it again"))


def test_missing_file_and_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a\n1\n")
    (tmp_path / "folder.csv").mkdir()
    assert fails(read_table, tmp_path / "trian.csv").endswith("trian.csv; did you mean 'train.csv'?")
    assert fails(read_table, tmp_path / "no" / "x.csv").endswith("/no/x.csv; check the path")
    assert fails(read_table, tmp_path / "folder.csv").endswith("is a folder, not a file; name a file in it")


def test_a_split_found_twice(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.csv", ROWS)
    assert find_table(tmp_path, "train") == tmp_path / "train.csv"
    assert find_table(tmp_path, "test") is None
    write_rows(tmp_path / "train.jsonl", ROWS)
    assert fails(find_table, tmp_path, "train") == f"{tmp_path} holds 'train' 2 times: train.jsonl, train.csv; keep one"


# ---------------------------------------------------------------------------------------- splits of a task

GLUE_RTE = Hub("nyu/glue", "rte", SHA)


def test_local_folder_comes_before_the_mirror(tmp_path: Path, mirror: Path) -> None:
    folder = tmp_path / "data" / "rte"
    folder.mkdir(parents=True)
    path = write_rows(folder / "train.jsonl.gz", ROWS)
    assert read_split("rte", GLUE_RTE, "train", tmp_path / "data", mirror) == (ROWS, f"local:rte/{path.name}")
    # A task is not put together from two sources.
    assert fails(read_split, "rte", GLUE_RTE, "validation", tmp_path / "data", mirror) == (
        f"no 'validation' split in {folder}, which holds train.jsonl.gz; "
        "add validation.jsonl.gz there, or choose another data folder"
    )


def test_mirror_is_read_in_the_hubs_format(tmp_path: Path, mirror: Path) -> None:
    rows, provenance = read_split("rte", GLUE_RTE, "train", tmp_path / "empty", mirror)
    assert rows == [dict(zip(RTE, values, strict=True)) for values in zip(*RTE.values(), strict=True)]
    assert [type(row["label"]) for row in rows] == [int, int]
    assert provenance == f"mirror:{mirror / 'nyu/glue'}"


def test_a_task_is_the_same_from_files_and_from_a_mirror(tmp_path: Path) -> None:
    columns = {"sentence1": list("abcdef"), "sentence2": list("uvwxyz"), "label": [0, 1, 0, 1, 1, 0]}
    write_mirror(tmp_path / "mirror", "nyu-mll/glue", {"rte": {"train": columns, "validation": columns}})
    (tmp_path / "data/rte").mkdir(parents=True)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for split in ("train", "validation"):
        write_rows(tmp_path / f"data/rte/{split}.jsonl.gz", rows)
    local = load_task("glue/rte", data_dir=tmp_path / "data")
    mirrored = load_task("glue/rte", data_dir=tmp_path / "none", mirror=tmp_path / "mirror")
    assert len(local.train) == 6 and local.train == mirrored.train
    assert [local.validation, local.test] == [mirrored.validation, mirrored.test]


def test_names_of_splits_and_classes(mirror: Path) -> None:
    renamed = Hub("nyu/glue", "rte", SHA, {"test": "validation"})
    rows, _, names = read_hub(renamed, "test", mirror)
    assert len(rows) == 2 and names == {"label": ("entailment", "not_entailment")}
    assert hub_splits(GLUE_RTE, mirror) == ("train", "validation")


def test_a_changed_mirror_is_read_anew(mirror: Path) -> None:
    assert len(read_hub(GLUE_RTE, "train", mirror)[0]) == 2
    changed = {column: list(values) * 2 for column, values in RTE.items()}
    write_mirror(mirror, "nyu/glue", {"rte": {"train": changed}}, FEATURES)
    assert len(read_hub(GLUE_RTE, "train", mirror)[0]) == 4


def test_nothing_is_printed_and_settings_come_back(
    mirror: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    level = logging.getLogger("datasets").level
    datasets.enable_progress_bars()
    capfd.readouterr()
    read_hub(GLUE_RTE, "train", mirror)
    (mirror / "nyu/glue/cb/train-00000-of-00001.parquet").write_bytes(b"damaged")
    fails(read_hub, Hub("nyu/glue", "cb", SHA), "train", mirror)
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert logging.getLogger("datasets").level == level and not datasets.are_progress_bars_disabled()


def test_errors_of_a_mirror(tmp_path: Path, mirror: Path) -> None:
    inside = f"in the mirror {mirror}"
    assert fails(read_hub, Hub("nyu/glue", "rtt", SHA), "train", mirror) == (
        "data set 'nyu/glue' has no config 'rtt'; did you mean 'rte'? it has rte, cb"
    )
    assert fails(read_hub, Hub("nyu/glue", None, SHA), "train", mirror) == (
        f"data set 'nyu/glue' {inside} needs a config: one of rte, cb; write nyu/glue:rte"
    )
    assert fails(read_hub, GLUE_RTE, "vaidation", mirror) == (
        f"data set 'nyu/glue' config 'rte' {inside} has no split 'vaidation'; did you mean 'validation'? "
        "it has train, validation"
    )
    assert fails(read_hub, Hub("nyu/superglue", "cb", SHA), "train", mirror) == (
        f"no data set 'nyu/superglue' in the mirror {mirror}; copy it to {mirror / 'nyu/superglue'}"
    )
    file = mirror / "nyu/glue/cb/train-00000-of-00001.parquet"
    file.write_bytes(b"damaged")
    assert fails(read_hub, Hub("nyu/glue", "cb", SHA), "train", mirror) == (
        f"cannot load data set 'nyu/glue' config 'cb' {inside} split 'train': Parquet file size is 7 bytes, "
        f"smaller than the minimum file footer (8 bytes); check the files in {mirror / 'nyu/glue'}"
    )
    file.unlink()
    assert "check the files in" in fails(read_hub, Hub("nyu/glue", "cb", SHA), "train", mirror)
    write_mirror(mirror, "nyu/none", {"a": {"train": {column: [] for column in RTE}}}, FEATURES)
    assert fails(read_hub, Hub("nyu/none", "a", SHA), "train", mirror) == (
        f"data set 'nyu/none' config 'a' {inside} split 'train' holds no rows; it needs at least one"
    )


# ---------------------------------------------------------------------------------------- hub


def cache_as_from_hub(mirror: Path, cache: Path, sha: str) -> None:
    """Put a prepared data set where `datasets` keeps what it took from the hub."""
    data = datasets.load_dataset(str(mirror / "nyu/glue"), "rte", split="train")
    prepared = Path(data.cache_files[0]["filename"]).parent
    shutil.copytree(prepared, cache / "nyu___glue" / "rte" / "0.0.0" / sha)


def test_offline_without_a_copy_is_clean_and_asks_nobody(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **options: asked.append(host) or [])
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    monkeypatch.setattr(time, "sleep", asked.append)  # what would wait for another try
    assert fails(read_split, "rte", GLUE_RTE, "train") == (
        "cannot reach the hub for data set 'nyu/glue' config 'rte', and there is no cached copy; "
        "connect to the network (unset HF_HUB_OFFLINE), or name a local data folder or mirror"
    )
    assert not asked
    assert capfd.readouterr() == ("", "")


def test_offline_with_a_cached_copy_of_the_pinned_revision(tmp_path: Path, mirror: Path) -> None:
    cache_as_from_hub(mirror, tmp_path / "cache", SHA)
    rows, provenance = read_split("rte", GLUE_RTE, "train")
    assert len(rows) == 2 and provenance == f"hub:nyu/glue@{SHA}"
    # A branch is reported as the commit it stood for.
    assert read_split("rte", Hub("nyu/glue", "rte", "main"), "train")[1] == f"hub:nyu/glue@{SHA}"
    assert fails(read_split, "rte", Hub("nyu/glue", "cb", SHA), "train") == (
        "data set 'nyu/glue' has no config 'cb'; there is no connection, and the cache holds rte"
    )


def test_cached_copy_of_another_revision_is_refused(tmp_path: Path, mirror: Path) -> None:
    cache_as_from_hub(mirror, tmp_path / "cache", OTHER_SHA)
    assert fails(read_split, "rte", GLUE_RTE, "train") == (
        "the hub could not give revision aaaaaaaaaaaa of 'nyu/glue', and the cached copy is of bbbbbbbbbbbb; "
        "connect to the network, or delete the cached copy"
    )


def test_a_folder_of_the_same_name_does_not_stand_in_for_the_hub(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mirror)
    assert fails(read_split, "rte", GLUE_RTE, "train") == (
        "the folder nyu/glue here hides the hub data set of that name; run from another folder"
    )


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'nyu/glue' doesn't exist on the Hub or cannot be accessed."),
         "no data set 'nyu/glue' config 'rte' on the hub, or it is private; "
         "check the name, or log in with 'hf auth login'"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'nyu/glue' is a gated dataset on the Hub."),
         "data set 'nyu/glue' config 'rte' is gated; ask for access on its page, then log in with 'hf auth login'"),
        (datasets.exceptions.DatasetNotFoundError("Revision 'x' doesn't exist for dataset 'nyu/glue' on the Hub."),
         f"data set 'nyu/glue' config 'rte' has no revision '{SHA}'; check it on the page of the data set"),
        (RuntimeError("Dataset scripts are no longer supported, but found glue.py"),
         "data set 'nyu/glue' config 'rte' is a loading script, which 'datasets' no longer runs; "
         "use a copy stored as parquet"),
        (OSError("disk\nfull"),
         "cannot load data set 'nyu/glue' config 'rte' split 'train': disk; check its page, or delete the cached copy"),
    ],
)  # fmt: skip
def test_answers_of_the_hub(monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str) -> None:
    def load(*arguments, **options):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert fails(read_split, "rte", GLUE_RTE, "train") == said
