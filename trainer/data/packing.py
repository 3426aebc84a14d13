"""Documents into rows: concatenate, split, and know the borders.

The documents of a piece of the corpus are laid end to end in one stream of tokens. Row r holds the T + 1 tokens
from r * T on: T inputs, and the same shifted by one as targets. Neighbouring rows share one token, so every token
but the stream's first is a target exactly once and every token but the last an input exactly once. No token is lost,
none is repeated, and only the last row of a stream is padded (best-fit packing would cut fewer documents, but needs
the lengths of all documents before the first row is known, pads every row, and reads each row from many places).

Inside a row every document, or part of one, is a segment of its own: numbered from 1, positions from 0, nothing
attends across a border and a target on the other side of it has weight 0. Padding is segment 0.

The stream is stored with its borders in it: the highest bit of a stored token marks the first token of a document,
all bits set is padding. So a row is one contiguous read. Two bytes a token up to 32,767 tokens, four beyond.

Shapes: B rows, T sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PACKING_VERSION = 1
PADDING = np.uint32(0xFFFFFFFF)
START = np.uint32(0x80000000)
MAX_VOCABULARY = 2**31 - 1


def stored_dtype(vocabulary: int) -> np.dtype[np.unsignedinteger]:
    """Little-endian type of the stored stream of a tokenizer with ids below `vocabulary`."""
    return np.dtype("<u2") if vocabulary < 2**15 else np.dtype("<u4")


def store(documents: Sequence[np.ndarray], dtype: np.dtype[np.unsignedinteger]) -> np.ndarray:
    """Documents of token ids -> one stored stream; documents without tokens vanish."""
    stream = np.empty(sum(len(document) for document in documents), dtype)
    begin = 0
    for document in documents:
        if len(document):
            end = begin + len(document)
            stream[begin:end] = document
            stream[begin] |= dtype.type(1 << (8 * dtype.itemsize - 1))
            begin = end
    return stream


def row_count(tokens: int, length: int) -> int:
    """Rows of a stream of `tokens`. A single token has nothing to predict, so it makes no row."""
    return -(-max(0, tokens - 1) // length)


def widen(stored: np.ndarray) -> np.ndarray:
    """Stored tokens of either type, all bits set for padding, as uint32 with START and PADDING; a new array."""
    wide = stored.astype(np.uint32)
    if stored.dtype.itemsize == 4:
        return wide
    wide = (wide & 0x7FFF) | ((wide & 0x8000) << 16)
    wide[stored == 0xFFFF] = PADDING
    return wide


def batch_of(rows: np.ndarray) -> dict[str, np.ndarray]:
    """uint32 [B, T + 1] wide rows -> `inputs`, `targets`, `positions`, `segments` int32 [B, T], `weights` float32 [B, T]."""
    padding = rows == PADDING
    start = (rows >= START) & ~padding
    start[:, 0] = True  # a document cut by the row's border begins again here
    tokens = (rows & ~START).astype(np.int32)
    tokens[padding] = 0
    segments = np.cumsum(start, axis=1, dtype=np.int32)
    segments[padding] = 0
    column = np.arange(rows.shape[1], dtype=np.int32)[None, :]
    positions = column - np.maximum.accumulate(np.where(start, column, 0), axis=1)
    positions[padding] = 0
    same = (segments[:, 1:] == segments[:, :-1]) & ~padding[:, 1:]
    return {
        "inputs": np.ascontiguousarray(tokens[:, :-1]),
        "targets": np.ascontiguousarray(tokens[:, 1:]),
        "positions": np.ascontiguousarray(positions[:, :-1]),
        "segments": np.ascontiguousarray(segments[:, :-1]),
        "weights": same.astype(np.float32),
    }
