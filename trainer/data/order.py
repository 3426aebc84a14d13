"""Which row comes when: pure arithmetic on (seed, sample index), no state, any position in O(1).

A sample index counts rows from the start of the run: batch n holds samples n * B ... n * B + B - 1. `Mixture` says
which source a sample comes from and how many samples of that source came before it; `permute` shuffles one epoch of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

ORDER_VERSION = 1  # part of the packing fingerprint: a change here gives a run other batches
MAX_DENOMINATOR = 2**20
MAX_SAMPLES = 2**42  # keeps sample * numerator inside int64
_ROUNDS = 8


class Mixture:
    """Interleaves sources by weight, as evenly as integers allow.

    Of the first m samples that reach source i (those no earlier source took), exactly floor(m * share_i) are its own,
    share_i = weight_i / sum of the weights from i on, rounded to a fraction of at most 20 bits. So the count of every
    source is exact at every m, and (source, index) of any sample follows without looking at the ones before.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        self.shares = [(exact[i] / sum(exact[i:])).limit_denominator(MAX_DENOMINATOR) for i in range(len(exact) - 1)]
        for i, share in enumerate(self.shares):
            if share in (0, 1):
                raise ValueError(f"the weights of source {i} and of those after it differ by more than a factor of {MAX_DENOMINATOR:,}")

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [B] sample indices -> int64 [B] source, int64 [B] how many samples of that source precede."""
        source = np.full(samples.shape, len(self.shares), np.int64)
        index = np.empty_like(source)
        open_, reached = np.arange(samples.size), samples.astype(np.int64)
        for i, share in enumerate(self.shares):
            before = reached * share.numerator // share.denominator
            taken = (reached + 1) * share.numerator // share.denominator > before
            source[open_[taken]], index[open_[taken]] = i, before[taken]
            open_, reached = open_[~taken], (reached - before)[~taken]
        index[open_] = reached
        return source, index


def permute(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """int64 [B] in [0, size) -> int64 [B] in [0, size): a bijection of the range chosen by `key`.

    A Feistel network over the next power of two, walked until it lands inside the range (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"). Needs no memory, so an epoch of any length costs nothing to shuffle.
    """
    if size == 1:
        return np.zeros_like(indices)
    bits = max(2, (size - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest(), "<u8")
    out = indices.astype(np.uint64)
    outside = np.arange(out.size)
    while outside.size:
        low, high = out[outside] & low_mask, out[outside] >> low_bits
        for turn in range(0, _ROUNDS, 2):
            low = low ^ (scramble(high + keys[turn]) & low_mask)
            high = high ^ (scramble(low + keys[turn + 1]) & high_mask)
        out[outside] = high << low_bits | low
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def scramble(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, the finaliser of splitmix64 (Steele, Lea and Flood 2014); a bijection whose every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
