"""Optimizers as optax chains, learning-rate schedules, decay masks."""

from trainer.optim.chain import build_optimizer
from trainer.optim.schedule import build_schedule

__all__ = ["build_optimizer", "build_schedule"]
