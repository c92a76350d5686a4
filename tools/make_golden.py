"""Write tests/golden/*.npz: what Hugging Face transformers computes for our test models.

    python tools/make_golden.py --checkpoint TINY --output tests/golden

A developer's tool: it needs torch and transformers (the files were made with torch 2.13 and transformers 5.23), the
tests that read the files need neither. For each case of `tests/model_cases.py` there is one file, in float64 (B batch,
T tokens, K experts per token, D hidden, C vocabulary; N all layers, M the MoE layers):

    config, seed     the config as JSON and the seed of the weights
    tokens           (B, T)
    hidden           (N, B, T, D) the residual stream after each layer
    logits           (B, T, C)
    experts, weights (M, B, T, K) the chosen experts in ascending order, and the routing weight of each

and where the model has an MTP block, whose position t predicts token t + 2:

    mtp_logits                (B, T-1, C)
    mtp_experts, mtp_weights  (1, B, T-1, K)

For the trained checkpoint TINY, `tiny.npz` holds the same in float32 for one row of text, without `seed` and `hidden`,
with `logits` at `positions` only and `logsumexp` (B, T) everywhere.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import DeepseekV3ForCausalLM, modeling_rope_utils
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v3 import modeling_deepseek_v3

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from model_cases import CASES, Config, ModelCase, Tensors, write_hf_checkpoint

Golden = dict[str, NDArray[Any]]

BATCH, TOKENS = 2, 24
TINY_TOKENS = 128
TINY_POSITIONS = np.arange(5, TINY_TOKENS, 11)
TINY_TEXT = '''The cache keeps one entry for each key and forgets the entry that was used least recently. When it is
full, the oldest entry is removed before a new one is added, so its size never grows beyond the limit.

class LeastRecentlyUsed:
    """A dictionary that holds at most `limit` items."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit must be positive, got {limit}")
        self.limit = limit
        self.items = {}

    def get(self, key, default=None):
        if key not in self.items:
            return default
        value = self.items.pop(key)
        self.items[key] = value
        return value
