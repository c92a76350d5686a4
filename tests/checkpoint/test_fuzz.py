"""Damaged checkpoints: two thousand mutations of the files that say what the others hold."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fp8_checkpoint import fp8_config, published
from leaf_oracle import random_leaf
from model_cases import BASE, Config, write_hf_checkpoint
from moejax.checkpoint.huggingface import open_huggingface
from moejax.checkpoint.load import load_model
from moejax.checkpoint.native_bytes import Description
from moejax.checkpoint.native_writer import write_native
from moejax.formats import gather_experts
from moejax.model import DeepseekV3, named_leaves

TESTS = Path(__file__).parent.parent
# One dense layer, and an MTP block of four experts; square experts, so that a shape turned round is one.
CONFIG: Config = fp8_config(
    BASE
    | {
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 1,
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    [32, 32],
)


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("huggingface")
    write_hf_checkpoint(folder, CONFIG, published(CONFIG, [32, 32]), shards=3)
    return folder


@pytest.fixture(scope="module")
def native(huggingface: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with experts of two formats, integers, and none of the rest changed."""
    original = load_model(open_huggingface(huggingface))
    experts = [random_leaf(f"{name}[64,64]") for name in ("int3g32", "ternaryg64", "int3g32", "bf16")]
    leaves: dict[str, Any] = named_leaves(original) | {
        "mtp.0.block.mlp.experts.gate": gather_experts(experts),
        "layers.0.mlp.up": random_leaf("int4g32[64,64]"),
    }
    folder = tmp_path_factory.mktemp("native") / "out"
    description = Description(CONFIG, {"budget": 3, "formats": ["int3g32"]}, {"made": ["by", 1, None]})
    write_native(DeepseekV3(original.config, leaves.__getitem__), folder, description, [], 10**9)
    return folder


@pytest.mark.parametrize(("kind", "count"), [("huggingface", 1300), ("native", 700)])
def test_damaged_files_are_refused_or_loaded_as_they_are(kind: str, count: int, request: pytest.FixtureRequest) -> None:
    command = [sys.executable, str(TESTS / "fuzz_loading.py"), str(request.getfixturevalue(kind)), kind, str(count)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    outcomes = json.loads(result.stdout)
    assert sum(outcomes.values()) == count
    loaded = sum(own for outcome, own in outcomes.items() if outcome.endswith("loaded"))
    assert count / 20 < loaded < count / 2, outcomes  # else there would be nothing to compare, or nothing damaged
