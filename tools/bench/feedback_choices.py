"""What choices of error feedback are worth: zero points, the order of columns, and how much Hessians are damped.

usage: python tools/bench/feedback_choices.py CHECKPOINT --calibration FILE

Of the matrices of two layers (of the routed experts the first four), in groups of 128; means are geometric.

Zero points: every group of every output gets a shift z of full precision, for nothing: W = Q + z, with z the joint
optimum (W - Q) H B^T (B H B^T)^-1 for the codes found, B the groups' indicators, and codes found again for W - z; the
best of five rounds. So it is more than a stored zero point could bring.

Order: the error with columns rounded by the Hessian's diagonal, of that with columns as they stand.

Damping: the error at 2 bits with multiples of what `damping_for` says, after 64 chunks of calibration and after 2,
measured on 64 chunks that neither saw; and with the multiple that was best for the matrix on 16 others.

Shared Hessians: the error at 2 bits of experts' gate and up that have their layer's, damped as suits all of the layer's
tokens, of that damped as suits the expert's own.
"""

import argparse
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import Inputs, Statistics, calibrate
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.evaluate.text import chunks, read_text
from moejax.formats import ExpertWeights, IntFormat, TernaryFormat
from moejax.model import DeepseekV3, named_leaves
from moejax.tokenizer import load_tokenizer
from moejax.transforms.error_feedback import quantize_with_feedback
from moejax.transforms.hessian import damping_for
from moejax.transforms.rounding import round_weight, to_float32

