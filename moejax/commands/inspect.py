"""`moejax inspect`."""

import time
from pathlib import Path
from typing import Any

from moejax.checkpoint.load import Checkpoint, open_checkpoint
from moejax.checkpoint.native import NativeCheckpoint
from moejax.checkpoint.store import folder_bytes
from moejax.checkpoint.summary import kernel_bytes, summarize
from moejax.checkpoint.verify import verify
from moejax.errors import InputError
from moejax.generate.decode import CACHE_DTYPES
from moejax.model.latent_cache import bytes_per_token
from moejax.model.weights import row_of
from moejax.planning.size import format_size
from moejax.report import figures
from moejax.report.console import print_table, progress_bar


def run_inspect(name: str | None, is_verified: bool, json: Path | None) -> None:
    """What a checkpoint holds, and whether that is what was written."""
    figures.require_writable(json)
    checkpoint = open_checkpoint(name)
    verified = _verified(checkpoint) if is_verified else {}
    kinds, config = summarize(checkpoint.abstract_leaves()), checkpoint.config
    size = folder_bytes(checkpoint.path)
    print(f"{checkpoint.path}: {checkpoint.raw_config['model_type']}, {format_size(size)} ({size} bytes)")
    facts: dict[str, Any] = {
        "model_type": checkpoint.raw_config["model_type"],
        "bytes": size,
        "layers": config.num_hidden_layers,
        "mtp_blocks": config.num_nextn_predict_layers,
        "experts_per_layer": _experts_per_layer(checkpoint),
        "experts_per_token": sorted(set(checkpoint.experts_per_token)),
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "cache_bytes_per_token": {dtype: bytes_per_token(config, dtype) for dtype in CACHE_DTYPES},
    }
    if packed := kernel_bytes(checkpoint.abstract_leaves(), "tpu"):
        facts["packed_bytes_by_kernel_on_tpu"] = packed
    if isinstance(checkpoint, NativeCheckpoint):
        facts["made_by"] = checkpoint.provenance
    facts |= verified
    print_table("checkpoint", ("fact", "value"), [(key, _shown(value)) for key, value in facts.items()])
    print_table("weights", ("kind", "numbers", "bytes", "bits each"), figures.kind_rows(kinds))
    figures.write_json(json, {**facts, **figures.kind_figures(kinds)})


def _verified(checkpoint: Checkpoint) -> dict[str, Any]:
    if not isinstance(checkpoint, NativeCheckpoint):
        raise InputError(
            f"{checkpoint.path}: a Hugging Face checkpoint has no checksums to be verified by; a folder that compress "
            "wrote has"
        )
    started = time.monotonic()
    size = verify(checkpoint, progress_bar)
    return {"verified_bytes": size, "verified_seconds": time.monotonic() - started}


def _shown(value: Any) -> str:
    if isinstance(value, dict) and all(isinstance(number, int) for number in value.values()):
        return ", ".join(f"{number} in {key}" for key, number in value.items())
    return str(value)


def _experts_per_layer(checkpoint: Checkpoint) -> list[int]:
    return [leaf.shape[0] for name, leaf in checkpoint.abstract_leaves() if row_of(name).name == "mlp.bias"]
