"""A checkpoint, compressed or not, as a Hugging Face folder that a `deepseek_v3` loader reads.

Such a folder's config has one number of experts, one K and one routing scale for all layers, and routing groups that
are contiguous and of one size. What it cannot say is refused before a byte is written.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.atomic import atomic_folder
from moejax.checkpoint.hf_config import linear_block
from moejax.checkpoint.hf_tensors import Block, Convert, as_it_is, hf_tensors
from moejax.checkpoint.load import Checkpoint
from moejax.checkpoint.safetensors_folder import CONFIG_FILE
from moejax.checkpoint.safetensors_writer import write_shards
from moejax.checkpoint.store import folder_bytes, payload_bytes
from moejax.errors import InputError
from moejax.formats import Fp8Blocks, Leaf, dense
from moejax.kernels import hadamard
from moejax.model import Config, config_from_hf
from moejax.model.config import ROTATION_FIELDS
from moejax.model.leaves import Weight
from moejax.model.weights import block_name, row_of
from moejax.progress import Progress, silent

Dtype = Literal["bfloat16", "float32"]
# As Hugging Face's own writer does.
SHARD_BYTES = 5 * 10**9


def write_huggingface(
    checkpoint: Checkpoint,
    output: Path,
    dtype: Dtype | None = None,
    copied: Sequence[Path] = (),
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> int:
    """Write the model that the checkpoint holds as config and safetensors shards; returns the folder's bytes.

    Without `dtype` every weight keeps its bytes, FP8 blocks too. With it, every matrix but the routers is written in
    that dtype; routers, norms and biases stay as they are. A layer's routed output stays

        y_t = routing_scale * sum_k weight_tk * expert_e(t,k)(x_t)

    because a routing scale that all layers share multiplies `routed_scaling_factor`; where they differ, each multiplies
    its layer's `down` before that is rounded to `dtype`.

    A rotated model's weights carry the rotation of its residual stream, so that such a loader computes the same. Where
    its `down` takes rotated inputs, that rotation goes back into `down`, W = W' H^T / sqrt(F), which needs `dtype`.

    One projection of one layer is in memory at a time, in the checkpoint's format. `copied` files go along.

    Raises InputError, leaving nothing, for what such a folder cannot hold: integer formats without `dtype`; numbers of
    experts or K that differ by layer, groups of several sizes; routing scales that differ by layer, or rotated inputs
    of `down`, without `dtype`; MTP blocks of a rotated model. So it does where less is free than the tensors take.
    """
    _check_rotations(checkpoint.config, is_dequantized=dtype is not None)
    routing = _common_routing(checkpoint, is_dequantized=dtype is not None)
    raw_config = _raw_config(checkpoint, routing, dtype)
    config = config_from_hf(raw_config)
    block = linear_block(raw_config, CONFIG_FILE)
    convert = (
        as_it_is
        if dtype is None
        else partial(
            _converted,
            dtype=dtype,
            scales=routing.down_scales,
            is_down_rotated=checkpoint.config.down_input_transform is not None,
        )
    )
    abstract = _abstract_tensors(config, dict(checkpoint.abstract_leaves()), block, convert)
    size = payload_bytes(abstract) + sum(file.stat().st_size for file in copied)
    with atomic_folder(output, size) as folder:
        write_shards(folder, hf_tensors(config, checkpoint.leaf, block, convert), abstract, shard_bytes, progress)
        (folder / CONFIG_FILE).write_text(json.dumps(raw_config, indent=2) + "\n")
        for file in copied:
            (folder / file.name).write_bytes(file.read_bytes())
        return folder_bytes(folder)


def _check_rotations(config: Config, is_dequantized: bool) -> None:
    if config.residual_rotation and config.num_nextn_predict_layers:
        raise InputError(
            "the model is rotated and its MTP blocks undo the rotation, which a Hugging Face checkpoint has no weights "
            "for; compress --drop-mtp leaves them out"
        )
    if config.down_input_transform and not is_dequantized:
        raise InputError(
            "the inputs of the model's down projections are rotated, which a Hugging Face config cannot say; "
            "--dequantize bfloat16 puts the rotation back into their weights"
        )


@dataclass(frozen=True)
class _Routing:
    """What all layers share: config fields by name; and what multiplies each layer's `down`, by the weight's name."""

    fields: Mapping[str, Any]
    down_scales: Mapping[str, float]


def _common_routing(checkpoint: Checkpoint, is_dequantized: bool) -> _Routing:
    config, abstract = checkpoint.config, dict(checkpoint.abstract_leaves())
    moe_blocks = [block for block in range(config.num_blocks) if config.is_moe(block)]
    if not moe_blocks:
        return _Routing({}, {})
    layers = [block_name(block, config.num_hidden_layers) for block in moe_blocks]
    per_token = [checkpoint.experts_per_token[block] for block in moe_blocks]
    experts = _common(
        {layer: abstract[f"{layer}.mlp.bias"].shape[0] for layer in layers},
        "keeps {} experts",
        "share_kept = 0.75 in a recipe keeps the same number in every layer",
    )
    experts_per_token = _common(
        dict(zip(layers, per_token, strict=True)),
        "activates {} experts per token",
        f"experts_per_token = {min(per_token)} in a recipe is one number for all layers",
    )
    fields = {"n_routed_experts": experts, "num_experts_per_tok": experts_per_token}
    for layer in layers:
        _check_groups(layer, np.asarray(checkpoint.leaf(f"{layer}.mlp.group_id")), config.n_group)
    scales = {layer: float(checkpoint.leaf(f"{layer}.mlp.routing_scale")) for layer in layers}
    if is_dequantized and len(set(scales.values())) > 1:
        return _Routing(fields, {f"{layer}.mlp.experts.down": scale for layer, scale in scales.items()})
    scale = _common(
        scales,
        "has routing scale {:.4g}",
        "--dequantize bfloat16 multiplies weights by it, fit_routing_scale = false in a recipe leaves it 1",
    )
    return _Routing(fields | {"routed_scaling_factor": config.routed_scaling_factor * scale}, {})


def _common(values: Mapping[str, Any], says: str, option: str) -> Any:
    """The one value of all layers."""
    (first, wanted), *others = values.items()
    for layer, own in others:
        if own != wanted:
            raise InputError(
                f"{layer} {says.format(own)} and {first} {says.format(wanted).split(' ', 1)[1]}; "
                f"a Hugging Face config has one number for all layers: {option}"
            )
    return wanted


def _check_groups(layer: str, group_E: np.ndarray, n_group: int) -> None:
    counts = np.bincount(group_E, minlength=n_group)
    if len(set(counts.tolist())) > 1:
        raise InputError(
            f"{layer} keeps {', '.join(map(str, counts))} experts of its groups; a Hugging Face checkpoint's are of "
            'one size: groups = "equal" in a recipe makes them so'
        )
    if np.any(np.diff(group_E) < 0):
        raise InputError(f"{layer} has its experts out of the order of their groups; ascending ones are accepted")


def _raw_config(checkpoint: Checkpoint, routing: _Routing, dtype: Dtype | None) -> dict[str, Any]:
    """The checkpoint's config with only those fields changed that must be: without FP8, no `quantization_config`."""
    config = checkpoint.config
    raw = {name: value for name, value in checkpoint.raw_config.items() if name not in ROTATION_FIELDS}
    changed = {name: value for name, value in routing.fields.items() if value != getattr(config, name)}
    if dtype is not None or not _has_fp8(checkpoint):
        raw.pop("quantization_config", None)
    return raw | changed | ({} if dtype is None else {"dtype" if "dtype" in raw else "torch_dtype": dtype})


