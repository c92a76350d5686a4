"""What error feedback is worth: one width for all experts, nothing pruned, rounded with it and without.

    python tools/bench/feedback.py CHECKPOINT --calibration calibration.txt --text heldout.txt [--chunks 48]

Other matrices take 4 bits, embedding and head 6. Calibrated on 128 chunks spread over one text, evaluated on as many
as `--chunks` says of the other; bytes are those of the arrays.
"""

import argparse
from pathlib import Path

import numpy as np

from moejax.calibrate import calibrate
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

WIDTHS = ("ternaryg128", "int2g128", "int3g128", "int4g128")
CALIBRATION_CHUNKS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=48)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.checkpoint)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint.path)
    held_out = spread(arguments.text, tokenizer, arguments.chunks)
    statistics = calibrate(model, spread(arguments.calibration, tokenizer, CALIBRATION_CHUNKS), hessians=True)
    print("| experts | bytes | error feedback | KL mean | KL 99.9 % | equal top-1 |\n|---|---|---|---|---|---|")
    for width in WIDTHS:
        for way, own in (("no", statistics.without_hessians()), ("yes", statistics)):
            rounded = compress(model, uniform(model, width), own)
            found = evaluate(rounded, held_out, model)
            size = f"{payload_bytes(rounded):,}"
            print(
                f"| {width} | {size} | {way} | {found.kld_mean:.4f} | {found.kld_p999:.3f} | {found.same_top1:.1f} % |",
                flush=True,
            )


def spread(text: Path, tokenizer: Tokenizer, count: int) -> np.ndarray:
    """Chunks from all over a text."""
    rows = chunks(tokenizer.encode(read_text(text).content), bos_token_id=tokenizer.bos_token_id)
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]


def uniform(model: DeepseekV3, width: str) -> Plan:
    """Every expert in one format."""
    blocks = []
    for layer in model.layers:
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
