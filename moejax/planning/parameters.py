"""How many parameters a model has, and how many of them a token uses."""

import math
from dataclasses import dataclass

from moejax.formats import ExpertWeights
from moejax.model import DeepseekV3, named_leaves
from moejax.model.moe import MoE
from moejax.model.weights import block_and_name, row_of


@dataclass(frozen=True)
class Parameters:
    """total: of embedding, layers and head. mtp: of the MTP blocks. active: what one token is multiplied with, so of
    the routed experts K each layer, and of the embedding nothing, since a row is looked up."""

    total: int
    mtp: int
    active: int

    @property
    def with_mtp(self) -> int:
        return self.total + self.mtp


def count_parameters(model: DeepseekV3) -> Parameters:
    """Of a model, concrete or in shapes alone."""
    total = mtp = active = 0
    for name, leaf in named_leaves(model).items():
        row = row_of(name)
        size = 0 if row.is_derived else math.prod(leaf.shape)
        block, _ = block_and_name(name, len(model.layers))
        if block is not None and block >= len(model.layers):
            mtp += size
            continue
        total += size
        if block is not None and isinstance(leaf, ExpertWeights):
            moe = model.layers[block].mlp
            assert isinstance(moe, MoE)
            size = size // leaf.num_experts * moe.experts_per_token
        active += 0 if row.role == "embedding" else size
    return Parameters(total, mtp, active)
