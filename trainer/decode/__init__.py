"""Text from a trained model: prefill, insert, generate, on the training model's own blocks and weights."""

from trainer.decode.drafting import DraftingEngine
from trainer.decode.engine import Engine, Prefix, Slots, Step
from trainer.decode.sampling import Sampling
from trainer.decode.serve import Drafts, Piece, Request, serve

__all__ = ["DraftingEngine", "Drafts", "Engine", "Piece", "Prefix", "Request", "Sampling", "Slots", "Step", "serve"]
