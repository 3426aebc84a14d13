"""Packing: nothing lost, nothing repeated, nothing across a border."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import packing

Documents = list[list[int]]
documents = st.lists(st.lists(st.integers(0, 32766), max_size=40), max_size=12)
lengths = st.integers(1, 24)
vocabularies = st.sampled_from([32767, 2**17])


def packed(docs: Documents, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """All rows of one stream, read the way a split reads them."""
    stream = packing.store([np.array(doc, np.uint32) for doc in docs], packing.stored_dtype(vocabulary))
    rows = np.full((packing.row_count(stream.size, length), length + 1), np.iinfo(stream.dtype).max, stream.dtype)
    for number, row in enumerate(rows):
        part = stream[number * length : (number + 1) * length + 1]
        row[: part.size] = part
    return packing.batch_of(packing.widen(rows))


def fragments(batch: dict[str, np.ndarray]) -> list[tuple[list[int], list[int]]]:
    """(positions, inputs) of every segment of every row, in order."""
    found: list[tuple[list[int], list[int]]] = []
    for positions, segments, inputs in zip(batch["positions"], batch["segments"], batch["inputs"], strict=True):
        for segment in range(1, segments.max(initial=0) + 1):
            found.append((positions[segments == segment].tolist(), inputs[segments == segment].tolist()))
    return found


@given(documents, lengths, vocabularies)
def test_every_token_is_an_input_exactly_once_and_in_order(docs: Documents, length: int, vocabulary: int) -> None:
    batch = packed(docs, length, vocabulary)
    flat = [token for doc in docs for token in doc]
    if len(flat) < 2:
        assert not len(batch["inputs"])  # nothing to predict
        return
    ends_a_row = (len(flat) - 1) % length == 0  # then the last token is a target only
    assert batch["inputs"][batch["segments"] > 0].tolist() == (flat[:-1] if ends_a_row else flat)
    assert not ends_a_row or batch["targets"][-1, -1] == flat[-1]


@given(documents, lengths, vocabularies)
def test_the_targets_that_count_are_every_token_that_follows_another_of_its_document(docs: Documents, length: int, vocabulary: int) -> None:
    batch = packed(docs, length, vocabulary)
    pairs = [pair for doc in docs for pair in pairwise(doc)]
    counts = batch["weights"] == 1
    assert list(zip(batch["inputs"][counts].tolist(), batch["targets"][counts].tolist(), strict=True)) == pairs
    assert set(np.unique(batch["weights"])) <= {0.0, 1.0}


@given(documents, lengths, vocabularies)
def test_positions_count_from_zero_and_segments_from_one_in_every_row(docs: Documents, length: int, vocabulary: int) -> None:
    batch = packed(docs, length, vocabulary)
    for positions, tokens in fragments(batch):
        assert positions == list(range(len(tokens))) and tokens
    for segments in batch["segments"]:
        assert sorted(set(segments.tolist()) - {0}) == list(range(1, segments.max(initial=0) + 1))


@given(documents, lengths, vocabularies)
def test_no_segment_holds_tokens_of_two_documents(docs: Documents, length: int, vocabulary: int) -> None:
    named = [[index] * len(doc) for index, doc in enumerate(docs)]  # every token says which document it is from
    for _, tokens in fragments(packed(named, length, vocabulary)):
        assert len(set(tokens)) == 1


@given(documents, lengths, vocabularies)
def test_padding_is_zero_everywhere_and_only_at_the_end_of_the_last_row(docs: Documents, length: int, vocabulary: int) -> None:
    batch = packed(docs, length, vocabulary)
    padding = batch["segments"] == 0
    assert not padding[:-1].any()
    assert not (padding[..., :-1] & ~padding[..., 1:]).any()
    for name in ("inputs", "positions", "weights"):
        assert not batch[name][padding].any()
    assert all(batch[name].dtype == np.int32 for name in ("inputs", "targets", "positions", "segments"))
    assert batch["weights"].dtype == np.float32
