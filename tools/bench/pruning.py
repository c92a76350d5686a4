"""What pruning does to every layer, by criterion: its output error with and without re-routing, and the KL it costs.

usage: python tools/bench/pruning.py CHECKPOINT --calibration FILE

Beside each row stands the ratio of the re-routed error to what the gate weights alone say, and KL per unit of error
over the same for rounded down projections (2 bits, in units of the format's error on Gaussian weights). It calibrates
on 64 chunks and probes on 8 others of the same text.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moejax.calibrate import calibrate
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.evaluate.text import chunks, read_text
from moejax.formats import IntFormat
from moejax.pipeline.compress import require_original, split_calibration
from moejax.pipeline.estimate import gaussian_errors
from moejax.pipeline.measure_pruning import measure_pruning
from moejax.pipeline.options import moe_blocks
from moejax.pipeline.probe import probe
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.trial import Trial
from moejax.planning import KEEP, BlockPlan, Plan
from moejax.report.console import progress_bar
from moejax.tokenizer import load_tokenizer
from moejax.transforms.prune import CRITERIA

ROUNDED = IntFormat(2, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--calibration", type=Path, required=True)
    options = parser.parse_args()
    trial = prepare(options.checkpoint, options.calibration)
    rounding = rounding_rates(trial)
    print("| criterion | layer | pruned | gate2 lost | dropped | re-routed | ratio | KL | KL per error / rounding's |")
    print("|" + "---|" * 9)
    for criterion in CRITERIA:
        recipe = Recipe(criterion=criterion, protect_super_experts=False)
        for block, layer in measure_pruning(trial, recipe, progress_bar).items():
            for own in layer.probes:
                error, rate = own.error, own.divergence / float(own.error.rerouted)
                print(
                    f"| {criterion} | {block} | {own.pruned} | {100 * error.gate2_lost:.1f} % "
                    f"| {100 * error.dropped:.1f} % | {100 * error.rerouted:.1f} % | {own.rerouting_ratio:.2f} "
                    f"| {own.divergence:.4f} | {rate / rounding[block]:.1f} |"
                )


def prepare(name: str, calibration: Path) -> Trial:
    checkpoint = require_original(open_checkpoint(name))
    tokenizer = load_tokenizer(checkpoint.path)
    tokens = chunks(tokenizer.encode(read_text(calibration).content), bos_token_id=tokenizer.bos_token_id)
    calibrated = split_calibration(tokens, 64, 8)
    model = load_model(checkpoint)
    return Trial(model, probe(model, calibrated.held_out), calibrate(model, calibrated.chunks, progress=progress_bar))


def rounding_rates(trial: Trial) -> Mapping[int, float]:
    """KL of every layer's down projections rounded, over the format's error."""
    config = trial.model.config
    everyone = tuple(range(config.n_routed_experts))
    rounded = {
        "gate": (KEEP,) * len(everyone),
        "up": (KEEP,) * len(everyone),
        "down": (ROUNDED.name,) * len(everyone),
    }
    untouched = [BlockPlan() for _ in range(config.num_blocks)]
    (error,) = gaussian_errors([ROUNDED])
    rates = {}
    for block in moe_blocks(trial.model):
        changed = BlockPlan({}, everyone, rounded, config.num_experts_per_tok)
        plan = Plan(KEEP, KEEP, (*untouched[:block], changed, *untouched[block + 1 :]))
        rates[block] = float(np.float64(trial.divergence(plan)) / error)
    return rates


if __name__ == "__main__":
    main()
