"""A Hugging Face `deepseek_v3` checkpoint as the model's leaves: names mapped, FP8 kept, kv_b split.

Every tensor is accounted for: an unknown, missing or misshapen one is an error that names it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moejax.checkpoint.safetensors_folder import SafetensorsFolder, TensorInfo, open_folder, read_config_json
from moejax.errors import InputError
from moejax.formats import ExpertWeights, Fp8Blocks, Leaf
from moejax.model.config import Config, config_from_hf
from moejax.model.leaves import Layout, Weight

_ATTENTION = {
    "q": "q_proj",
    "q_a": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b": "q_b_proj",
    "kv_a": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "k_b": "kv_b_proj",
    "v_b": "kv_b_proj",
    "o": "o_proj",
}
_BLOCK = {
    "input_norm": "input_layernorm.weight",
    "post_attention_norm": "post_attention_layernorm.weight",
    "mlp.router": "mlp.gate.weight",
    "mlp.bias": "mlp.gate.e_score_correction_bias",
    **{f"self_attn.{ours}": f"self_attn.{theirs}.weight" for ours, theirs in _ATTENTION.items()},
    **{f"mlp.{name}": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    **{f"mlp.shared.{name}": f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")},
    **{f"mlp.experts.{name}": f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")},
}
_TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
_MTP = {
    "enorm": "enorm.weight",
    "hnorm": "hnorm.weight",
    "eh_proj": "eh_proj.weight",
    "norm": "shared_head.norm.weight",
}
# An MTP block's own copies of embedding and head.
_MTP_COPIES = {"embed_tokens.weight": "embed", "shared_head.head.weight": "head"}
# Leaves that no tensor holds: they are functions of the config.
_DERIVED = ("mlp.group_id", "mlp.routing_scale")
_SCALE = "_scale_inv"
_DENSE_DTYPES = tuple(np.dtype(dtype) for dtype in (ml_dtypes.bfloat16, np.float16, np.float32))


def hf_name(name: str, config: Config) -> str | None:
    """The Hugging Face tensor behind a leaf, None if there is none; experts' names have a `{}` for the expert."""
    if name.endswith(_DERIVED):
        return None
    if name in _TOP:
        return _TOP[name]
    kind, index, rest = name.split(".", 2)
    if kind == "layers":
        return f"model.layers.{index}.{_BLOCK[rest]}"
    prefix = f"model.layers.{config.num_hidden_layers + int(index)}"
    return f"{prefix}.{_BLOCK[rest.removeprefix('block.')] if rest.startswith('block.') else _MTP[rest]}"


@dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """An opened and checked checkpoint; `leaf` reads one weight of the model."""

    path: Path
    raw_config: dict[str, Any]
    config: Config
    folder: SafetensorsFolder

    @property
    def experts_per_token(self) -> tuple[int, ...]:
        """K of every block: the config's."""
        return (self.config.num_experts_per_tok,) * self.config.num_blocks

    @property
    def num_elements(self) -> int:
        """Every element of the checkpoint except FP8 scales, MTP blocks included."""
        tensors = self.folder.tensors
        return sum(math.prod(info.shape) for name, info in tensors.items() if not name.endswith(_SCALE))

    def leaf(self, name: str) -> Weight:
        """The weight that `Layout` calls `name`. Raises InputError if a value in it is not finite."""
        if name.endswith(_DERIVED):
            return self._derived(name)
        tensor = _required(hf_name(name, self.config))
        if "{}" in tensor:
            return self._experts(tensor)
        if tensor.endswith("kv_b_proj.weight"):
            return self._split_kv_b(tensor, is_key=name.endswith("k_b"))
        return self._read(tensor)

    def _derived(self, name: str) -> jax.Array:
        if name.endswith("routing_scale"):
            return jnp.ones((), jnp.float32)
        experts, groups = self.config.n_routed_experts, self.config.n_group
        return jnp.arange(experts, dtype=jnp.int32) // (experts // groups)

    def _read(self, tensor: str) -> Leaf:
        values = self._finite(tensor)
        if values.dtype != ml_dtypes.float8_e4m3fn:
            return jnp.asarray(values)
        return Fp8Blocks(jnp.asarray(values), jnp.asarray(self._finite(tensor + _SCALE)), self._block())

    def _experts(self, tensor: str) -> ExpertWeights:
        leaves = [self._read(tensor.format(e)) for e in range(self.config.n_routed_experts)]
        bucket = jax.tree.map(lambda *arrays: jnp.stack(arrays), *leaves)
        slots = jnp.arange(len(leaves), dtype=jnp.int32)
        return ExpertWeights((bucket,), jnp.zeros_like(slots), slots)

    def _split_kv_b(self, tensor: str, is_key: bool) -> Leaf:
        """k_b (H, N, L) or v_b (H, V, L) of kv_b_proj (H*(N+V), L), FP8 scales following their rows exactly."""
        c = self.config
        first, width = (0, c.qk_nope_head_dim) if is_key else (c.qk_nope_head_dim, c.v_head_dim)
        values = self._finite(tensor)
        per_head = values.reshape(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, -1)
        part = jnp.asarray(per_head[:, first : first + width])
        if values.dtype != ml_dtypes.float8_e4m3fn:
            return part
        block_rows, block_inputs = self._block()
        step = math.gcd(block_rows, c.qk_nope_head_dim, c.v_head_dim)
        rows = np.arange(values.shape[0]).reshape(per_head.shape[:2])[:, first : first + width : step]
        scale = self._finite(tensor + _SCALE)[rows // block_rows]
        return Fp8Blocks(part, jnp.asarray(scale), (step, block_inputs))

    def _block(self) -> tuple[int, int]:
        return _fp8_block(self.raw_config, self.path)

    def _finite(self, tensor: str) -> np.ndarray:
        values = self.folder.read(tensor)
        if not _all_finite(values):
            raise InputError(f"{self.folder.tensors[tensor].file}: the tensor {tensor} holds a NaN or an infinity")
        return values


def open_huggingface(path: Path) -> HuggingFaceCheckpoint:
    """Open a folder and check its tensors' names, shapes and dtypes against its config, and MTP blocks' copies.

    Other tensors are not read. Raises InputError naming the tensor, the file or the config's field that is wrong.
    """
    raw_config = read_config_json(path)
    config = config_from_hf(raw_config, str(path / "config.json"))
    folder = open_folder(path)
    _check_tensors(folder, config, raw_config, path)
    _check_experts(folder, config)
    checkpoint = HuggingFaceCheckpoint(path, raw_config, config, folder)
    _check_mtp_copies(checkpoint)
    return checkpoint


def expected_tensors(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight that a checkpoint of this config holds, FP8 scales apart."""
    for name, shape in Layout(config).shapes().items():
        tensor = hf_name(name, config)
        if tensor is None or name.endswith("k_b"):
            continue
        if name.endswith("v_b"):
            heads, latent = shape[0], shape[2]
            yield tensor, (heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
        elif "{}" in tensor:
            yield from ((tensor.format(e), shape[1:]) for e in range(shape[0]))
        else:
            yield tensor, shape
    for layer in range(config.num_hidden_layers, config.num_blocks):
        shape = (config.vocab_size, config.hidden_size)
        yield from ((f"model.layers.{layer}.{copy}", shape) for copy in _MTP_COPIES)


def _check_tensors(folder: SafetensorsFolder, config: Config, raw_config: dict[str, Any], path: Path) -> None:
    expected = dict(expected_tensors(config))
    for name, shape in list(expected.items()):
        info = folder.tensors.get(name)
        if info is None:
            raise InputError(f"{path}: the tensor {name} is missing; the config asks for it")
        if info.shape != shape:
            raise InputError(f"{info.file}: the tensor {name} has shape {info.shape}; the config asks for {shape}")
        _check_dtype(name, info)
        if info.dtype == ml_dtypes.float8_e4m3fn:
            block = _fp8_block(raw_config, path)
            expected[name + _SCALE] = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    for name, info in folder.tensors.items():
        if name not in expected:
            raise InputError(f"{info.file}: the tensor {name} is none of a deepseek_v3 model with this config")
        if info.shape != expected[name]:
            raise InputError(f"{info.file}: the tensor {name} has shape {info.shape}; {expected[name]} is accepted")
        if name.endswith(_SCALE) and info.dtype != np.float32:
            raise InputError(f"{info.file}: the tensor {name} has dtype {info.dtype}; float32 is accepted")
    if scale := next((name for name in expected if name not in folder.tensors), None):
        raise InputError(f"{path}: the tensor {scale} is missing; its FP8 weight needs it")


def _check_dtype(name: str, info: TensorInfo) -> None:
    is_linear = len(info.shape) == 2 and not name.endswith("mlp.gate.weight")
    if info.dtype in _DENSE_DTYPES or (is_linear and info.dtype == ml_dtypes.float8_e4m3fn):
        return
    accepted = ", ".join(map(str, _DENSE_DTYPES)) + (" and float8_e4m3fn" if is_linear else "")
    raise InputError(f"{info.file}: the tensor {name} has dtype {info.dtype}; accepted are {accepted}")


def _check_experts(folder: SafetensorsFolder, config: Config) -> None:
    for name in Layout(config).shapes():
        tensor = hf_name(name, config)
        if tensor is None or "{}" not in tensor:
            continue
        first, *others = (tensor.format(e) for e in range(config.n_routed_experts))
        for other in others:
            own, wanted = folder.tensors[other], folder.tensors[first].dtype
            if own.dtype != wanted:
                raise InputError(
                    f"{own.file}: the tensor {other} has dtype {own.dtype}; {wanted} is needed, as {first} has"
                )


def _check_mtp_copies(checkpoint: HuggingFaceCheckpoint) -> None:
    config, folder = checkpoint.config, checkpoint.folder
    for layer in range(config.num_hidden_layers, config.num_blocks):
        for copy, original in _MTP_COPIES.items():
            name = f"model.layers.{layer}.{copy}"
            if not np.array_equal(_bits(folder.read(name)), _bits(folder.read(_TOP[original]))):
                file = folder.tensors[name].file
                raise InputError(f"{file}: the tensor {name} differs from {_TOP[original]}, which an MTP block shares")


def _fp8_block(raw_config: dict[str, Any], path: Path) -> tuple[int, int]:
    quantization = raw_config.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise InputError(
            f"{path / 'config.json'}: quantization_config.weight_block_size is {block!r}; "
            "FP8 weights need two positive integers, such as [128, 128]"
        )
    return block[0], block[1]


def _required(name: str | None) -> str:
    assert name is not None
    return name


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8)


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype == ml_dtypes.float8_e4m3fn:
        return not np.any((values.view(np.uint8) & 0x7F) == 0x7F)
    if values.dtype == ml_dtypes.bfloat16:
        return not np.any((values.view(np.uint16) & 0x7F80) == 0x7F80)
    return bool(np.all(np.isfinite(values)))
