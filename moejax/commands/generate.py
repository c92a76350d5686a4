"""`moejax generate`."""

from collections.abc import Iterator

import numpy as np

from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.tokenizer import Tokenizer, load_tokenizer
from moejax.errors import InputError
from moejax.evaluate.generate import generate


def run_generate(name: str | None, prompt: str, tokens: int, temperature: float, seed: int, dtype: str) -> None:
    """Text, as it comes."""
    if tokens < 1:
        raise InputError(f"--tokens is {tokens}; at least 1 is needed")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"--temperature is {temperature}; 0 or a positive number is needed")
    checkpoint = open_checkpoint(name)
    tokenizer = load_tokenizer(checkpoint.path)
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_token_id is not None:
        ids = np.concatenate([[tokenizer.bos_token_id], ids])
    stop = tokenizer.eos_token_ids
    continuation = generate(
        load_model(checkpoint), ids, tokens, temperature=temperature, seed=seed, stop=stop, dtype=dtype
    )
    print(prompt, end="", flush=True)
    for piece in _pieces(tokenizer, continuation):
        print(piece, end="", flush=True)
    print()


def _pieces(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text as it becomes whole: a character may take several tokens, and until the last it decodes to U+FFFD."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]
