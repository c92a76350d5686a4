"""`moejax bench`."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.store import folder_bytes
from moejax.checkpoint.summary import kernel_bytes
from moejax.commands.common import cost_of_the_run
from moejax.generate.decode import Decoding
from moejax.generate.speed import measure_speed
from moejax.model.latent_cache import bytes_per_token
from moejax.planning.size import format_size
from moejax.report import figures
from moejax.report.console import print_table, progress_bar


def run_bench(name: str | None, prompt: int, tokens: int, repeats: int, decoding: Decoding, json: Path | None) -> None:
    """Tokens per second of reading and of writing, and what they take."""
    started = time.monotonic()
    figures.require_writable(json)
    checkpoint = open_checkpoint(name)
    speed = measure_speed(load_model(checkpoint), prompt, tokens, repeats, decoding, progress_bar)
    facts: dict[str, Any] = {
        **figures.size_figures(folder_bytes(checkpoint.path), checkpoint.num_elements),
        **asdict(speed),
        "dtype": decoding.dtype,
        "packed_bytes_by_kernel": kernel_bytes(checkpoint.abstract_leaves(), jax.default_backend()),
        "cache_dtype": decoding.kept_in,
        "cache_bytes_per_token": bytes_per_token(checkpoint.config, decoding.kept_in),
        **cost_of_the_run(started),
    }
    rows = [
        (f"prefill of {speed.prompt_tokens} tokens", f"{speed.prefill_tokens_per_s:.1f} tokens/s"),
        (f"decode of {speed.decoded_tokens} tokens", f"{speed.decode_tokens_per_s:.1f} tokens/s"),
        (f"latent cache in {decoding.kept_in}", f"{facts['cache_bytes_per_token']} bytes a token"),
        *(
            (f"packed weights multiplied by {kernel}", format_size(size))
            for kernel, size in facts["packed_bytes_by_kernel"].items()
        ),
        *figures.cost_rows(facts),
    ]
    print_table(f"{checkpoint.path} in {decoding.dtype}", ("figure", "value"), rows)
    figures.write_json(json, facts)
