"""What a Hugging Face config says about the formats of its checkpoint's tensors."""

from collections.abc import Mapping
from typing import Any

from moejax.errors import InputError, brief
from moejax.model import Config, config_from_hf
from moejax.model.config import ROTATION_FIELDS

DENSE_DTYPES = ("bfloat16", "float16", "float32")
"""The dtypes of tensors that are not in FP8."""

_MAX_BLOCK = 8_192  # published: 128


def unrotated_config(raw_config: Mapping[str, Any], source: str) -> Config:
    """The model's config, as `config_from_hf` reads it.

    Raises InputError as that does, and if the config names a rotation: only native checkpoints hold rotated models.
    """
    config = config_from_hf(raw_config, source)
    for name in ROTATION_FIELDS:
        if getattr(config, name) is not None:
            raise InputError(
                f"{source}: {name} is {brief(raw_config[name])}; null is accepted in a Hugging Face checkpoint"
            )
    return config


def without_mtp(raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """The Hugging Face config of the same model without its MTP blocks."""
    return {**raw_config, "num_nextn_predict_layers": 0}


def dense_dtype(raw_config: Mapping[str, Any], source: str) -> str:
    """`dtype` (transformers 5) or `torch_dtype`: what tensors are stored in where nothing else is said.

    Raises InputError if it is not in `DENSE_DTYPES`.
    """
    field = "dtype" if "dtype" in raw_config else "torch_dtype"
    dtype = raw_config.get(field)
    if dtype not in DENSE_DTYPES:
        raise InputError(f"{source}: {field} is {brief(dtype)}; accepted are {', '.join(DENSE_DTYPES)}")
    return dtype


def linear_block(raw_config: Mapping[str, Any], source: str) -> tuple[int, int] | None:
    """The size of the FP8 blocks that linear layers are stored in, None where the config quantizes nothing.

    Raises InputError if it asks for another quantization.
    """
    quantization = raw_config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if method != "fp8":
        raise InputError(f"{source}: quantization_config.quant_method is {brief(method)}; only 'fp8' is supported")
    return fp8_block(raw_config, source)


def fp8_block(raw_config: Mapping[str, Any], source: str) -> tuple[int, int]:
    """Rows and inputs of an FP8 block. Raises InputError if the config does not give them."""
    quantization = raw_config.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, Mapping) else None
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n <= _MAX_BLOCK for n in block)):
        raise InputError(
            f"{source}: quantization_config.weight_block_size is {brief(block)}; "
            f"FP8 weights need two positive integers up to {_MAX_BLOCK}, such as [128, 128]"
        )
    return block[0], block[1]
