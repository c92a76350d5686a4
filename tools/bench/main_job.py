"""The main job as a user runs it: bytes against the budget, time and peak memory of the whole process.

usage: python tools/bench/main_job.py [--budget 6x] [--runs 3]

Every run is a fresh process of `moejax compress` on the tiny checkpoint with the default texts. Machines are noisy: the
median is what to quote.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FIGURES = ("bytes", "budget_bytes", "ppl", "base_ppl", "kld_mean", "same_top1", "seconds", "peak_memory_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="6x")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    runs = [run(options.budget) for _ in range(options.runs)]
    for name in FIGURES:
        values = [float(figures[name]) for figures in runs]
        print(f"{name:18} min {min(values):.10g}  median {statistics.median(values):.10g}  max {max(values):.10g}")


def run(budget: str) -> dict[str, Any]:
    """One run in a folder that goes afterwards; its figures."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = ["compress", "--budget", budget, "--output", f"{folder}/out", "--json", str(figures)]
        subprocess.run([sys.executable, "-m", "moejax", *command], check=True, stdout=subprocess.DEVNULL)
        read: dict[str, Any] = json.loads(figures.read_text())
        return read


if __name__ == "__main__":
    main()
