"""The model's config: Hugging Face's fields, validated, in a frozen dataclass."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

from moejax.errors import InputError, brief

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
# What the model computes only one way; a config that asks for another is refused.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_FIXED_YARN: dict[str, Any] = {"attention_factor": None, "truncate": True}


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
    """Field names are Hugging Face's (`DeepseekV3Config`), but for the last two, which only `rotate` sets.

    residual_rotation: the residual stream is x R with R = diag(signs) H / sqrt(D) where an original's is x. MTP blocks
    undo it where a gain stands in its way; elsewhere the weights carry it.
    down_input_transform: every `down` takes hidden H / sqrt(F) where an original's takes hidden.
    """

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
    residual_rotation: str | None
    down_input_transform: str | None

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


# Fields that Hugging Face's configs lack, and what they may say beside null.
ROTATION_FIELDS = ("residual_rotation", "down_input_transform")
_ROTATIONS = ("hadamard",)
_DEFAULTS: dict[str, Any] = {
    "rope_interleave": True,
    "num_nextn_predict_layers": 0,
    "rope_theta": 10000.0,
    **dict.fromkeys(ROTATION_FIELDS),
}
_MAY_BE_ZERO = {"first_k_dense_replace", "num_nextn_predict_layers", "mscale", "mscale_all_dim"}
_WANTED: dict[Any, str] = {
    bool: "true or false",
    int: "a positive integer",
    int | None: "a positive integer or null",
    float: "a positive number",
    float | None: "a positive number or null",
}


# The largest values accepted, about ten times those of any published model, so that work and memory asked for by a
# config are bounded before a file of weights has confirmed it.
_LARGEST: dict[str, float] = {
    "vocab_size": 4_000_000,
    "hidden_size": 131_072,
    "intermediate_size": 524_288,
    "moe_intermediate_size": 131_072,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 2_048,
    "n_routed_experts": 8_192,
    "n_shared_experts": 64,
    "num_experts_per_tok": 256,
    "n_group": 4_096,
    "topk_group": 4_096,
    "routed_scaling_factor": 1_000,
    "first_k_dense_replace": 1_000,
    "q_lora_rank": 32_768,
    "kv_lora_rank": 32_768,
    "qk_nope_head_dim": 4_096,
    "qk_rope_head_dim": 4_096,
    "v_head_dim": 4_096,
    "max_position_embeddings": 100_000_000,
    "rms_norm_eps": 1,
    "rope_theta": 10_000_000_000,
    "num_nextn_predict_layers": 16,
    "factor": 10_000,
    "original_max_position_embeddings": 100_000_000,
    "beta_fast": 10_000,
    "beta_slow": 10_000,
    "mscale": 1_000,
    "mscale_all_dim": 1_000,
}
# The smallest of positive numbers that are not whole, where nearer to zero the model's own numbers overflow.
_SMALLEST: dict[str, float] = {
    "routed_scaling_factor": 1e-3,
    "rms_norm_eps": 1e-20,
    "rope_theta": 1.001,
    "factor": 1,
    "beta_fast": 1e-3,
    "beta_slow": 1e-3,
}


def config_from_hf(raw: Mapping[str, Any], source: str = "config.json") -> Config:
    """Read a Hugging Face config.

    Raises InputError naming the field for whatever the model cannot compute, and for sizes far beyond those of any
    published model (`_LARGEST`).
    """
    if raw.get("model_type") not in MODEL_TYPES:
        found, accepted = brief(raw.get("model_type")), ", ".join(MODEL_TYPES)
        raise InputError(f"{source}: model_type is {found}; accepted are {accepted}")
    _check_fixed(raw, _FIXED, source)
    # transformers 5 writes rope_theta and rope_scaling as one dictionary.
    rope = _dictionary(raw, "rope_parameters", source)
    values = {**_DEFAULTS, **{name: rope[name] for name in ("rope_theta",) if name in rope}, **raw}
    values["yarn"] = _yarn(_dictionary(raw, "rope_scaling", source) or rope, f"{source}: rope_scaling")
    names = [field.name for field in fields(Config)]
    if missing := [name for name in names if name not in values]:
        raise InputError(f"{source}: the field {missing[0]} is missing")
    config = Config(**{name: values[name] for name in names})
    _check_types(config, source)
    _check_rotations(config, source)
    _check_limits(config, source)
    return config


def require_tokens(tokens: jax.typing.ArrayLike | Sequence[int], config: Config) -> None:
    """Raise InputError if one of the token ids is none of the model's. Traced ones cannot be looked at, and pass."""
    if isinstance(tokens, jax.core.Tracer):
        return
    ids = np.asarray(tokens)
    strange = ids[(ids < 0) | (ids >= config.vocab_size)]
    if strange.size:
        raise InputError(
            f"token {strange[0]} is none of the model's {config.vocab_size}; 0 to {config.vocab_size - 1} are accepted"
        )


def _dictionary(raw: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    value = raw.get(name)
    if not isinstance(value, Mapping | None):
        raise InputError(f"{source}: {name} is {brief(value)}; it must be a JSON object or null")
    return value or {}


def _yarn(rope: Mapping[str, Any], source: str) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise InputError(f"{source} is of type {brief(kind)}; accepted are 'yarn' and none")
    _check_fixed(rope, _FIXED_YARN, source)
    if missing := [name for name in ("factor", "original_max_position_embeddings") if name not in rope]:
        raise InputError(f"{source}: the field {missing[0]} is missing; yarn needs it")
    yarn = Yarn(**{field.name: rope[field.name] for field in fields(Yarn) if field.name in rope})
    _check_types(yarn, source)
    return yarn


def _check_fixed(raw: Mapping[str, Any], fixed: Mapping[str, Any], source: str) -> None:
    for name, only in fixed.items():
        if raw.get(name, only) != only:
            raise InputError(f"{source}: {name} is {brief(raw[name])}; only {only!r} is supported")


def _check_types(config: Config | Yarn, source: str) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type in _WANTED and not _is_of(value, field.type, field.name in _MAY_BE_ZERO):
            raise InputError(f"{source}: {field.name} is {brief(value)}; it must be {_WANTED[field.type]}")
        low, high = _SMALLEST.get(field.name, 0), _LARGEST.get(field.name)
        if value and high is not None and not low <= value <= high:
            raise InputError(
                f"{source}: {field.name} is {brief(value)}; {f'{low:g} to' if low else 'up to'} {high:,} is accepted"
            )


def _is_of(value: Any, kind: Any, may_be_zero: bool) -> bool:
    """Whether a JSON value has a field's type: `true` is no number, an integer is a float, numbers are finite."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if value is None:
        return isinstance(value, kind)
    is_number = isinstance(value, int) or (isinstance(value, float) and isinstance(value, kind))
    return is_number and (0 < value < math.inf or (value == 0 and may_be_zero))


def _check_rotations(config: Config, source: str) -> None:
    for name in ROTATION_FIELDS:
        value = getattr(config, name)
        if value is not None and value not in _ROTATIONS:
            accepted = ", ".join(map(repr, _ROTATIONS))
            raise InputError(f"{source}: {name} is {brief(value)}; accepted are {accepted} and null")


def _check_limits(config: Config, source: str) -> None:
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
