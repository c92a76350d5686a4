import json
import math
from collections.abc import Callable

import jax
import numpy as np
import pytest

from model_cases import BASE, CASES
from moejax.checkpoint.hf_names import expected_tensors
from moejax.formats import ExpertWeights
from moejax.model import Config, DeepseekV3, Layout, config_from_hf, named_leaves
from moejax.model.weights import IN_BLOCK, block_and_name, block_name, in_mtp_block, row_of
from moejax.resources import config_path

BuildCase = Callable[[str], DeepseekV3]


@pytest.fixture(scope="module")
def real_config() -> Config:
    return config_from_hf(json.loads(config_path("models", "deepseek_v3").read_text()))


def parameters_of_deepseek_v3() -> tuple[int, int]:
    """Parameters of the 61 layers with embedding and head, and of the MTP block with its copies of both.

    The sizes are those of the technical report (arXiv:2412.19437, section 4.2).
    """
    hidden, vocab, heads, head_dim, rope = 7168, 129280, 128, 128, 64
    q_latent, kv_latent, width, experts = 1536, 512, 2048, 256
    queries = hidden * q_latent + q_latent + q_latent * heads * (head_dim + rope)
    keys_and_values = hidden * (kv_latent + rope) + kv_latent + kv_latent * heads * 2 * head_dim
    attention = queries + keys_and_values + heads * head_dim * hidden
    expert = 3 * hidden * width
    router = experts * (hidden + 1)
    dense_block = 2 * hidden + attention + 3 * hidden * 18432
    moe_block = 2 * hidden + attention + router + (experts + 1) * expert
    outer = 2 * vocab * hidden
    return outer + hidden + 3 * dense_block + 58 * moe_block, outer + 3 * hidden + 2 * hidden**2 + moe_block


def test_deepseek_v3_has_671_billion_parameters_and_an_mtp_block_of_13(real_config: Config) -> None:
    main, mtp = parameters_of_deepseek_v3()
    assert main == 671_026_419_200
    sizes = {name: math.prod(shape) for name, shape in expected_tensors(real_config)}
    # The published checkpoint has 91,991 tensors, 45,808 of which are FP8 scales.
    assert len(sizes) == 91_991 - 45_808
    assert sum(size for name, size in sizes.items() if ".layers.61." in name) == mtp
    assert sum(sizes.values()) == main + mtp


def test_the_layout_counts_the_same_parameters_without_the_mtp_blocks_copies(real_config: Config) -> None:
    main, mtp = parameters_of_deepseek_v3()
    shapes = Layout(real_config).shapes()
    weights = {name: shape for name, shape in shapes.items() if not name.endswith(("group_id", "routing_scale"))}
    copies = 2 * real_config.vocab_size * real_config.hidden_size
    assert sum(map(math.prod, weights.values())) == main + mtp - copies


@pytest.mark.parametrize("name", ["base", "no_q_lora", "two_shared", "mtp"])
def test_a_models_leaves_are_those_of_its_layout(build_case: BuildCase, name: str) -> None:
    model = build_case(name)
    leaves = named_leaves(model)
    assert {path: leaf.shape for path, leaf in leaves.items()} == Layout(model.config).shapes()
    assert all(isinstance(leaf, ExpertWeights) == (".experts." in path) for path, leaf in leaves.items())


def test_what_axes_say_is_what_the_arrays_have(build_case: BuildCase) -> None:
    """Sizes of the small models are all different, so a width tells what it is the width of."""
    for case in ("two_shared", "no_q_lora", "mtp"):
        model = build_case(case)
        config, leaves = model.config, named_leaves(model)
        widths = {config.intermediate_size, config.moe_intermediate_size * config.n_shared_experts}
        products = widths | {config.moe_intermediate_size}
        for name, leaf in leaves.items():
            row, inputs = row_of(name), leaf.shape[-1] if len(leaf.shape) > 1 else None
            assert row.is_matrix == (inputs is not None), name
            assert row.takes_hidden == (inputs == config.hidden_size), name
            assert row.takes_product == (inputs in products), name
            assert (row.role == "routed experts") == isinstance(leaf, ExpertWeights), name
            assert (row.dtype == "int32") == (not isinstance(leaf, ExpertWeights) and leaf.dtype == np.int32), name


def test_first_axes_that_pruning_shortens_are_those_that_follow_the_number_of_experts(build_case: BuildCase) -> None:
    many, few = (named_leaves(build_case(case)) for case in ("base", "n_group_1"))
    assert CASES["base"].config["n_routed_experts"] != CASES["n_group_1"].config["n_routed_experts"]
    assert {name for name in many if row_of(name).is_per_expert} == {
        name for name in many if many[name].shape != few[name].shape
    }


def test_derived_weights_are_those_that_no_other_tensors_change(build_case: BuildCase) -> None:
    one, other = (named_leaves(build_case(case)) for case in ("base", "no_yarn"))
    same = {name for name in one if jax.tree.all(jax.tree.map(np.array_equal, one[name], other[name]))}
    assert {name for name in one if row_of(name).is_derived} == same


def test_inputs_are_known_by_the_name_of_one_that_has_no_other() -> None:
    for row in IN_BLOCK.values():
        if row.same_input is not None:
            assert IN_BLOCK[row.same_input].same_input is None
            assert IN_BLOCK[row.same_input].axes[-1] == row.axes[-1]


def test_weights_are_listed_layer_by_layer_and_mtp_blocks_last() -> None:
    config = config_from_hf(BASE | {"num_nextn_predict_layers": 2})
    parts = [".".join(name.split(".")[:2]) for name in Layout(config).shapes()]
    assert list(dict.fromkeys(parts)) == ["embed", *(f"layers.{i}" for i in range(3)), "norm", "head", "mtp.0", "mtp.1"]


def test_a_listing_is_its_callers_own() -> None:
    layout = Layout(config_from_hf(BASE))
    layout.shapes().clear()
    assert layout.shapes()


@pytest.mark.parametrize(
    ("name", "block", "own"),
    [
        ("embed", None, "embed"),
        ("norm", None, "norm"),
        ("head", None, "head"),
        ("layers.0.input_norm", 0, "input_norm"),
        ("layers.60.self_attn.q_a", 60, "self_attn.q_a"),
        ("mtp.0.norm", 61, "norm"),
        ("mtp.0.eh_proj", 61, "eh_proj"),
        ("mtp.0.block.self_attn.o", 61, "self_attn.o"),
        ("mtp.12.block.mlp.experts.up", 73, "mlp.experts.up"),
    ],
)
def test_a_weight_s_block_and_its_name_within(name: str, block: int | None, own: str) -> None:
    assert block_and_name(name, 61) == (block, own)
    assert row_of(name).name == own
    assert in_mtp_block(name) == (block is not None and block >= 61)


def test_paths_of_blocks() -> None:
    assert [block_name(index, 61) for index in (0, 60, 61, 62)] == [
        "layers.0",
        "layers.60",
        "mtp.0.block",
        "mtp.1.block",
    ]


@pytest.mark.parametrize(("dense", "shared"), [(1, ("gate", "up", "down")), (3, ())])
def test_outer_weights(dense: int, shared: tuple[str, ...]) -> None:
    layout = Layout(config_from_hf(BASE | {"first_k_dense_replace": dense, "num_nextn_predict_layers": 1}))
    outer = [name for name in layout.shapes() if layout.is_outer(name)]
    assert outer == ["embed", *(f"layers.2.mlp.shared.{name}" for name in shared), "head"]
