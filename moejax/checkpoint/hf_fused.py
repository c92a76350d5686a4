"""Experts that lie fused in one tensor, as transformers 5 holds them in memory and can write them.

    model.layers.N.mlp.experts.gate_up_proj  (E, 2F, D), every expert's gate rows before its up rows
    model.layers.N.mlp.experts.down_proj     (E, D, F)

An expert's matrix is a range of such a tensor's bytes, so nothing is read or copied: the ranges get the names that the
matrices have where each is a tensor of its own.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from moejax.checkpoint.hf_config import DENSE_DTYPES
from moejax.checkpoint.safetensors_folder import TensorInfo
from moejax.errors import InputError
from moejax.model.config import Config

_FUSED = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj")
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.\d+\.(gate|up|down)_proj\.weight")


def fused_name(name: str) -> str | None:
    """The fused tensor that an expert's matrix would lie in; None for other tensors."""
    found = _EXPERT.fullmatch(name)
    return f"{found[1]}.{'down' if found[2] == 'down' else 'gate_up'}_proj" if found else None


def unfused(tensors: Mapping[str, TensorInfo], config: Config) -> dict[str, TensorInfo]:
    """The tensors with every fused one as its experts' matrices.

    Raises InputError naming a fused tensor whose shape is not the config's, that is not in one of `DENSE_DTYPES`, or
    that stands beside a matrix of its own.
    """
    result: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        parts = dict(_experts(name, info, config)) if _FUSED.fullmatch(name) else {name: info}
        if twice := next((part for part in parts if part != name and part in tensors), None):
            raise InputError(
                f"{info.file}: the tensor {name} holds {twice}, which is there too; one of them is accepted"
            )
        result |= parts
    return result


def _experts(name: str, info: TensorInfo, config: Config) -> Iterator[tuple[str, TensorInfo]]:
    E, F, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    prefix, _, kind = name.rpartition(".")
    shape = (E, 2 * F, D) if kind == "gate_up_proj" else (E, D, F)
    if info.shape != shape:
        raise InputError(f"{info.file}: the tensor {name} has shape {info.shape}; the config asks for {shape}")
    if info.dtype.name not in DENSE_DTYPES:
        accepted = ", ".join(DENSE_DTYPES)
        raise InputError(
            f"{info.file}: the tensor {name} has dtype {info.dtype}; fused experts are accepted in {accepted}"
        )
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    size = info.nbytes // (E * len(parts))
    for e in range(E):
        for p, part in enumerate(parts):
            offset = info.offset + (e * len(parts) + p) * size
            own = replace(info, shape=(F, D) if kind == "gate_up_proj" else (D, F), offset=offset)
            yield f"{prefix}.{e}.{part}.weight", own
