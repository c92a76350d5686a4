import json
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint.hf_names import expected_tensors
from moejax.formats import ExpertWeights
from moejax.model import Config, DeepseekV3, Layout, config_from_hf, named_leaves
from moejax.model.leaves import Taps, linear, prefixed, under
from moejax.resources import config_path


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
def test_a_models_leaves_are_those_of_its_layout(build_case: Callable[[str], DeepseekV3], name: str) -> None:
    model = build_case(name)
    leaves = named_leaves(model)
    assert {path: leaf.shape for path, leaf in leaves.items()} == Layout(model.config).shapes()
    assert all(isinstance(leaf, ExpertWeights) == (".experts." in path) for path, leaf in leaves.items())


def test_a_model_is_rebuilt_from_its_leaves(build_case: Callable[[str], DeepseekV3]) -> None:
    model = build_case("mtp")
    rebuilt = DeepseekV3(model.config, named_leaves(model).__getitem__)
    assert jax.tree.all(jax.tree.map(np.array_equal, rebuilt, model))


def test_names_under_a_prefix_and_back() -> None:
    assert under(lambda name: f"<{name}>", "layers.3")("mlp.gate") == "<layers.3.mlp.gate>"
    assert prefixed("mlp", {"gate": 1, "up": 2}) == {"mlp.gate": 1, "mlp.up": 2}
    assert prefixed("mlp", None) == {}


def test_linear_notes_its_input_where_somebody_listens(build_case: Callable[[str], DeepseekV3]) -> None:
    weight = build_case("base").layers[0].self_attn.o
    x, taps = jnp.ones((2, weight.get_value().shape[1])), Taps()
    assert linear(x, weight, taps, "o").shape == (2, weight.get_value().shape[0])
    assert list(taps) == ["o"] and taps["o"] is x


@pytest.mark.parametrize("part", ["layers.0", "layers.1", "mtp.0"])
def test_taps_hold_the_input_of_every_matrix(build_case: Callable[[str], DeepseekV3], part: str) -> None:
    model = build_case("mtp")
    kind, index = part.split(".")
    module = getattr(model, kind)[int(index)]
    x_BTD, by = jnp.ones((1, 5, model.config.hidden_size)), model.rotation(jnp.arange(5), jnp.dtype(jnp.float32))

    def listen() -> Taps:
        taps = Taps()
        module(*([x_BTD] * (2 if kind == "mtp" else 1)), by, taps=taps)
        return taps

    taps = jax.eval_shape(listen)
    matrices = {
        name: leaf for name, leaf in named_leaves(module).items() if isinstance(leaf, jax.Array) and leaf.ndim > 1
    }
    assert {name for name in taps if not name.endswith("mlp.experts")} == matrices.keys()
    assert all(taps[name].shape[-1] == leaf.shape[-1] for name, leaf in matrices.items())