'''


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


def run(model: DeepseekV3ForCausalLM, tokens: torch.Tensor) -> tuple[Golden, torch.Tensor]:
    """Run `tokens` (B, T) without a cache; return the arrays and the final-norm output (B, T, D)."""
    hidden: list[NDArray[Any]] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, output: hidden.append(output.numpy()))
        for layer in model.model.layers
    ]
    with RouterRecorder(model) as routers:
        last = model.model(tokens, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    logits = model.lm_head(last)
    arrays = {"tokens": tokens.numpy().astype(np.int32), "hidden": np.stack(hidden), "logits": logits.numpy()}
    return arrays | routers.arrays(), last


def run_mtp(model: DeepseekV3ForCausalLM, tokens: torch.Tensor, last: torch.Tensor) -> Golden:
    """Run the MTP block over `tokens` (B, T), with transformers' own `MtpModel`.

    With e the embedding and h the main model's output *after* its final norm `model.norm`, position t (0..T-2) computes

        x_t = eh_proj [enorm(e(token_{t+1})) | hnorm(h_t)],  logits_t = lm_head(shared_head.norm(block(x)_t))

    and predicts token t + 2. Three public programs take h after that norm: transformers (`MTPCandidateGenerator` reads
    `hidden_states[-1]`, which `capture_outputs` ties to `last_hidden_state`), vLLM (`DeepseekV2Model.forward` ends in
    `self.norm`, and `deepseek_mtp.py` is given its result) and SGLang (`LogitsProcessor` stores the normed states that
    `deepseek_nextn.py` reads). The RoPE position is t + 1 in transformers and t in vLLM: the same, as RoPE is relative.
    vLLM also zeroes the embedding at position 0; transformers and SGLang do not, and neither do we.
    """
    # transformers knows the MTP layer of the 61-layer model only.
    model._keys_to_ignore_on_load_unexpected = [mtp_prefix(model).replace(".", r"\.")]
    mtp = MtpModel.from_pretrained(model).eval()
    positions = torch.arange(1, tokens.shape[1])[None]
    cache = MtpCache(config=model.config.get_mtp_config())
    with RouterRecorder(mtp) as router:
        hidden = mtp.forward_layer(0, last[:, :-1], positions, cache, input_ids=tokens[:, 1:])
    return {"mtp_logits": model.lm_head(hidden).numpy()} | router.arrays("mtp_")


def make_case(case: ModelCase) -> Golden:
    """The arrays of one small random model, in float64."""
    tokens = torch.tensor(np.random.RandomState(case.seed).randint(case.config["vocab_size"], size=(BATCH, TOKENS)))
    with tempfile.TemporaryDirectory() as folder, float32_means_float64():
        write_hf_checkpoint(Path(folder), case.config, case.tensors())
        model = load_model(Path(folder), torch.float64)
        golden, last = run(model, tokens)
        if case.config["num_nextn_predict_layers"]:
            golden |= run_mtp(model, tokens, last)
    if any(array.dtype == np.float32 for array in golden.values()):
        raise RuntimeError("a float32 array in a float64 run")
    return {"config": np.array(json.dumps(case.config)), "seed": np.array(case.seed), **golden}


def make_tiny(checkpoint: Path) -> Golden:
    """The arrays of the trained checkpoint, in float32, for one row of BOS and text."""
    config = json.loads((checkpoint / "config.json").read_text())
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(TINY_TEXT, add_special_tokens=False).ids
    tokens = torch.tensor([[config["bos_token_id"], *ids][:TINY_TOKENS]])
    if tokens.shape[1] < TINY_TOKENS:
        raise RuntimeError(f"the text has {tokens.shape[1]} tokens, {TINY_TOKENS} are needed")
    with tempfile.TemporaryDirectory() as folder:
        unquantized = {key: value for key, value in config.items() if key != "quantization_config"}
        write_hf_checkpoint(Path(folder), unquantized, dequantize(checkpoint))
        golden, _ = run(load_model(Path(folder), torch.float32), tokens)
    logits = golden.pop("logits")
    del golden["hidden"]
    return {
        "config": np.array(json.dumps(config)),
        **golden,
        "positions": TINY_POSITIONS,
        "logits": logits[:, TINY_POSITIONS],
        "logsumexp": torch.logsumexp(torch.tensor(logits), dim=-1).numpy(),
    }


def dequantize(checkpoint: Path) -> Tensors:
    """Every tensor of an FP8 checkpoint in float32: w[i, j] * scale_inv[i // 128, j // 128].

    transformers 5.23's own `Fp8Dequantize` takes rows / scale rows for the block's size, which is wrong for
    `kv_a_proj_with_mqa`, whose last block is partial.
    """
    raw: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        raw |= {name: tensor.float() for name, tensor in load_file(file).items()}
    tensors = {}
    for name, tensor in raw.items():
        if name.endswith("_scale_inv"):
            continue
        scale = raw.get(f"{name}_scale_inv")
        if scale is not None:
            scale = scale.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
            tensor = tensor * scale[: tensor.shape[0], : tensor.shape[1]]
        tensors[name] = tensor.numpy()
    return tensors


def summary(golden: Golden) -> str:
    """One line that shows whether a case is worth testing on."""
    config: Config = json.loads(str(golden["config"]))
    counts = [np.bincount(layer.ravel(), minlength=config["n_routed_experts"]) for layer in golden["experts"]]
    used = ", ".join(f"{np.count_nonzero(count)}/{len(count)}" for count in counts)
    share = np.max(counts) / counts[0].sum()
    return f"logits std {golden['logits'].std():.2f}, experts used {used}, largest share {share:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the golden files of the tests.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the tiny trained checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder of the .npz files")
    parser.add_argument("--only", choices=[*CASES, "tiny"], help="write this case only")
    arguments = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    # One thread, so that sums are added in the same order each time.
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in [arguments.only] if arguments.only else [*CASES, "tiny"]:
        golden = make_tiny(arguments.checkpoint) if name == "tiny" else make_case(CASES[name])
        file = arguments.output / f"{name}.npz"
        np.savez_compressed(file, allow_pickle=False, **golden)
        print(f"{file}: {file.stat().st_size} bytes, {summary(golden)}")


if __name__ == "__main__":
    main()
