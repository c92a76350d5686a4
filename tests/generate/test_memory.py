"""What decoding takes, from shapes, against what its arrays and compiled steps say."""

import jax
import jax.numpy as jnp
import pytest

from moejax.formats import payload_bytes
from moejax.generate.decode import Decoding
from moejax.generate.memory import ample_bytes, decoding_needs
from moejax.model import DeepseekV3
from moejax.model.steps import run_block_cached
from moejax.model.workspace import with_margin
from small_models import small_model


@pytest.fixture(scope="module")
def shapes() -> DeepseekV3:
    return jax.eval_shape(lambda model: model, small_model())


def test_the_whole_model_and_its_widest_part(shapes: DeepseekV3) -> None:
    needs = decoding_needs(shapes, 40, 8, Decoding())
    caches = payload_bytes(jax.eval_shape(lambda: shapes.empty_cache(1, 256, "float32"))) * 4 // 3
    widest = max(payload_bytes(block) for block in shapes.layers)
    assert needs.whole > with_margin(payload_bytes(shapes) + caches)
    assert needs.part > with_margin(widest + caches)
    # Matrices of a block are read one by one, and its largest is small beside it.
    assert needs.whole - needs.part < 1.03 * (payload_bytes(shapes) - widest) + 1
    assert needs.whole < ample_bytes(shapes, 40, 8, Decoding())


def test_a_longer_context_takes_its_cache(shapes: DeepseekV3) -> None:
    short, long = (decoding_needs(shapes, 40, tokens, Decoding()) for tokens in (8, 1000))
    added = payload_bytes(jax.eval_shape(lambda: shapes.empty_cache(1, 2048 - 256, "float32"))) * 4 // 3
    assert long.whole - short.whole == pytest.approx(1.03 * added, abs=2)
    assert long.part - short.part == pytest.approx(1.03 * added, abs=2)


def test_the_workspace_is_that_of_a_chunk(shapes: DeepseekV3) -> None:
    small, large = (decoding_needs(shapes, 256, 8, Decoding(prefill_chunk=chunk)) for chunk in (16, 256))
    x_1TD = jax.ShapeDtypeStruct((1, 256, shapes.config.hidden_size), jnp.float32)
    by = jax.eval_shape(lambda: shapes.angles(jnp.zeros((1, 256), jnp.int32), jnp.dtype("float32")))
    cache = jax.eval_shape(lambda: shapes.empty_cache(1, 512, "float32")[0])
    start = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = run_block_cached.lower(shapes.layers[1], x_1TD, by, cache, start).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert large.whole - small.whole > 0.8 * analysis.temp_size_in_bytes > 0
