"""Quality against size: KL divergence over the bytes of the whole folder, one panel a model, one line a method.

usage: python tools/bench/quality_plot.py --model TITLE FILE... [--model TITLE FILE...] --output FILE.svg

Of each model's files those that end in .jsonl are rows of quality.py, and those that end in .json llama.cpp's table as
quality.py takes it (rows of `type`, `bytes`, `kld_mean`, the original without the last). Needs matplotlib.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Methods in the legend's order, with the style of their lines; other rows are not drawn.
STYLES = {
    "best": {"color": "C0", "marker": "o"},
    "fast": {"color": "C2", "marker": "s"},
    "paper": {"color": "C4", "marker": "^"},
    "uniform": {"color": "C7", "marker": "v"},
    "llama.cpp": {"color": "C3", "marker": "D", "linestyle": "--"},
}
# Divergences below are not drawn: next to nothing is rounded there, and some tokens are routed differently.
LEAST = 5e-4


@dataclass(frozen=True)
class Panel:
    """A model: its title, and every method's sizes in bytes with the mean KL divergences there."""

    title: str
    lines: dict[str, list[tuple[int, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", nargs="+", required=True, metavar=("TITLE", "FILE"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    draw([read_panel(title, [Path(file) for file in files]) for title, *files in options.model], options.output)


def read_panel(title: str, files: list[Path]) -> Panel:
    rows = [row for file in files for row in read_rows(file)]
    lines = {method: sorted({(size, kld) for own, size, kld in rows if own == method}) for method in STYLES}
    return Panel(title, {method: points for method, points in lines.items() if points})


def read_rows(file: Path) -> list[tuple[str, int, float]]:
    """Method, bytes and mean KL divergence of all rows that were measured and are to be drawn."""
    if file.suffix == ".jsonl":
        rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        rows = [{"method": "llama.cpp", **row} for row in json.loads(file.read_text())]
    return [(row["method"], row["bytes"], row["kld_mean"]) for row in rows if row.get("kld_mean", 0.0) >= LEAST]


def draw(panels: list[Panel], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moejax"
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, axes in zip(panels, all_axes[0], strict=True):
        for method, points in panel.lines.items():
            megabytes, divergences = zip(*((size / 1e6, kld) for size, kld in points), strict=True)
            axes.plot(megabytes, divergences, markersize=4, label=method, **STYLES[method])
        axes.set(title=panel.title, xlabel="bytes of the whole folder, MB", xlim=(0, None), yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    all_axes[0][0].set(ylabel="mean KL divergence from the original, nats")
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
