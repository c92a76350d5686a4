"""Hugging Face transformers as an oracle: checkpoints loaded strictly, float64 throughout, routers listened to."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import DeepseekV3ForCausalLM, modeling_rope_utils
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from model_cases import ModelCase, write_hf_checkpoint

Golden = dict[str, NDArray[Any]]


class RouterRecorder:
    """Keeps what every router chose, in the order of the calls, while it is used as a context manager.

    Hugging Face returns the chosen experts unsorted; here they are sorted by index.
    """

    def __init__(self, module: nn.Module) -> None:
        self.experts: list[NDArray[Any]] = []
        self.weights: list[NDArray[Any]] = []
        routers = [part for part in module.modules() if isinstance(part, modeling_deepseek_v3.DeepseekV3TopkRouter)]
        self._hooks = [router.register_forward_hook(self._record) for router in routers]

    def _record(self, router: nn.Module, inputs: tuple[torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> None:
        batch, tokens, _ = inputs[0].shape
        _, weights, experts = outputs
        experts, order = experts.sort(dim=-1)
        self.experts.append(experts.reshape(batch, tokens, -1).numpy().astype(np.uint8))
        self.weights.append(weights.gather(-1, order).reshape(batch, tokens, -1).numpy())

    def __enter__(self) -> "RouterRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def arrays(self, prefix: str = "") -> Golden:
        return {f"{prefix}experts": np.stack(self.experts), f"{prefix}weights": np.stack(self.weights)}


class _Float64Torch:
    """The torch module, except that `torch.float32` and `torch.float` mean float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def float32_means_float64() -> Iterator[None]:
    """Let Hugging Face's own code run in float64 throughout.

    Its norms, softmax, router and RoPE cast to float32 whatever the model's type, which would leave an error of 1e-7
    where the tests ask for 1e-9.
    """
    with ExitStack() as stack:
        for module in (modeling_deepseek_v3, modeling_rope_utils):
            stack.enter_context(patch.object(module, "torch", _Float64Torch()))
        stack.enter_context(patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield


def load_model(folder: Path, dtype: torch.dtype) -> DeepseekV3ForCausalLM:
    """Load a checkpoint with eager attention and experts.

    Raises RuntimeError if a tensor is missing, has another shape, or is left over and not of the MTP block.
    """
    model, info = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    unused = {name for name in info["unexpected_keys"] if not name.startswith(mtp_prefix(model))}
    if info["missing_keys"] or info["mismatched_keys"] or unused:
        raise RuntimeError(f"transformers did not load all of {folder}: {info}")
    return model.eval()


def mtp_prefix(model: DeepseekV3ForCausalLM) -> str:
    """What the names of the (first) MTP block's tensors start with."""
    return f"model.layers.{model.config.num_hidden_layers}."


def load_mtp(model: DeepseekV3ForCausalLM) -> MtpModel:
    """The MTP block of the checkpoint that `model` was loaded from."""
    # transformers knows the MTP layer of the 61-layer model only.
    model._keys_to_ignore_on_load_unexpected = [mtp_prefix(model).replace(".", r"\.")]
    return MtpModel.from_pretrained(model).eval()


@contextmanager
def loaded_in_float64(case: ModelCase) -> Iterator[DeepseekV3ForCausalLM]:
    """A small random model, computing in float64."""
    with TemporaryDirectory() as folder, float32_means_float64():
        write_hf_checkpoint(Path(folder), case.config, case.tensors())
        yield load_model(Path(folder), torch.float64)


def check_float64(golden: Golden) -> None:
    """Raises RuntimeError where something was computed in float32."""
    if narrow := [name for name, array in golden.items() if array.dtype == np.float32]:
        raise RuntimeError(f"float32 in a float64 run: {', '.join(narrow)}")
