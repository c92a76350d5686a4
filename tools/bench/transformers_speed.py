"""How fast Hugging Face transformers runs a checkpoint on this CPU; `tools/bench/speed.py` calls it.

    python tools/bench/transformers_speed.py CHECKPOINT --dtype float32 --prompt 256 --tokens 32 --repeats 3

It needs torch and transformers. The protocol is that of `moejax bench`: random prompts, each continued greedily behind
transformers' own cache, an unmeasured run first, medians. Prints one line of JSON.
"""

import argparse
import json
import resource
import statistics
import time

import numpy as np
import torch
from transformers import DeepseekV3ForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    arguments = parser.parse_args()

    torch.set_grad_enabled(False)
    model = DeepseekV3ForCausalLM.from_pretrained(arguments.checkpoint, dtype=getattr(torch, arguments.dtype)).eval()
    runs = [measure(model, n, arguments.prompt, arguments.tokens) for n in range(arguments.repeats + 1)][1:]
    prefill, decode = map(statistics.median, zip(*runs, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode, "peak_memory_bytes": peak}))


def measure(model: DeepseekV3ForCausalLM, seed: int, prompt: int, tokens: int) -> tuple[float, float]:
    """Tokens per second of reading a prompt and of writing behind it."""
    ids = torch.tensor(np.random.RandomState(seed).randint(model.config.vocab_size, size=(1, prompt)))
    started = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    first = time.perf_counter()
    for _ in range(tokens):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits.argmax(-1)
    return prompt / (first - started), tokens / (time.perf_counter() - first)


if __name__ == "__main__":
    main()
