import numpy as np
import pytest

from leaf_oracle import in_float32, random_leaf, to_numpy
from moejax.formats import GroupedInt, ScaleKind


@pytest.mark.parametrize(("suffix", "scale_kind"), [("", "bf16"), ("e8", "e8")])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantizes_by_its_equation(bits: int, group_size: int, suffix: str, scale_kind: ScaleKind) -> None:
    """Exactly, although in float32: a level has at most eight significant bits, and so has a scale."""
    leaf = random_leaf(f"int{bits}g{group_size}{suffix}[2,8,256]")
    assert isinstance(leaf, GroupedInt)
    assert (leaf.bits, leaf.levels.highest, leaf.group_size) == (bits, 2**bits - 1, group_size)
    assert (leaf.shape, leaf.ndim, leaf.size) == ((2, 8, 256), 3, 2 * 8 * 256)
    assert (leaf.format_name, leaf.scale_kind) == (f"int{bits}g{group_size}{suffix}", scale_kind)
    np.testing.assert_array_equal(in_float32(leaf), to_numpy(leaf))
