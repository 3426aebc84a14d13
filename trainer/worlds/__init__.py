"""Slices that are JAX worlds of their own, and meet through files (DiLoCo): rounds, who takes part, catching up."""

from trainer.worlds.batches import Batches
from trainer.worlds.exchange import Exchange, Joined, Programs

__all__ = ["Batches", "Exchange", "Joined", "Programs"]
