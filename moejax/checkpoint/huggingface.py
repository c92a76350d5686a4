"""Opening a Hugging Face `deepseek_v3` checkpoint: every tensor is accounted for.

An unknown, missing or misshapen tensor is an error that names it. Only MTP layers may be otherwise than the config says
(see `hf_mtp`), which a note tells.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from moejax.checkpoint.hf_config import DENSE_DTYPES, fp8_block, unrotated_config, without_mtp
from moejax.checkpoint.hf_fused import fused_name, unfused
from moejax.checkpoint.hf_layouts import refuse_other_folders, refuse_other_layouts, refuse_wrapped
from moejax.checkpoint.hf_leaves import HuggingFaceLeaves
from moejax.checkpoint.hf_mtp import copies, lacks_mtp, left_out_mtp, mtp_layers, note_mtp
from moejax.checkpoint.hf_names import SCALE, expected_tensors, hf_name
from moejax.checkpoint.hf_parts import leaf_in_parts
from moejax.checkpoint.safetensors_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    SafetensorsFolder,
    TensorInfo,
    open_folder,
    read_config_json,
)
from moejax.errors import InputError
from moejax.formats import ExpertWeights
from moejax.model import DeepseekV3
from moejax.model.config import Config
from moejax.model.leaves import Weight, named_leaves
from moejax.model.sliced import experts_in_slice
from moejax.model.weights import Layout, row_of

# Tensors that are no weights, and are left out. Kimi-K2's files hold one in every layer, of (D/H)/2 numbers where the
# model has R/2 frequencies (https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/1861): transformers and others ignore
# them, since the frequencies follow from the config.
_NO_WEIGHT = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

# Numbers that are checked at once: what the check takes beside them stays in a core's cache.
_PIECE = 1 << 18


@dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """An opened and checked checkpoint; `leaf` reads one weight of the model.

    raw_config: without MTP layers where the model has none. num_elements: the numbers in the tensors that the published
    config asks for and the files hold, FP8 scales apart; so MTP layers and their copies count, dropped or not.
    dropped_mtp: how many MTP layers the config promises and the files hold, but were to be dropped.
    """

    path: Path
    raw_config: dict[str, Any]
    config: Config
    folder: SafetensorsFolder
    num_elements: int
    dropped_mtp: int

    @property
    def experts_per_token(self) -> tuple[int, ...]:
        """K of every block: the config's."""
        return (self.config.num_experts_per_tok,) * self.config.num_blocks

    def leaf(self, name: str, like: Weight | None = None) -> Weight:
        """The weight that `Layout` calls `name`; where `like`, it in shapes that have shardings, has it: a process then
        reads no more than its own parts. Raises InputError if a value in it is not finite."""
        if like is None:
            return self._leaves(self._finite)(name)
        return leaf_in_parts(like, lambda part, count: self._leaves(partial(self._finite, part=part, of=count))(name))

    def experts(self, name: str, members: Sequence[int]) -> ExpertWeights:
        """Of routed experts' weights of that name those of some experts. Raises InputError as `leaf` does."""
        return self._leaves(self._finite).experts(name, members)

    @property
    def experts_in_slice(self) -> int:
        """How many experts are worth reading together."""
        return experts_in_slice(self.config)

    def fingerprint(self) -> str:
        """A short text that changes with the size or the time of a file that the model is read from."""
        weights = (file.name for file in self.path.glob("*.safetensors"))
        files = sorted(self.path / name for name in {CONFIG_FILE, INDEX_FILE, *weights})
        stats = [(file.name, file.stat()) for file in files if file.is_file()]
        told = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def abstract_model(self) -> DeepseekV3:
        """The model in shapes alone; no tensor is read."""
        tensors = {name: jax.ShapeDtypeStruct(i.shape, i.dtype) for name, i in self.folder.tensors.items()}
        return jax.eval_shape(lambda read: DeepseekV3(self.config, self._leaves(read.__getitem__)), tensors)

    def abstract_leaves(self) -> Iterable[tuple[str, Weight]]:
        """Every weight by name, in shapes alone."""
        return named_leaves(self.abstract_model()).items()

    def _leaves(self, read: Any) -> HuggingFaceLeaves:
        return HuggingFaceLeaves(self.config, read, partial(fp8_block, self.raw_config, str(self.path / CONFIG_FILE)))

    def _finite(self, tensor: str, part: int = 0, of: int = 1) -> np.ndarray:
        """A tensor, or one of so many equal parts of its rows."""
        info = self.folder.tensors[tensor]
        rows = info.shape[0] // of if info.shape else 0
        values = info.load(slice(part * rows, (part + 1) * rows) if of > 1 else slice(None))
        if not _all_finite(values):
            raise InputError(f"{self.folder.tensors[tensor].file}: the tensor {tensor} holds a NaN or an infinity")
        return values


