"""What is computed: the transformer as data-driven NNX modules."""

from trainer.model.transformer import Transformer, create_abstract_model

__all__ = ["Transformer", "create_abstract_model"]
