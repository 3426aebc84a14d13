"""Slices that are JAX worlds of their own, and meet through files (DiLoCo): rounds, who takes part, catching up.

`rounds` imports no JAX, and neither does this package until one of its names is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.worlds.batches import Batches
    from trainer.worlds.exchange import Exchange, Joined, Programs

__all__ = ["Batches", "Exchange", "Joined", "Programs"]


def __getattr__(name: str) -> Any:
    if name == "Batches":
        from trainer.worlds.batches import Batches

        return Batches
    if name in __all__:
        from trainer.worlds import exchange

        return getattr(exchange, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
