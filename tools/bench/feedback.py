"""What error feedback is worth: one width for all experts, nothing pruned, rounded without it, with it between columns,
and, where outputs are hidden states, between rows too.

    python tools/bench/feedback.py CHECKPOINT --calibration calibration.txt --text heldout.txt [--chunks 48]
           [--widths ternaryg128 int2g128 int3g128 int4g128]

Other matrices take 4 bits, embedding and head 6. Calibrated on 128 chunks spread over one text, evaluated on as many
as `--chunks` says of the other; bytes are those of the arrays.
"""

import argparse
import time
from itertools import product
from pathlib import Path

import jax
import numpy as np

from moejax.calibrate import calibrate, output_weights, weighing_outputs
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.evaluate.divergence import evaluate
from moejax.evaluate.text import chunks, read_text
from moejax.formats import ExpertWeights, payload_bytes
from moejax.model import DeepseekV3, named_leaves
from moejax.model.moe import MoE
from moejax.planning import BlockPlan, Plan
from moejax.planning.plan import PROJECTIONS
from moejax.tokenizer import Tokenizer, load_tokenizer
from moejax.transforms.compress import compress

CALIBRATION_CHUNKS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=48)
    parser.add_argument("--widths", nargs="+", default=["ternaryg128", "int2g128", "int3g128", "int4g128"])
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.checkpoint)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint.path)
    held_out = spread(arguments.text, tokenizer, arguments.chunks)
    calibrated = spread(arguments.calibration, tokenizer, CALIBRATION_CHUNKS)
    statistics = calibrate(model, calibrated, hessians=True)
    started = time.monotonic()
    weighed = weighing_outputs(statistics, output_weights(model, calibrated))
    print(f"outputs weighed in {time.monotonic() - started:.0f} s\n")
    print("| experts | bytes | error feedback | KL mean | KL 99.9 % | equal top-1 | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    ways = {"no": statistics.without_hessians(), "columns": statistics, "columns and rows": weighed}
    for width, (way, own) in product(arguments.widths, ways.items()):
        started = time.monotonic()
        rounded = compress(model, uniform(model, width), own)
        jax.block_until_ready(rounded)
        seconds = time.monotonic() - started
        found = evaluate(rounded, held_out, model)
        size = f"{payload_bytes(rounded):,}"
        print(
            f"| {width} | {size} | {way} | {found.kld_mean:.4f} | {found.kld_p999:.3f} | {found.same_top1:.1f} % "
            f"| {seconds:.0f} |",
            flush=True,
        )


def spread(text: Path, tokenizer: Tokenizer, count: int) -> np.ndarray:
    """Chunks from all over a text."""
    rows = chunks(tokenizer.encode(read_text(text).content), bos_token_id=tokenizer.bos_token_id)
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]


def uniform(model: DeepseekV3, width: str) -> Plan:
    """Every expert in one format."""
    blocks = []
    for layer in [*model.layers, *(mtp.block for mtp in model.mtp)]:
        leaves = named_leaves(layer).items()
        matrices = [name for name, leaf in leaves if not isinstance(leaf, ExpertWeights) and leaf.ndim >= 2]
        formats = {name: "int4g128" for name in matrices if not name.endswith(".router")}
        if isinstance(layer.mlp, MoE):
            count = layer.mlp.num_experts
            experts = {projection: (width,) * count for projection in PROJECTIONS}
            blocks.append(BlockPlan(formats, tuple(range(count)), experts, layer.mlp.experts_per_token))
        else:
            blocks.append(BlockPlan(formats))
    return Plan("int6g128", "int6g128", tuple(blocks))


if __name__ == "__main__":
    main()
