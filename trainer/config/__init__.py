"""TrainConfig: a tree of small frozen, closed models. No JAX here, ever."""

from trainer.config.load import apply_overrides, load_train_config, parse_document, read_document, validate
from trainer.config.problem import ConfigError, Problem
from trainer.config.train import TrainConfig

__all__ = ["ConfigError", "Problem", "TrainConfig", "apply_overrides", "load_train_config", "parse_document", "read_document", "validate"]
