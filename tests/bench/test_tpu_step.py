"""A whole step of a small compressed model compiles for eight TPU chips, ahead of time and without one."""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import run
from model_cases import BASE

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="libtpu exists for Linux on x86-64 only"
)
LATENTS, CONTEXT = 256 + 64, 512
# Rows fill whole tiles and every matrix falls into eight parts; the heads' matrices have 128 outputs each.
CONFIG = BASE | {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 32,
    "kv_lora_rank": 256,
    "q_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
}


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The figures, and the compiled program."""
    folder = tmp_path_factory.mktemp("step")
    config, recipe, plan, planned = (folder / name for name in ("config.json", "recipe.toml", "plan.toml", "plan.json"))
    config.write_text(json.dumps(CONFIG))
    recipe.write_text('formats = ["ternaryg128", "int2g128", "int3g128", "int4g128"]\nbucket_multiple = 8\n')
    run("plan", config, "--budget", "14x", "--recipe", recipe, "--output", plan, "--json", planned)
    program = Path(__file__).parents[2] / "tools" / "bench" / "tpu_step.py"
    told, text = folder / "told.json", folder / "program.txt"
    command = [program, plan, "--model", config, "--context", CONTEXT, "--json", told, "--text", text]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return {"plan": json.loads(planned.read_text()), **json.loads(told.read_text())}, text.read_text()


def test_weights_lie_in_parts_and_the_cache_is_written_in_place(step: tuple[dict[str, Any], str]) -> None:
    told, _ = step
    assert told["aliased_bytes"] == CONFIG["num_hidden_layers"] * CONTEXT * LATENTS * 2
    weights = told["argument_bytes"] - told["aliased_bytes"]
    assert 0.9 < 8 * weights / told["plan"]["bytes"] < 1.4  # norms and tables of experts are on every chip
    assert told["mosaic_kernels"] > 10
    assert 1 < told["moved_over_needed"] < 1.15


def test_no_packed_words_go_from_chip_to_chip(step: tuple[dict[str, Any], str]) -> None:
    _, program = step
    exchanged = re.findall(r" = \(?(\w+)\[[^=]* (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", program)
    assert "bf16" in exchanged
    assert "u32" not in exchanged
