"""Any legal config of small shapes, odd widths among them: it loads, is compressed to a sixth, and still predicts."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from model_cases import BASE, random_tensors, write_hf_checkpoint
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.store import folder_bytes
from moejax.errors import InputError
from moejax.formats import parse_format
from moejax.ledger import ledger_of
from moejax.model import named_leaves
from moejax.pipeline import job
from moejax.pipeline.calibrated import Calibrated
from moejax.pipeline.check import check_limit, require_original
from moejax.pipeline.recipe import Recipe
from moejax.planning.size import parse_budget
from moejax.progress import silent

# Few, because each is compiled for every shape.
RECIPE = Recipe(tuple(map(parse_format, ("int2g64", "int4g128"))), fit_routing_scale=False)
TOKENS = 32


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """What `config_from_hf` accepts: two or three layers, of which one at least has experts."""

    def size(least: int, most: int) -> int:
        return draw(st.integers(least, most))

    groups, per_group = size(1, 3), size(2, 5)
    topk_group = size(1, groups)
    layers = size(2, 3)
    own = {
        "vocab_size": size(200, 500),
        "hidden_size": size(50, 160),
        "intermediate_size": size(40, 200),
        "moe_intermediate_size": size(30, 150),
        "num_hidden_layers": layers,
        "num_attention_heads": (heads := size(1, 3)),
        "num_key_value_heads": heads,
        "n_shared_experts": size(1, 2),
        "n_routed_experts": groups * per_group,
        "n_group": groups,
        "topk_group": topk_group,
        "num_experts_per_tok": size(1, topk_group * per_group),
        "kv_lora_rank": size(10, 80),
        "q_lora_rank": draw(st.none() | st.integers(10, 80)),
        "qk_rope_head_dim": 2 * size(1, 12),
        "qk_nope_head_dim": size(5, 40),
        "v_head_dim": size(5, 40),
        "first_k_dense_replace": size(0, layers - 1),
        "num_nextn_predict_layers": size(0, 1),
        "norm_topk_prob": draw(st.booleans()),
        "rope_scaling": draw(st.sampled_from([None, BASE["rope_scaling"]])),
    }
    return BASE | own | {"torch_dtype": "bfloat16"}


def budget_near(six: int, checkpoint: HuggingFaceCheckpoint) -> int:
    """A sixth, or what a refusal names: what describes the arrays of so small a model can be most of its folder."""
    try:
        check_limit(checkpoint, six, RECIPE)
    except InputError as error:
        named = re.search(r"the smallest that can is .* \((\d+) bytes\)$", str(error))
        assert named is not None, error
        return int(named[1])
    return six


def compressed_to_a_sixth(config: dict[str, Any], folder: Path) -> None:
    tensors = {name: own.astype(ml_dtypes.bfloat16) for name, own in random_tensors(config, seed=1).items()}
    write_hf_checkpoint(folder / "original", config, tensors)
    checkpoint = require_original(open_checkpoint(folder / "original"))
    budget = budget_near(parse_budget("6x", checkpoint.num_elements), checkpoint)
    chunks = np.random.RandomState(0).randint(config["vocab_size"], size=(6, TOKENS)).astype(np.int32)
    prepared = job.prepare(checkpoint, Calibrated(chunks[:3], chunks[3:5]), RECIPE, {}, silent)
    result = job.compress_checkpoint(prepared, folder / "out", budget, chunks[5:], ledger_of(None), silent)
    assert result.bytes == folder_bytes(folder / "out") <= budget
    assert result.planned is not None and result.planned.without_format == ()
    figures = result.evaluation
    assert (
        figures is not None
        and figures.kld_mean is not None
        and np.isfinite([figures.ppl, figures.kld_mean, result.planned.predicted]).all()
    )
    leaves = jax.tree.leaves(named_leaves(load_model(open_checkpoint(folder / "out"))))
    assert all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in leaves)


@settings(max_examples=1, phases=[Phase.generate])
@given(configs())
def test_any_legal_config(config: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        compressed_to_a_sixth(config, Path(folder))


@pytest.mark.slow
@settings(max_examples=5, phases=[Phase.generate])
@given(configs())
def test_more_legal_configs(config: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        compressed_to_a_sixth(config, Path(folder))