def open_huggingface(path: Path, drop_mtp: bool = False) -> HuggingFaceCheckpoint:
    """Open a folder and check its tensors' names, shapes and dtypes against its config.

    Of the tensors only MTP layers' copies of embedding and head are read, and compared with the model's own, which are
    used. A note says where they differ or are missing, where there is no tensor of MTP layers that the config promises
    (the model then has none), and where there are MTP layers that it does not mention. With `drop_mtp` the tensors of
    all MTP layers are not looked at, nor are files that hold nothing else.

    Raises InputError naming the tensor, the file or the config's field that is wrong, or the layout that is not read.
    """
    refuse_other_folders(path)
    raw_config, source = read_config_json(path), str(path / CONFIG_FILE)
    refuse_wrapped(raw_config, source)
    promised = unrotated_config(raw_config, source)
    folder = open_folder(path, partial(left_out_mtp, config=promised, drop_mtp=drop_mtp))
    refuse_other_layouts(folder.tensors)
    folder = replace(folder, tensors=unfused(folder.tensors, promised))
    if drop_mtp or lacks_mtp(folder.tensors, promised):
        raw_config = without_mtp(raw_config)
    config = unrotated_config(raw_config, source)
    _check_tensors(folder, config, raw_config, path)
    _check_experts(folder, config)
    if not drop_mtp:
        note_mtp(folder, promised, config)
    dropped = sum(layer < promised.num_blocks for layer in mtp_layers(folder.left_out))
    return HuggingFaceCheckpoint(path, raw_config, config, folder, _num_elements(folder, promised), dropped)


def _num_elements(folder: SafetensorsFolder, promised: Config) -> int:
    held = folder.tensors.keys() | folder.left_out
    return sum(
        math.prod(shape)
        for name, shape in expected_tensors(promised)
        if name in held or fused_name(name) in folder.left_out
    )


def _check_tensors(folder: SafetensorsFolder, config: Config, raw_config: dict[str, Any], path: Path) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    routers = {hf_name(name, config) for name in Layout(config).shapes() if row_of(name).role == "router"}
    not_needed = {name + suffix for name, _ in copies(config) for suffix in ("", SCALE)}
    for name, shape in expected_tensors(config):  # no further than the folder goes, whatever sizes a config claims
        if name in not_needed:
            continue
        info = folder.tensors.get(name)
        if info is None:
            raise InputError(f"{path}: the tensor {name} is missing; the config asks for it")
        if info.shape != shape:
            raise InputError(f"{info.file}: the tensor {name} has shape {info.shape}; the config asks for {shape}")
        _check_dtype(name, info, may_be_fp8=len(shape) == 2 and name not in routers)
        expected[name] = shape
        if info.dtype == ml_dtypes.float8_e4m3fn:
            block = fp8_block(raw_config, str(path / CONFIG_FILE))
            expected[name + SCALE] = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    for name, info in folder.tensors.items():
        if name in not_needed or _NO_WEIGHT.fullmatch(name):
            continue
        if name not in expected:
            raise InputError(f"{info.file}: the tensor {name} is none of a deepseek_v3 model with this config")
        if info.shape != expected[name]:
            raise InputError(f"{info.file}: the tensor {name} has shape {info.shape}; {expected[name]} is accepted")
        if name.endswith(SCALE) and info.dtype != np.float32:
            raise InputError(f"{info.file}: the tensor {name} has dtype {info.dtype}; float32 is accepted")
    if scale := next((name for name in expected if name not in folder.tensors), None):
        raise InputError(f"{path}: the tensor {scale} is missing; its FP8 weight needs it")


def _check_dtype(name: str, info: TensorInfo, may_be_fp8: bool) -> None:
    if info.dtype.name in DENSE_DTYPES or (may_be_fp8 and info.dtype == ml_dtypes.float8_e4m3fn):
        return
    accepted = ", ".join(DENSE_DTYPES) + (" and float8_e4m3fn" if may_be_fp8 else "")
    raise InputError(f"{info.file}: the tensor {name} has dtype {info.dtype}; accepted are {accepted}")


def _check_experts(folder: SafetensorsFolder, config: Config) -> None:
    for name in Layout(config).shapes():
        tensor = hf_name(name, config)
        if tensor is None or row_of(name).role != "routed experts":
            continue
        first, *others = (tensor.format(e) for e in range(config.n_routed_experts))
        for other in others:
            own, wanted = folder.tensors[other], folder.tensors[first].dtype
            if own.dtype != wanted:
                raise InputError(
                    f"{own.file}: the tensor {other} has dtype {own.dtype}; {wanted} is needed, as {first} has"
                )


def _all_finite(values: np.ndarray) -> bool:
    flat = values.reshape(-1)
    return all(_is_finite(flat[start : start + _PIECE]) for start in range(0, flat.size, _PIECE))


def _is_finite(values: np.ndarray) -> bool:
    if values.dtype == ml_dtypes.float8_e4m3fn:
        return not np.any((values.view(np.uint8) & 0x7F) == 0x7F)
    if values.dtype == ml_dtypes.bfloat16:
        return not np.any((values.view(np.uint16) & 0x7F80) == 0x7F80)
    return bool(np.all(np.isfinite(values)))
