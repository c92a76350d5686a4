from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model import DeepseekV3, named_leaves
from moejax.model.leaves import Taps, linear, prefixed, under


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
    x_BTD, by = jnp.ones((1, 5, model.config.hidden_size)), model.angles(jnp.arange(5), jnp.dtype(jnp.float32))

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
