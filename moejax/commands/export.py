"""`moejax export`."""

from pathlib import Path

from moejax.checkpoint.atomic import require_free
from moejax.checkpoint.hf_export import Dtype, write_huggingface
from moejax.checkpoint.huggingface import open_huggingface
from moejax.checkpoint.load import open_checkpoint
from moejax.checkpoint.summary import summarize
from moejax.pipeline.shapes import copied_files
from moejax.planning.size import format_size
from moejax.report import figures
from moejax.report.console import print_table, progress_bar


def run_export(name: str | None, output: Path, dequantize: Dtype | None) -> None:
    """The checkpoint in another layout; what was written is opened and checked before anything is said of it."""
    require_free(output)
    checkpoint = open_checkpoint(name)
    written = write_huggingface(checkpoint, output, dequantize, copied_files(checkpoint.path), progress=progress_bar)
    exported = open_huggingface(output)
    config = exported.config
    print(f"{output}: {format_size(written)} ({written} bytes) in {len(exported.folder.tensors)} tensors")
    print(
        f"config.json: {config.n_routed_experts} experts a layer, {config.num_experts_per_tok} per token, "
        f"routed_scaling_factor {config.routed_scaling_factor:.6g}, MTP blocks {config.num_nextn_predict_layers}"
    )
    kinds = summarize(exported.abstract_leaves())
    print_table("weights", ("kind", "numbers", "bytes", "bits each"), figures.kind_rows(kinds))
