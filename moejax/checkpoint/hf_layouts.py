"""Published layouts that are not read: each is named by what it is, in place of the first tensor that is amiss."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.checkpoint.safetensors_folder import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, TensorInfo
from moejax.errors import InputError, brief

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf")
_SNAPSHOTS = "snapshots"

_WRAPPED = "language_model."
# By how their tensors' names end.
_QUANTIZED = {
    ".weight_packed": "holds integers that compressed-tensors packed (pack-quantized)",
    ".weight_scale": "holds scales of compressed-tensors, one a row or one a tensor",
    ".qweight": "holds integers that GPTQ or AWQ packed",
    ".qzeros": "holds zero points of GPTQ or AWQ",
    ".absmax": "holds scales of bitsandbytes",
    ".SCB": "holds scales of bitsandbytes",
}
_ACCEPTED = (
    "weights in bfloat16, float16, float32, or FP8 with float32 scales of blocks (weight_scale_inv) are accepted"
)


def refuse_other_folders(path: Path) -> None:
    """Raises InputError if the folder is a hub's cache, a PEFT adapter, or has weights in other files alone."""
    snapshots = sorted(path.glob(f"{_SNAPSHOTS}/*/"))
    if snapshots and not (path / CONFIG_FILE).exists():
        raise InputError(f"{path}: is the hub's cache of a model; give its snapshot {' or '.join(map(str, snapshots))}")
    if any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return
    if adapter := next((name for name in _ADAPTER_FILES if (path / name).is_file()), None):
        raise InputError(
            f"{path}: holds a PEFT adapter ({adapter}) and no model; "
            "a checkpoint that it has been merged into is accepted"
        )
    others = sorted(file.name for file in path.glob("*") if file.suffix in _OTHER_WEIGHTS)
    if others and not any(path.glob("*.safetensors")):
        raise InputError(f"{path}: has weights in {others[0]} and no safetensors file; safetensors files are accepted")


def refuse_wrapped(raw_config: Mapping[str, Any], source: str) -> None:
    """Raises InputError if the config is of a model that has a language model as a part."""
    if isinstance(raw_config.get("text_config"), Mapping):
        raise InputError(
            f"{source}: model_type is {brief(raw_config.get('model_type'))}, with a language model in its text_config; "
            f"a language model's own config, and tensors without the prefix {_WRAPPED}, are accepted"
        )


def refuse_other_layouts(tensors: Mapping[str, TensorInfo]) -> None:
    """Raises InputError naming the first tensor of a layout that is known and not read."""
    for name, info in tensors.items():
        if name.startswith((_WRAPPED, f"model.{_WRAPPED}")):
            raise InputError(
                f"{info.file}: the tensor {name} is of a language model within another model; tensors without the "
                f"prefix {_WRAPPED}, and the language model's own config, are accepted"
            )
        if what := next((what for ending, what in _QUANTIZED.items() if name.endswith(ending)), None):
            raise InputError(f"{info.file}: the tensor {name} {what}; {_ACCEPTED}")
