"""What every packed weight is: a pytree that stands where an array stood and knows its logical shape."""

import abc
from typing import Self

import jax
import jax.numpy as jnp


class PackedTensor(abc.ABC):
    """A weight (..., O, I) whose arrays hold fewer bytes than its elements would.

    Subclasses are frozen dataclasses, registered as pytrees with their arrays as data. Leading axes are
    derived from the arrays, never stored, so that indexing, stacking and `jax.vmap` over them cannot make them wrong.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Logical shape (..., O, I): outputs by inputs, leading axes are batches of matrices."""

    @property
    @abc.abstractmethod
    def format_name(self) -> str:
        """The format in one word, as plans and manifests write it."""

    @abc.abstractmethod
    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        """The dense weight, (..., O, I)."""

    @abc.abstractmethod
    def rows(self, start: jax.Array | int, size: int) -> Self:
        """Outputs start to start+size of every matrix, (..., size, I); start may be traced."""

    @abc.abstractmethod
    def take(self, index: jax.Array) -> Self:
        """Of one matrix (O, I), the outputs at index (...), as (..., I)."""

    @abc.abstractmethod
    def reshape_outputs(self, *shape: int) -> Self:
        """The same rows with the axes before I reshaped to `shape`; rows stay in order."""

    @property
    @abc.abstractmethod
    def scale_bytes(self) -> int:
        """Of its bytes, those of scales."""

    @property
    def padding_bytes(self) -> int:
        """Of its bytes, those of fields that no code fills, rounded."""
        return 0

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        elements = 1
        for length in self.shape:
            elements *= length
        return elements
