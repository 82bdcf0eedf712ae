"""Write a data set repository as the hub stores it: a README with the configs, and parquet files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

Columns = Mapping[str, Sequence[Any]]


def write_mirror(
    mirror: Path,
    path: str,
    configs: Mapping[str, Mapping[str, Columns]],
    features: datasets.Features | None = None,
) -> Path:
    """Write `configs` (config -> split -> columns) to `<mirror>/<path>/`; return that folder."""
    folder = mirror / path
    front = ["---", "configs:"]
    for config, splits in configs.items():
        front += [f"- config_name: {config}", "  data_files:"]
        for split, columns in splits.items():
            front += [f"  - split: {split}", f"    path: {config}/{split}-*"]
            file = folder / config / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(dict(columns), features=features).to_parquet(str(file))
    (folder / "README.md").write_text("\n".join([*front, "---", f"# {path}", ""]), encoding="utf-8")
    return folder
