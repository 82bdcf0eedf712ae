"""How time and memory of a training step grow: with the prompt, the text, K, C and the number of attached adapters.

    python benchmarks/scaling.py                    print the tables, write results/scaling.json
    python benchmarks/scaling.py --plot scaling.png    also draw them (needs matplotlib)
    python benchmarks/scaling.py --device cuda

ACCEPT on t5-nano's shape, random weights, 8 rows without padding; one size varies, the others stay (P=40, T=64, K=8,
C=16). All sizes of one series take turns; each is given relative to the first of its series. Memory is what autograd
keeps for the way back; for attached adapters their own bytes come on top. A straight line is fitted to each series.
"""

from __future__ import annotations

import importlib.util
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from common import figure, interleaved, ratio, run_script, spread
from memory import MIB, kept_bytes
from models import T5_NANO, TINY_T5, Loop, build, texts

from softprompts import AcceptConfig, attach
from softprompts.attach import adapters_of

BATCH, ROUNDS, ANSWER = 8, 6, 2
BASE = {"prompt_length": 40, "text": 64, "K": 8, "C": 16, "adapters": 1}
SERIES = {
    "prompt_length": (10, 25, 50, 100, 200, 400),
    "text": (16, 32, 64, 128, 256),
    "K": (1, 4, 16, 64, 256),
    "C": (4, 16, 64, 256),
    "adapters": (1, 4, 16, 64, 256),
}
QUICK = {"prompt_length": (4, 8, 12), "K": (1, 4), "adapters": (1, 2)}
NAMES = {"prompt_length": "prompt length P", "text": "text length T", "K": "subspaces K", "C": "codewords C",
         "adapters": "attached adapters"}  # fmt: skip
STRAIGHT = 0.1
"""A series is called straight if no point is further from its line than this part of the point."""


def loop_of(config: Any, sizes: Mapping[str, int], batch: int, device: str) -> Loop:
    """Return the training loop at one point."""
    method = AcceptConfig(
        prompt_length=sizes["prompt_length"],
        prompt_subspaces=sizes["K"],
        prompt_codewords=sizes["C"],
        offset_positions=256,
        offset_codewords=8,
    )
    model = build(config, device)
    for number in range(sizes["adapters"] - 1):
        attach(model, method, f"other-{number}")
    rows = texts([sizes["text"]] * batch, ANSWER, config.vocab_size)
    return Loop(model, [method], rows, [range(batch)], device)


def measure(options: Namespace) -> dict[str, Any]:
    """Time each series in turns, and fit lines."""
    config, batch, rounds = (TINY_T5, 2, 1) if options.quick else (T5_NANO, BATCH, ROUNDS)
    rounds = options.rounds or rounds
    base = {**BASE, "prompt_length": 4, "text": 6, "K": 4, "C": 3} if options.quick else BASE
    series = QUICK if options.quick else SERIES
    rows, fits = [], {}
    for name, values in series.items():
        loops = {value: loop_of(config, {**base, name: value}, batch, options.device) for value in values}
        seconds = interleaved({str(value): loop.step for value, loop in loops.items()}, rounds, options.device)
        kept = {value: kept_bytes(loop.step, loop.model) + beside(loop) for value, loop in loops.items()}
        first = values[0]
        for value in values:
            rows.append(
                {
                    "series": name,
                    "value": value,
                    "seconds": spread(seconds[str(value)]),
                    "time_to_first": ratio(seconds[str(value)], seconds[str(first)]),
                    "kept_mib": round(kept[value] / MIB, 3),
                    "kept_to_first": round(kept[value] / kept[first], 3),
                }
            )
        medians = [spread(seconds[str(value)])["median"] for value in values]
        fits[name] = {"time": line(values, medians), "kept": line(values, [kept[value] for value in values])}
    record = {"rows": rows, "fits": fits}
    if options.plot is not None:
        draw(record, options.plot)
    return record


def beside(loop: Loop) -> int:
    """Return the bytes of all attached adapters."""
    return sum(parameter.nbytes for parameter in adapters_of(loop.model).parameters())


def line(values: Sequence[float], found: Sequence[float]) -> dict[str, Any]:
    """Fit a straight line; say how good it is, and where the worst point is.

    `slope` is relative to the first value: how much of it one more unit adds.
    """
    x, y = numpy.asarray(values, float), numpy.asarray(found, float)
    slope, start = numpy.polyfit(x, y, 1)
    fitted = start + slope * x
    total = float(((y - y.mean()) ** 2).sum())
    off = (y - fitted) / y
    worst = int(numpy.abs(off).argmax())
    return {
        "slope": float(f"{slope / y[0]:.4g}"),
        "r2": round(1.0 - float(((y - fitted) ** 2).sum()) / total, 4) if total > 0 else 1.0,
        "worst_at": values[worst],
        "worst": round(float(off[worst]), 3),
        "straight": bool(abs(off[worst]) <= STRAIGHT),
    }


def draw(record: Mapping[str, Any], place: Path) -> None:
    """Draw time against each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fits = record["fits"]
    _, axes = pyplot.subplots(1, len(fits), figsize=(4 * len(fits), 3.2), squeeze=False)
    for axis, name in zip(axes[0], fits, strict=True):
        points = [row for row in record["rows"] if row["series"] == name]
        middle = [point["time_to_first"]["median"] for point in points]
        below = [point["time_to_first"]["median"] - point["time_to_first"]["q1"] for point in points]
        above = [point["time_to_first"]["q3"] - point["time_to_first"]["median"] for point in points]
        axis.errorbar([point["value"] for point in points], middle, yerr=[below, above], marker="o", capsize=3)
        axis.set(xlabel=NAMES[name], ylabel="time, first = 1", ylim=(0, None))
    pyplot.tight_layout()
    pyplot.savefig(place, dpi=120)


def fit_text(fit: Mapping[str, Any]) -> str:
    """Say what a line is worth."""
    said = f"{fit['slope'] * 100:+.3g} % a unit, R² {fit['r2']:.3f}"
    return said if fit["straight"] else f"{said}; not straight: {fit['worst'] * 100:+.0f} % at {fit['worst_at']}"


def table(record: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """Return columns and cells."""
    cells = []
    for name, fit in record["fits"].items():
        points = [row for row in record["rows"] if row["series"] == name]
        for point in points:
            last = point is points[-1]
            cells.append(
                [
                    f"{NAMES[name]} = {point['value']}",
                    figure(point["seconds"], 0, 1000),
                    figure(point["time_to_first"]),
                    f"{point['kept_to_first']:.2f}",
                    fit_text(fit["time"]) if last else "",
                    fit_text(fit["kept"]) if last else "",
                ]
            )
    return ("", "ms a step", "time, first = 1", "memory, first = 1", "line of the time", "line of the memory"), cells


def add_plot(parser: ArgumentParser) -> None:
    """Add --plot, refused where matplotlib is missing."""

    def place(text: str) -> Path:
        if importlib.util.find_spec("matplotlib") is None:
            parser.error("--plot needs matplotlib; install it, or leave --plot out")
        return Path(text)

    parser.add_argument("--plot", type=place, help="draw the times into this PNG")


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print and write; return the record."""
    return run_script("scaling", __doc__, measure, table, arguments, add_plot)


if __name__ == "__main__":
    main(sys.argv[1:])
