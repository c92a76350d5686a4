"""`moejax export`, and `moejax compress --drop-mtp` before it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from command_line import moejax, refused, run
from moejax.checkpoint.huggingface import open_huggingface
from moejax.checkpoint.load import open_checkpoint
from moejax.checkpoint.store import folder_bytes
from moejax.checkpoint.toml_file import write_toml
from moejax.planning import KEEP, BlockPlan, Plan
from moejax.planning.plan import PROJECTIONS, to_json
from small_checkpoint import FP8_CONFIG

# Three of four experts of every group.
KEPT = (0, 1, 2, 5, 6, 7, 8, 10, 11)


@dataclass(frozen=True)
class Done:
    """A checkpoint that was pruned, its MTP block dropped, and exported; the figures and what the commands printed."""

    plan: Path
    compressed: Path
    figures: dict[str, Any]
    printed: str
    exported: Path
    printed_by_export: str


@pytest.fixture(scope="module")
def done(small_fp8: Path, text_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("export")
    plan, compressed, exported = folder / "plan.toml", folder / "compressed", folder / "exported"
    experts = {name: (KEEP,) * len(KEPT) for name in PROJECTIONS}
    block = BlockPlan(keep=KEPT, experts=experts, experts_per_token=2)
    write_toml(plan, to_json(Plan(KEEP, KEEP, (BlockPlan(), block, block))))
    arguments = ["--plan", plan, "--drop-mtp", "--json", folder / "out.json", *text_options]
    printed = run("compress", small_fp8, "--output", compressed, *arguments)
    printed_by_export = run("export", compressed, "--to", "hf", "--output", exported)
    figures = json.loads((folder / "out.json").read_text())
    return Done(plan, compressed, figures, printed, exported, printed_by_export)


def test_a_dropped_mtp_block_is_gone_and_spoken_of(done: Done, small_fp8: Path) -> None:
    assert "MTP blocks dropped: 1" in done.printed and done.figures["dropped_mtp_blocks"] == 1
    manifest = json.loads((done.compressed / "manifest.json").read_text())
    assert manifest["provenance"]["dropped_mtp_blocks"] == 1
    assert manifest["config"] == FP8_CONFIG | {"num_nextn_predict_layers": 0}
    assert {path.name for path in (done.compressed / "items").iterdir()} == {"outer", "layer_0", "layer_1", "layer_2"}
    assert done.figures["bytes"] == folder_bytes(done.compressed)
    # Against the original, which has the block.
    elements = open_huggingface(small_fp8).num_elements
    assert done.figures["bits_per_weight"] == 8 * done.figures["bytes"] / elements


def test_a_plan_without_mtp_blocks_needs_them_dropped(
    done: Done, small_fp8: Path, text_options: list[object], tmp_path: Path
) -> None:
    message = refused(tmp_path, "compress", small_fp8, "--plan", done.plan, "--output", tmp_path / "o", *text_options)
    assert "the plan has 3 blocks; the model has 3 layers and 1 MTP blocks; --drop-mtp leaves those out" in message


def test_a_pruned_checkpoint_is_exported_as_it_is(done: Done, small_fp8: Path) -> None:
    exported, original = open_huggingface(done.exported), open_huggingface(small_fp8)
    changed = {"n_routed_experts": 9, "num_experts_per_tok": 2, "num_nextn_predict_layers": 0}
    assert exported.raw_config == FP8_CONFIG | changed
    for new, old in enumerate(KEPT):
        own, before = (f"model.layers.2.mlp.experts.{e}.up_proj.weight" for e in (new, old))
        assert exported.folder.tensors[own].load().tobytes() == original.folder.tensors[before].load().tobytes()
    assert (done.exported / "tokenizer.json").read_bytes() == (small_fp8 / "tokenizer.json").read_bytes()
    size = folder_bytes(done.exported)
    assert f"({size} bytes) in {len(exported.folder.tensors)} tensors" in done.printed_by_export
    assert "9 experts a layer, 2 per token, routed_scaling_factor 2.5, MTP blocks 0" in done.printed_by_export


def test_integers_must_be_dequantized(compressed: Path, tmp_path: Path) -> None:
    arguments = ["export", compressed, "--to", "hf", "--output", tmp_path / "out"]
    message = refused(tmp_path, *arguments)
    assert "--dequantize bfloat16" in message
    run(*arguments, "--dequantize", "bfloat16")
    before, exported = open_checkpoint(compressed), open_huggingface(tmp_path / "out")
    assert exported.config.n_routed_experts == 6 and exported.experts_per_token[1:] == before.experts_per_token[1:]
    assert {info.dtype.name for info in exported.folder.tensors.values()} == {"bfloat16"}


def test_places_and_layouts_that_are_not_accepted(small: Path, tmp_path: Path) -> None:
    assert "exists already" in refused(tmp_path, "export", small, "--to", "hf", "--output", tmp_path)
    for arguments in (["--to", "gguf"], [], ["--to", "hf", "--dequantize", "int8"]):
        ran = moejax("export", small, "--output", tmp_path / "out", *arguments)
        assert ran.code == 2 and "Traceback" not in ran.out + ran.err
    assert not list(tmp_path.iterdir())