def _has_fp8(checkpoint: Checkpoint) -> bool:
    leaves = jax.tree.leaves(dict(checkpoint.abstract_leaves()), is_leaf=lambda leaf: isinstance(leaf, Fp8Blocks))
    return any(isinstance(leaf, Fp8Blocks) for leaf in leaves)


def _abstract_tensors(
    config: Config, leaves: Mapping[str, Weight], block: Block | None, convert: Convert
) -> dict[str, jax.ShapeDtypeStruct]:
    """Every tensor in shapes alone, in the order of `hf_tensors`, which refuses what it cannot write."""
    names: list[str] = []

    def arrays(own: Mapping[str, Weight]) -> list[Any]:
        tensors = dict(hf_tensors(config, own.__getitem__, block, convert))
        names.extend(tensors)
        return list(tensors.values())

    shapes = jax.eval_shape(arrays, leaves)
    return dict(zip(names, shapes, strict=True))


def _converted(name: str, leaf: Leaf, *, dtype: Dtype, scales: Mapping[str, float], is_down_rotated: bool) -> Leaf:
    """A matrix, routers apart, in `dtype`."""
    row = row_of(name)
    if not row.is_matrix or row.role == "router":
        return leaf
    return _dequantized(leaf, scales.get(name, 1.0), dtype, is_down_rotated and row.takes_product)


@partial(jax.jit, static_argnames=("dtype", "is_rotated"))
def _dequantized(leaf: Leaf, scale: float, dtype: Dtype, is_rotated: bool) -> jax.Array:
    """The dense weight times `scale`; where its inputs are rotated, for inputs that are not."""
    weight = dense(leaf, jnp.float32)
    return ((hadamard(weight, inverse=True) if is_rotated else weight) * scale).astype(dtype)
