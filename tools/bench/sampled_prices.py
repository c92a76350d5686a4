"""What plans lose whose prices come from a sample: KL divergence beside that of plans for which everything is rounded.

    python tools/bench/sampled_prices.py BUDGET [BUDGET ...] --calibration FILE --text FILE [--checkpoint NAME]
           [--recipe fast] [--chunks 64] [--evaluated 64] [--prices whole sampled] [--output FOLDER]

Both are measured once, planned for every budget, written to FOLDER and evaluated on the text's first chunks.
"""

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.load import open_checkpoint
from moejax.checkpoint.source import CheckpointSource
from moejax.commands.common import read_recipe, tokenize
from moejax.evaluate.divergence import evaluate
from moejax.evaluate.text import read_text
from moejax.pipeline.check import require_original
from moejax.pipeline.job import Prepared, plan_within, prepare, split_calibration
from moejax.planning.size import parse_budget
from moejax.report.console import progress_bar
from moejax.tokenizer import load_tokenizer

PROBED = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budgets", nargs="+")
    parser.add_argument("--checkpoint")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--evaluated", type=int, default=64)
    parser.add_argument("--prices", nargs="+", default=["whole", "sampled"])
    parser.add_argument("--output", type=Path, default=Path("sampled_prices"))
    options = parser.parse_args()
    checkpoint = require_original(open_checkpoint(options.checkpoint))
    tokenizer = load_tokenizer(checkpoint.path)
    of_calibration, evaluated = (
        tokenize(read_text(path), tokenizer, checkpoint.config) for path in (options.calibration, options.text)
    )
    calibrated = split_calibration(of_calibration, options.chunks, PROBED)
    print("| prices | measured in | budget | bytes | KL | predicted |\n|---|---|---|---|---|---|", flush=True)
    for prices in options.prices:
        started = time.monotonic()
        recipe = replace(read_recipe(options.recipe), prices=prices)
        prepared = prepare(checkpoint, calibrated, recipe, {}, progress_bar)
        seconds = time.monotonic() - started
        for budget in options.budgets:
            size, kld, predicted = carried_out(
                prepared, checkpoint, budget, evaluated[: options.evaluated], options.output
            )
            print(f"| {prices} | {seconds:.0f} s | {budget} | {size} | {kld:.5f} | {predicted:.5f} |", flush=True)


def carried_out(
    prepared: Prepared, checkpoint: HuggingFaceCheckpoint, budget: str, chunks: np.ndarray, output: Path
) -> tuple[int, float, float]:
    """Bytes, KL divergence and what was predicted of the best plan within the budget."""
    limit = parse_budget(budget, checkpoint.num_elements)
    planned = plan_within(prepared, limit, progress_bar)
    size = prepared.write(planned.plan, output, limit, progress_bar)
    compressed, original = CheckpointSource(open_checkpoint(output)), CheckpointSource(checkpoint)
    found = evaluate(compressed, chunks, original, wave=len(chunks), progress=progress_bar)
    shutil.rmtree(output)
    assert found.kld_mean is not None
    return size, found.kld_mean, planned.predicted


if __name__ == "__main__":
    main()
