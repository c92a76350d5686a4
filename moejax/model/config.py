"""The model's config: Hugging Face's fields, validated, in a frozen dataclass."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from moejax.errors import InputError

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
# What the model computes only one way; a config that asks for another is refused.
_FIXED = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Yarn:
    """YaRN's rope scaling (arXiv:2309.00071), with Hugging Face's names and defaults."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @property
    def rotary_scale(self) -> float:
        """What cos and sin are multiplied by: m(mscale) / m(mscale_all_dim), or m(1) if either is absent."""
        if self.mscale and self.mscale_all_dim:
            return _magnitude(self.factor, self.mscale) / _magnitude(self.factor, self.mscale_all_dim)
        return _magnitude(self.factor, 1.0)

    @property
    def softmax_scale(self) -> float:
        """What the softmax scale (N+R)^-1/2 is multiplied by: m(mscale_all_dim)^2."""
        return _magnitude(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class Config:
    """Field names are Hugging Face's (`DeepseekV3Config`)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    first_k_dense_replace: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_interleave: bool
    yarn: Yarn | None
    num_nextn_predict_layers: int

    @property
    def softmax_scale(self) -> float:
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        return scale * (self.yarn.softmax_scale if self.yarn else 1.0)

    @property
    def num_blocks(self) -> int:
        """Decoder layers and MTP blocks."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_moe(self, layer: int) -> bool:
        """Whether that layer (MTP blocks count on behind the last) has routed experts."""
        return layer >= self.first_k_dense_replace


_DEFAULTS: dict[str, Any] = {"rope_interleave": True, "num_nextn_predict_layers": 0, "rope_theta": 10000.0}
_POSITIVE = [f.name for f in fields(Config) if f.type in (int, float)]
_MAY_BE_ZERO = {"first_k_dense_replace", "num_nextn_predict_layers"}


def config_from_hf(raw: Mapping[str, Any], source: str = "config.json") -> Config:
    """Read a Hugging Face config. Raises InputError naming the field for whatever the model cannot compute."""
    if raw.get("model_type") not in MODEL_TYPES:
        raise InputError(f"{source}: model_type is {raw.get('model_type')!r}; accepted are {', '.join(MODEL_TYPES)}")
    for name, only in _FIXED.items():
        if raw.get(name, only) != only:
            raise InputError(f"{source}: {name} is {raw[name]!r}; only {only!r} is supported")
    # transformers 5 writes rope_theta and rope_scaling as one dictionary.
    rope = raw.get("rope_parameters") or {}
    values = {**_DEFAULTS, **{k: rope[k] for k in ("rope_theta",) if k in rope}, **raw}
    values["yarn"] = _yarn(raw.get("rope_scaling") or rope, source)
    names = [f.name for f in fields(Config)]
    if missing := [name for name in names if name not in values]:
        raise InputError(f"{source}: the field {missing[0]} is missing")
    config = Config(**{name: values[name] for name in names})
    _validate(config, source)
    return config


def _yarn(rope: Mapping[str, Any], source: str) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise InputError(f"{source}: rope scaling of type {kind!r}; accepted are yarn and none")
    try:
        return Yarn(**{f.name: rope[f.name] for f in fields(Yarn) if f.name in rope})
    except TypeError:
        raise InputError(f"{source}: yarn needs factor and original_max_position_embeddings") from None


def _validate(config: Config, source: str) -> None:
    for name in _POSITIVE:
        value = getattr(config, name)
        if not isinstance(value, int | float) or value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
            raise InputError(f"{source}: {name} is {value!r}; it must be a positive number")
    per_group, rest = divmod(config.n_routed_experts, config.n_group)
    limits = {
        f"n_group {config.n_group} must divide n_routed_experts {config.n_routed_experts}": rest == 0,
        f"topk_group {config.topk_group} must be at most n_group {config.n_group}": config.topk_group <= config.n_group,
        f"with n_group {config.n_group} a group needs two experts": config.n_group == 1 or per_group >= 2,
        f"num_experts_per_tok {config.num_experts_per_tok} must be at most the {config.topk_group * per_group} experts "
        "of the chosen groups": config.num_experts_per_tok <= config.topk_group * per_group,
        f"qk_rope_head_dim {config.qk_rope_head_dim} must be even": config.qk_rope_head_dim % 2 == 0,
        f"first_k_dense_replace {config.first_k_dense_replace} must be at most num_hidden_layers "
        f"{config.num_hidden_layers}": config.first_k_dense_replace <= config.num_hidden_layers,
    }
    for message, holds in limits.items():
        if not holds:
            raise InputError(f"{source}: {message}")
