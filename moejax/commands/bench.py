"""`moejax bench`."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.store import folder_bytes
from moejax.checkpoint.summary import kernel_bytes
from moejax.commands.common import cost_of_the_run
from moejax.commands.devices import in_first, require_one_sequence
from moejax.generate.decode import Decoding
from moejax.generate.speed import check_measurement, measure_speed
from moejax.model.latent_cache import bytes_per_token
from moejax.planning.size import format_size
from moejax.report import figures
from moejax.report.console import print_table, progress_bar
from moejax.sharding import around


def run_bench(
    name: str | None,
    prompt: int,
    tokens: int,
    repeats: int,
    decoding: Decoding,
    mesh: Mesh | None,
    json: Path | None,
) -> None:
    """Tokens per second of reading and of writing, and what they take."""
    started, json = time.monotonic(), in_first(json)
    figures.require_writable(json)
    require_one_sequence(mesh)
    check_measurement(prompt, tokens, repeats)
    checkpoint = open_checkpoint(name)
    model = load_model(checkpoint, mesh, progress=progress_bar)
    read = time.monotonic() - started
    with around(mesh):
        speed = measure_speed(model, prompt, tokens, repeats, decoding, progress_bar)
    facts: dict[str, Any] = {
        **figures.size_figures(folder_bytes(checkpoint.path), checkpoint.num_elements),
        **asdict(speed),
        "read_seconds": read,
        "dtype": decoding.dtype,
        "packed_bytes_by_kernel": kernel_bytes(checkpoint.abstract_leaves(), jax.default_backend()),
        "cache_dtype": decoding.kept_in,
        "cache_bytes_per_token": bytes_per_token(checkpoint.config, decoding.kept_in),
        **cost_of_the_run(started),
    }
    rows = [
        ("reading the checkpoint", f"{read:.1f} s"),
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
