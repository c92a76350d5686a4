"""moejax: compression of DeepSeek-V3-class mixture-of-experts models as a chain of pure, jitted functions."""

from typing import TYPE_CHECKING, Any

from moejax.version import __version__

__all__ = ["__version__", "plan"]

if TYPE_CHECKING:
    from moejax.pipeline.outlook import plan


def __getattr__(name: str) -> Any:
    """`moejax.plan`, imported when it is asked for: JAX takes seconds, and `moejax --help` needs none of it."""
    if name != "plan":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moejax.pipeline.outlook import plan

    return plan
