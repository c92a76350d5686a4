import numpy as np
import pytest

from leaf_oracle import in_float32, random_leaf, to_numpy
from moejax.formats import GroupedTernary, Levels, ScaleKind


@pytest.mark.parametrize(("suffix", "scale_kind"), [("", "bf16"), ("e8", "e8")])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("inputs", [128, 256, 640])
def test_dequantizes_by_its_equation(inputs: int, group_size: int, suffix: str, scale_kind: ScaleKind) -> None:
    """Whether the last words of a row hold padding or, as with 640 inputs, none."""
    leaf = random_leaf(f"ternaryg{group_size}{suffix}[2,8,{inputs}]")
    assert isinstance(leaf, GroupedTernary)
    assert leaf.levels == Levels(2, 1) and leaf.group_size == group_size
    assert (leaf.format_name, leaf.scale_kind) == (f"ternaryg{group_size}{suffix}", scale_kind)
    assert (leaf.shape, leaf.ndim, leaf.size) == ((2, 8, inputs), 3, 2 * 8 * inputs)
    np.testing.assert_array_equal(in_float32(leaf), to_numpy(leaf))
