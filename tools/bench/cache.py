"""What a smaller latent cache costs: KL divergence of predictions from those with a float32 cache.

    python tools/bench/cache.py CHECKPOINT --text heldout.txt [--chunks 24]

Chunks of 512 tokens go through the cache in one piece, so that every token attends to rounded latents, its own too;
tokens 257 to 511 of each are scored. The model computes in float32 throughout.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.evaluate.divergence import compare, log_probabilities
from moejax.evaluate.text import chunks, read_text
from moejax.generate.decode import CACHE_DTYPES
from moejax.model import DeepseekV3
from moejax.model.latent_cache import bytes_per_token
from moejax.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=24)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.checkpoint)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint.path)
    encoded = tokenizer.encode(read_text(arguments.text).content)
    rows = chunks(encoded, bos_token_id=tokenizer.bos_token_id)[: arguments.chunks]
    print("| cache | bytes a token | KL mean | KL 99.9 % | equal top-1 |\n|---|---|---|---|---|")
    for dtype in CACHE_DTYPES:
        kld, same = divergence(model, rows, dtype)
        size = bytes_per_token(checkpoint.config, dtype)
        print(f"| {dtype} | {size} | {kld.mean():.6f} | {np.quantile(kld, 0.999):.4f} | {100 * same.mean():.2f} % |")


def divergence(model: DeepseekV3, rows: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """KL(float32 cache | this cache) and equal top-1 of every scored token."""
    found = []
    for row in rows:
        tokens_1T = jnp.asarray(row[None])
        exact, own = (
            log_probabilities(states(model, tokens_1T, kept_in=kept), model.head.get_value())
            for kept in ("float32", dtype)
        )
        found.append(jax.device_get(compare(exact, own, tokens_1T)))
    kld, same = (np.concatenate([np.ravel(getattr(scores, name)) for scores in found]) for name in ("kld", "same_top1"))
    return kld, same


@partial(jax.jit, static_argnames="kept_in")
def states(model: DeepseekV3, tokens_1T: jax.Array, kept_in: str) -> jax.Array:
    """Normed states of the scored positions, (1, T-1 - T/2, D)."""
    length = tokens_1T.shape[1]
    cache = model.empty_cache(1, length, kept_in)
    hidden_1TD, _ = model.extend(tokens_1T, cache, jnp.zeros(1, jnp.int32))
    return model.normed(hidden_1TD)[:, length // 2 : length - 1]


if __name__ == "__main__":
    main()
