"""What the trainer reads: sources, tokenizer, packing, cache."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import Fraction, Node, NonNegativeInt, PositiveFloat, PositiveInt

Paths = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class _Source(Node):
    weight: PositiveFloat = 1.0
    """Share of the training rows drawn from this source, relative to the other sources' weights."""


class Text(_Source):
    """Plain UTF-8 text files."""

    type: Literal["text"] = "text"
    paths: Paths
    """Files or globs (`**` crosses folders), local or gs://."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """Stands between the documents of a file, such as `<|endoftext|>`. Default: a file is a document."""


class JsonLines(_Source):
    """One JSON object a line; a line is a document. `.gz` is decompressed."""

    type: Literal["jsonl"] = "jsonl"
    paths: Paths
    field: str = "text"


class Parquet(_Source):
    """Parquet files with a column of strings; a row is a document."""

    type: Literal["parquet"] = "parquet"
    paths: Paths
    column: str = "text"


class ArrayRecord(_Source):
    """ArrayRecord files whose records are UTF-8 text; a record is a document."""

    type: Literal["arrayrecord"] = "arrayrecord"
    paths: Paths


class PythonStandardLibrary(_Source):
    """The source text of the running Python's own standard library: real text without a download."""

    type: Literal["python_standard_library"] = "python_standard_library"
    max_bytes: PositiveInt | None = None
    """Use only about this much of it."""


class Synthetic(_Source):
    """Uniform random tokens below the model's vocab_size, full rows, nothing read or cached: for benchmarks."""

    type: Literal["synthetic"] = "synthetic"
    distinct_batches: PositiveInt = 1
    """The run cycles through this many different batches."""


Source = Annotated[
    Text | JsonLines | Parquet | ArrayRecord | PythonStandardLibrary | Synthetic,
    Field(discriminator="type"),
]


class Bytes(Node):
    """UTF-8 bytes: ids 0-255 are bytes, 256 begins a document, 257 ends one."""

    type: Literal["bytes"] = "bytes"


class HuggingFaceTokenizer(Node):
    type: Literal["huggingface"] = "huggingface"
    path: str
    """A `tokenizer.json`, local or gs://."""
    begin_token: str | None = None
    """Written before every document. Default: `bos_token` of a `tokenizer_config.json` beside the file, else none."""
    end_token: str | None = None
    """Written after every document. Default: `eos_token` of a `tokenizer_config.json` beside the file, else none."""


class SentencePiece(Node):
    type: Literal["sentencepiece"] = "sentencepiece"
    path: str
    """A `.model` file, local or gs://."""


Tokenizer = Annotated[Bytes | HuggingFaceTokenizer | SentencePiece, Field(discriminator="type")]


class Data(Node):
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    tokenizer: Tokenizer = Bytes()
    cache_directory: str | None = None
    """Where tokenised, packed rows are kept, by fingerprint of text, tokenizer and packing; local or gs://. Hosts that
    share it share the work; hosts that do not each do all of it. Default: `data` in the job's `directory`, which its runs share."""
    held_out: Fraction = 0.01
    """Share of the documents kept for evaluation and never trained on, chosen by a hash of the document."""
    shuffle: bool = True
    """Take the rows of a source in another order in every epoch; otherwise in the order of its documents."""
    prefetch_batches: NonNegativeInt = 2
    """Batches kept ready on each host."""
