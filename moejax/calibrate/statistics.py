"""What calibration remembers of blocks and of a model: sums over tokens, from which errors are weighed."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from moejax.calibrate.expert_statistics import ExpertStatistics
from moejax.calibrate.products import Inputs, input_name
from moejax.model.weights import IN_BLOCK


class OutputWeights(NamedTuple):
    """E[g g^T] over tokens of the gradients g of the loss by hidden states, (D, D): behind attention, and behind the
    block."""

    attended_DD: jax.Array
    behind_DD: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockStatistics:
    """One block's sums: `input2` by weight's name (relative to the block), sum over tokens of x^2, (I,).

    Where Hessians are collected: `products`, sum over tokens of x x^T (I, I), by `input_name` of the weight's name.
    damping: by weight's name, where it was chosen. outputs: where gradients were collected.
    """

    tokens: jax.Array
    input2: dict[str, jax.Array]
    experts: ExpertStatistics | None
    products: dict[str, jax.Array] | None = None
    damping: dict[str, jax.Array] = field(default_factory=dict)
    outputs: OutputWeights | None = None

    def merged(self, other: Self) -> Self:
        """The statistics of both batches' tokens; both are of the same block."""
        experts = None
        if self.experts is not None and other.experts is not None:
            experts = self.experts.merged(other.experts)
        own, others = ((sums.tokens, sums.input2, sums.products) for sums in (self, other))
        tokens, input2, summed = jax.tree.map(jnp.add, own, others)
        return replace(self, tokens=tokens, input2=input2, experts=experts, products=summed)

    def beside(self, other: Self) -> Self:
        """These, and the statistics of other weights over as many tokens."""
        products = None if self.products is None or other.products is None else self.products | other.products
        return replace(other, input2=self.input2 | other.input2, products=products)

    def input_second_moment(self, name: str) -> jax.Array:
        """E[x^2] of the input of the weight `name`, (I,)."""
        return self.input2[name] / self.tokens

    def input_hessian(self, name: str) -> jax.Array:
        """E[x x^T] of the input of the weight `name`, (I, I); its diagonal is `input_second_moment`."""
        assert self.products is not None, "calibrated without hessians"
        return jnp.asarray(self.products[input_name(name)]) / self.tokens

    def damped_as(self, other: Self) -> Self:
        """With the damping that was chosen for `other`, the same block's."""
        experts = self.experts
        if experts is not None and other.experts is not None:
            experts = replace(experts, damping=other.experts.damping)
        return replace(self, damping=other.damping, experts=experts)

    def without_hessians(self) -> Self:
        """The same as if Hessians had not been collected."""
        experts = self.experts
        if experts is not None:
            layer = replace(experts.layer, x_DD=None, hidden_FF=None)
            experts = replace(experts, layer=layer, x_EDD=(), hidden_EFF=())
        return replace(self, products=None, experts=experts)

    def inputs(self, name: str) -> Inputs:
        """The input of the weight `name`."""
        hessian = None if self.products is None else self.input_hessian(name)
        damping = self.damping.get(name, 1.0)
        return Inputs(self.input_second_moment(name), hessian, self.tokens, damping, self.output_hessian(name))

    def weighing_outputs(self, outputs: OutputWeights | None) -> Self:
        """With what its outputs are weighed by, or nothing."""
        experts, behind_DD = self.experts, None if outputs is None else outputs.behind_DD
        return replace(
            self, outputs=outputs, experts=None if experts is None else replace(experts, output_DD=behind_DD)
        )

    def output_hessian(self, name: str) -> jax.Array | None:
        """By what errors of the outputs of the weight `name` are weighed, if they are hidden states and it is known."""
        if self.outputs is None or not IN_BLOCK[name].gives_hidden:
            return None
        return self.outputs.attended_DD if IN_BLOCK[name].role == "attention" else self.outputs.behind_DD


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistics:
    """A model's statistics: one entry per block (MTP blocks last), the head's input, and how often each token came."""

    blocks: tuple[BlockStatistics, ...]
    tokens: jax.Array
    head_input2: jax.Array
    count_C: jax.Array
    head_products: jax.Array | None = None
    head_damping: jax.Array | None = None

    def head_hessian(self) -> jax.Array:
        """E[x x^T] of the head's input, (D, D)."""
        assert self.head_products is not None, "calibrated without hessians"
        return self.head_products / self.tokens

    def without_hessians(self) -> Self:
        """The same as if Hessians had not been collected."""
        return replace(self, blocks=tuple(own.without_hessians() for own in self.blocks), head_products=None)

    def head_inputs(self) -> Inputs:
        """The head's input."""
        hessian = None if self.head_products is None else self.head_hessian()
        damping = 1.0 if self.head_damping is None else self.head_damping
        return Inputs(self.head_input2 / self.tokens, hessian, self.tokens, damping)
