"""Kept tokens: a hit is what a miss is, everything that matters is in the key, a damaged file is made anew."""

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from softprompts import cache
from softprompts.backbone import load_backbone
from softprompts.cache import Tokens, cache_folder, key_of
from softprompts.config import DataSettings, ModelSettings
from softprompts.data import Encoder, make_encoder
from softprompts.tasks import Example, get_task

EXAMPLES = [Example(f"sentence: film number {i} " + "was long " * (i % 9), str(i % 2), (), i % 2) for i in range(40)]


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Encoder]:
    """An encoder that keeps what it encodes in an empty folder."""
    monkeypatch.setenv("SOFTPROMPTS_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(cache, "LEAST_ROWS", 20)
    backbone = load_backbone(ModelSettings(dtype="fp32"))
    yield make_encoder(backbone, get_task("glue/sst2"), DataSettings(max_source_tokens=16))


def files() -> list[Path]:
    return sorted((cache_folder() / "tokens").glob("*"))


def never(*args: Any) -> Any:
    raise AssertionError("tokenised again")


def test_a_hit_is_what_a_miss_is(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = replace(encoder, cached=False).encode(EXAMPLES)
    assert files() == [] and plain.truncated > 0
    assert encoder.encode(EXAMPLES) == plain
    (kept,) = files()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o644
    monkeypatch.setattr(Encoder, "tokenise", never)
    assert encoder.encode(EXAMPLES) == plain
    assert files() == [kept]


def test_labels_come_from_the_examples_not_from_the_cache(encoder: Encoder) -> None:
    encoder.encode(EXAMPLES)
    other = [replace(example, label=1) for example in EXAMPLES]
    assert encoder.encode(other).classes == [1.0] * len(EXAMPLES) and len(files()) == 1


def test_small_splits_and_the_setting_leave_nothing(encoder: Encoder) -> None:
    encoder.encode(EXAMPLES[:19])
    make_encoder(encoder.backbone, encoder.task, DataSettings(cache=False)).encode(EXAMPLES)
    assert files() == []


def test_the_key_is_of_everything_that_matters(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, task = encoder.backbone, encoder.task
    reordered = [EXAMPLES[1], EXAMPLES[0], *EXAMPLES[2:]]
    keys = [
        key_of(encoder, EXAMPLES),
        key_of(encoder, EXAMPLES[:-1]),
        key_of(encoder, reordered),
        key_of(encoder, [replace(EXAMPLES[0], target="1"), *EXAMPLES[1:]]),
        key_of(replace(encoder, max_source=15), EXAMPLES),
        key_of(replace(encoder, max_target=9), EXAMPLES),
        key_of(replace(encoder, task=get_task("squad")), EXAMPLES),
        key_of(replace(encoder, backbone=replace(backbone, kind="causal")), EXAMPLES),
    ]
    own = load_backbone(ModelSettings(dtype="fp32"))
    own.tokenizer.add_tokens(["film"])
    keys.append(key_of(replace(encoder, backbone=own), EXAMPLES))
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    keys.append(key_of(encoder, EXAMPLES))
    monkeypatch.setattr(cache.transformers, "__version__", "0")
    keys.append(key_of(encoder, EXAMPLES))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    again = make_encoder(load_backbone(ModelSettings(dtype="fp32")), task, DataSettings(max_source_tokens=16))
    assert key_of(again, list(EXAMPLES)) == keys[0]


@pytest.mark.parametrize("damage", ["cut", "empty", "bits", "text", "foreign", "folder"])
def test_a_damaged_file_is_made_anew(encoder: Encoder, damage: str, tmp_path: Path) -> None:
    plain = encoder.encode(EXAMPLES)
    (kept,) = files()
    whole = kept.read_bytes()
    if damage == "foreign":  # a sound file, of other texts, under this name
        encoder.encode(EXAMPLES[:30])
        (other,) = [path for path in files() if path != kept]
        other.replace(kept)
    elif damage == "folder":
        kept.unlink()
        kept.mkdir()
    else:
        flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
        kept.write_bytes({"cut": whole[:-50], "empty": b"", "bits": flipped, "text": b"not ours " * 99}[damage])
    assert cache.read(kept, kept.stem) is None
    assert encoder.encode(EXAMPLES) == plain
    if damage != "folder":
        assert cache.read(kept, kept.stem) is not None and len(kept.read_bytes()) == len(whole)


def test_a_folder_that_cannot_be_used_is_done_without(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SOFTPROMPTS_CACHE", str(tmp_path / "file"))
    assert encoder.encode(EXAMPLES) == replace(encoder, cached=False).encode(EXAMPLES)


def test_files_longest_unused_make_room(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, rows in enumerate((40, 39, 38)):
        encoder.encode(EXAMPLES[:rows])
        newest = next(path for path in files() if path.stat().st_mtime > 1000)
        os.utime(newest, (number, number))
    first = files()
    encoder.encode(EXAMPLES)  # the oldest, young again
    used = [path for path in first if path.stat().st_mtime > 1000]
    monkeypatch.setattr(cache, "MOST_BYTES", 2 * used[0].stat().st_size + 50)
    encoder.encode(EXAMPLES[:37])
    left = files()
    assert len(left) == 2 and used[0] in left and len(set(left) - set(first)) == 1


def test_no_target_and_empty_rows_survive(tmp_path: Path) -> None:
    tokens = Tokens([[], [3, 2], []], [[1], [], [70_000]], 5, 6)
    cache.write(tmp_path / "x.safetensors", "key", tokens)
    assert cache.read(tmp_path / "x.safetensors", "key") == tokens
    assert cache.read(tmp_path / "x.safetensors", "other") is None
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SOFTPROMPTS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "softprompts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "softprompts"