LAYERS, EXPERTS, GROUP = (0, 2), 4, 128
FORMATS = (IntFormat(1, GROUP), TernaryFormat(GROUP), IntFormat(2, GROUP), IntFormat(3, GROUP), IntFormat(4, GROUP))
ROUNDS = 5
MULTIPLES = (0.1, 0.3, 1.0, 3.0, 10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--calibration", type=Path, required=True)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.checkpoint)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint.path)
    rows = chunks(tokenizer.encode(read_text(options.calibration).content), bos_token_id=tokenizer.bos_token_id)
    rows = np.random.RandomState(0).permutation(rows)
    ample, short, choosing, measuring = (
        calibrate(model, own, hessians=True) for own in (rows[:64], rows[:2], rows[64:80], rows[80:144])
    )
    print_zero_points(model, ample)
    print_order(model, ample)
    for label, calibrated in (("64 chunks", ample), ("2 chunks", short)):
        print_damping(label, model, calibrated, choosing, measuring)
    for several in (2, 9, 32):
        shared = calibrate(model, rows[:several], hessians=True, expert_bytes=0)
        print_shared(f"{several} chunks", model, shared, measuring)


def matrices(model: DeepseekV3, *several: Statistics) -> Iterator[tuple[jax.Array, list[Inputs]]]:
    """Matrices (O, I) whose rows groups fill, and what each of the statistics says of their inputs."""
    for i in LAYERS:
        blocks = [statistics.blocks[i] for statistics in several]
        for name, leaf in named_leaves(model.layers[i]).items():
            if len(leaf.shape) < 2 or leaf.shape[-1] % GROUP or name.endswith("router"):
                continue
            if not isinstance(leaf, ExpertWeights):
                yield to_float32(leaf).reshape(-1, leaf.shape[-1]), [block.inputs(name) for block in blocks]
                continue
            experts, projection = [block.experts for block in blocks], name.rsplit(".", 1)[1]
            for e in range(EXPERTS):
                yield to_float32(leaf.expert(e)), [own.inputs(projection, e) for own in experts if own is not None]


def print_zero_points(model: DeepseekV3, statistics: Statistics) -> None:
    print("| format | error without zero points, of that with | least | most |\n|---|---|---|---|")
    cases = list(matrices(model, statistics))
    for to in FORMATS:
        ratios = np.asarray([gain(weight, inputs, to) for weight, (inputs,) in cases])
        print(f"| {to.name} | {mean(ratios):.3f} | {ratios.min():.3f} | {ratios.max():.3f} |", flush=True)


def gain(weight_OI: jax.Array, inputs: Inputs, to: IntFormat | TernaryFormat) -> float:
    """The error without zero points over the least with them."""
    errors: list[float] = []
    shift_OI = jnp.zeros_like(weight_OI)
    for _ in range(ROUNDS):
        left_OI = weight_OI - to_float32(round_weight(weight_OI - shift_OI, inputs, to))
        if not errors:
            errors.append(error(left_OI, inputs))
        shift_OI = best_shift(left_OI, inputs.hessian)
        errors.append(error(left_OI - shift_OI, inputs))
    return errors[0] / min(errors)


@jax.jit
def best_shift(error_OI: jax.Array, hessian_II: jax.Array) -> jax.Array:
    """The shifts, one a group and output, that leave least of an error."""
    groups = error_OI.shape[1] // GROUP
    passed_ON = (error_OI @ hessian_II).reshape(len(error_OI), groups, GROUP).sum(axis=2)
    between_NN = hessian_II.reshape(groups, GROUP, groups, GROUP).sum(axis=(1, 3))
    shift_ON = jnp.linalg.solve(between_NN + 1e-6 * jnp.trace(between_NN) * jnp.eye(groups), passed_ON.T).T
    return jnp.repeat(shift_ON, GROUP, axis=1)


def print_order(model: DeepseekV3, statistics: Statistics) -> None:
    """Errors by the diagonal, relative to those in natural order."""
    print("\n| format | error by the diagonal, of that in natural order | least | most |\n|---|---|---|---|")
    cases = list(matrices(model, statistics))
    for to in FORMATS:
        ratios = []
        for weight, (inputs,) in cases:
            assert inputs.hessian is not None
            damping = damping_for(inputs.tokens, weight.shape[-1])
            own = partial(quantize_with_feedback, weight, inputs.hessian, to, damping)
            rounded = own(column_order="diagonal"), own(column_order="natural")
            by_diagonal, natural = (error(weight - to_float32(each), inputs) for each in rounded)
            ratios.append(by_diagonal / natural)
        print(f"| {to.name} | {mean(np.asarray(ratios)):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |", flush=True)


def print_damping(
    label: str, model: DeepseekV3, calibrated: Statistics, choosing: Statistics, measuring: Statistics
) -> None:
    """Errors relative to those with the rule's damping, by multiple, and with each matrix's own choice."""
    chosen, measured = [], []
    for weight, (inputs, *held_out) in matrices(model, calibrated, choosing, measuring):
        assert inputs.hessian is not None
        own = damping_for(inputs.tokens, weight.shape[-1])
        rounded = [quantize_with_feedback(weight, inputs.hessian, FORMATS[2], m * own) for m in MULTIPLES]
        errors = [[error(weight - to_float32(each), some) for each in rounded] for some in held_out]
        chosen.append(int(np.argmin(errors[0])))
        measured.append(np.asarray(errors[1]) / errors[1][MULTIPLES.index(1.0)])
    relative = np.asarray(measured)
    cells = [f"{m:g}x {mean(relative[:, k]):.3f}" for k, m in enumerate(MULTIPLES)]
    own_choice = mean(relative[np.arange(len(chosen)), chosen])
    print(f"\nDamping after {label}: {', '.join(cells)}; chosen by matrix {own_choice:.3f}", flush=True)


def print_shared(label: str, model: DeepseekV3, shared: Statistics, measuring: Statistics) -> None:
    ratios = []
    for i in LAYERS:
        sums, held_out = shared.blocks[i].experts, measuring.blocks[i].experts
        if sums is None or held_out is None:
            continue
        for projection, e in itertools.product(("gate", "up"), range(EXPERTS)):
            weight = to_float32(named_leaves(model.layers[i])[f"mlp.experts.{projection}"].expert(e))
            inputs, own = sums.inputs(projection, e), float(sums.count_E[e]) + weight.shape[-1]
            by_layer, by_own = (
                error(weight - to_float32(round_weight(weight, each, FORMATS[2])), held_out.inputs(projection, e))
                for each in (inputs, inputs._replace(tokens=own))
            )
            ratios.append(by_layer / by_own)
    print(f"\nShared Hessians after {label}: damped by all tokens {mean(np.asarray(ratios)):.3f}", flush=True)


def mean(ratios: np.ndarray) -> float:
    return float(np.exp(np.mean(np.log(ratios))))


def error(error_OI: jax.Array, inputs: Inputs) -> float:
    """E|error x|^2."""
    return float(_error(error_OI, inputs.hessian))


_error = jax.jit(lambda error_OI, hessian_II: jnp.sum((error_OI @ hessian_II) * error_OI))


if __name__ == "__main__":
    main()
