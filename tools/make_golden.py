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
with `logits` at `positions` only and `logsumexp` (B, T) everywhere. `exported.npz` holds it in float32, without `seed`
and `hidden`, for the compressed model that `python tests/exported_case.py EXPORTED` writes (JAX is needed for that, and
not here), if `--exported EXPORTED` is given. `decode_*.npz` are described in `tools/golden/decode.py`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from model_cases import CASES, DECODE_CASES, Config, ModelCase, Tensors, write_hf_checkpoint
from tools.golden.decode import make_decode_case
from tools.golden.hugging_face import Golden, RouterRecorder, check_float64, load_model, load_mtp, loaded_in_float64

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
    mtp = load_mtp(model)
    positions = torch.arange(1, tokens.shape[1])[None]
    cache = MtpCache(config=model.config.get_mtp_config())
    with RouterRecorder(mtp) as router:
        hidden = mtp.forward_layer(0, last[:, :-1], positions, cache, input_ids=tokens[:, 1:])
    return {"mtp_logits": model.lm_head(hidden).numpy()} | router.arrays("mtp_")


def make_case(case: ModelCase) -> Golden:
    """The arrays of one small random model, in float64."""
    tokens = torch.tensor(np.random.RandomState(case.seed).randint(case.config["vocab_size"], size=(BATCH, TOKENS)))
    with loaded_in_float64(case) as model:
        golden, last = run(model, tokens)
        if case.config["num_nextn_predict_layers"]:
            golden |= run_mtp(model, tokens, last)
    check_float64(golden)
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


def make_exported(folder: Path) -> Golden:
    """The arrays of a model that moejax compressed and exported, in float32."""
    config = json.loads((folder / "config.json").read_text())
    tokens = torch.tensor(np.random.RandomState(70).randint(config["vocab_size"], size=(BATCH, TOKENS)))
    golden, _ = run(load_model(folder, torch.float32), tokens)
    del golden["hidden"]
    return {"config": np.array(json.dumps(config)), **golden}


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
    return f"logits std {np.nanstd(golden['logits']):.2f}, experts used {used}, largest share {share:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the golden files of the tests.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the tiny trained checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder of the .npz files")
    makers: dict[str, Callable[[], Golden]] = {
        **{name: partial(make_case, case) for name, case in CASES.items()},
        **{f"decode_{name}": partial(make_decode_case, case) for name, case in DECODE_CASES.items()},
    }
    parser.add_argument("--exported", type=Path, help="folder that tests/exported_case.py wrote")
    parser.add_argument("--only", nargs="+", choices=[*makers, "tiny", "exported"], help="write these only")
    arguments = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    # One thread, so that sums are added in the same order each time.
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    makers["tiny"] = partial(make_tiny, arguments.checkpoint)
    if arguments.exported:
        makers["exported"] = partial(make_exported, arguments.exported)
    for name in arguments.only or makers:
        golden = makers[name]()
        file = arguments.output / f"{name}.npz"
        np.savez_compressed(file, allow_pickle=False, **golden)
        print(f"{file}: {file.stat().st_size} bytes, {summary(golden)}")


if __name__ == "__main__":
    main()
