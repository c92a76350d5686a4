"""Plans sized to a device's memory, beside what decoding them is said to take."""

import pytest

from moejax.errors import InputError
from moejax.pipeline.check import check_limit
from moejax.pipeline.fit_device import Device, check_device, context_for
from moejax.pipeline.job import Planned, Prepared, plan_for
from moejax.planning.memory import device_memory, weight_bytes
from moejax.progress import silent
from small_job import RECIPE

CONTEXT, BATCH = 64, 2


def total_of(prepared: Prepared, planned: Planned) -> int:
    return device_memory(prepared.shapes.compressed(planned.plan), CONTEXT, BATCH).total


def least_of(prepared: Prepared) -> int:
    device = Device(10**6 * 2, CONTEXT, BATCH)
    return check_device(device, prepared.problem, prepared.shapes).total


def test_a_plan_takes_what_the_device_has_and_no_byte_more(prepared: Prepared) -> None:
    memory = least_of(prepared) + 100_000
    planned = plan_for(prepared, Device(memory, CONTEXT, BATCH), silent)
    assert 0.99 * memory < total_of(prepared, planned) <= memory


@pytest.mark.slow
def test_a_larger_context_leaves_less_for_weights(prepared: Prepared) -> None:
    memory = least_of(prepared) + 600_000

    def weights(context: int) -> int:
        planned = plan_for(prepared, Device(memory, context, BATCH), silent)
        return weight_bytes(prepared.shapes.compressed(planned.plan))

    cache = device_memory(prepared.shapes.model, CONTEXT, BATCH).cache
    assert weights(4 * CONTEXT) < weights(CONTEXT) - 2 * cache


def test_the_memory_that_is_named_is_enough(prepared: Prepared) -> None:
    with pytest.raises(InputError, match=r"^no plan decodes 2 x 64 tokens in 1\.00 KB; .* MB \(\d+ bytes\) would do$"):
        check_limit(prepared.checkpoint, Device(1000, CONTEXT, BATCH), RECIPE)
    least = least_of(prepared)
    with pytest.raises(InputError, match=rf"\({least} bytes\) would do$"):
        check_limit(prepared.checkpoint, Device(least - 1, CONTEXT, BATCH), RECIPE)
    check_limit(prepared.checkpoint, Device(least, CONTEXT, BATCH), RECIPE)
    assert total_of(prepared, plan_for(prepared, Device(least, CONTEXT, BATCH), silent)) <= least


def test_a_device_that_holds_the_original_is_refused(prepared: Prepared) -> None:
    whole = device_memory(prepared.shapes.model, CONTEXT, BATCH).total
    with pytest.raises(
        InputError, match=rf"leave nothing to do: the original decodes 2 x 64 tokens in .*\({whole} bytes"
    ):
        check_limit(prepared.checkpoint, Device(whole, CONTEXT, BATCH), RECIPE)


def test_contexts_are_those_that_the_model_was_made_for(prepared: Prepared) -> None:
    config = prepared.shapes.config
    assert context_for(None, 1, config) == min(4096, config.max_position_embeddings)
    with pytest.raises(InputError, match="beyond the model"):
        context_for(config.max_position_embeddings + 1, 1, config)
