"""Text into token ids and back: bytes, a Hugging Face `tokenizer.json`, a SentencePiece `.model`.

Every document is wrapped in the tokenizer's begin and end tokens where it has them; text that merely looks like a
special token is encoded as text, so no document can forge a border.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from trainer.config.data import Bytes, HuggingFaceTokenizer, SentencePiece
from trainer.config.data import Tokenizer as TokenizerConfig
from trainer.data.storage import open_file
from trainer.errors import DataError


class Tokenizer(Protocol):
    vocabulary: int
    """Every id is below this."""
    fingerprint: str
    """Changes whenever any text could be encoded differently."""

    @property
    def end(self) -> Sequence[int]:
        """What `encode` writes after a document; empty where the tokenizer has no end token."""
        ...

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """UTF-8 documents -> one array of ids each, begin and end tokens included."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Special tokens and ids of no token have none; bytes that are not UTF-8 become U+FFFD."""
        ...


def encode_beginning(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` as the beginning of a document: its begin token, and no end token."""
    ids: list[int] = tokenizer.encode([text.encode(errors="replace")])[0].tolist()
    return ids[: len(ids) - len(tokenizer.end)]


class ByteTokenizer:
    BEGIN, END = 256, 257
    vocabulary = 258
    fingerprint = "bytes-1"
    end = (END,)

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        encoded: list[np.ndarray] = []
        for document in documents:
            ids = np.empty(len(document) + 2, np.uint16)
            ids[0], ids[-1] = self.BEGIN, self.END
            ids[1:-1] = np.frombuffer(document, np.uint8)
            encoded.append(ids)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(one for one in ids if one < 256).decode(errors="replace")


def _wrapped(ids: Sequence[int], begin: Sequence[int], end: Sequence[int]) -> np.ndarray:
    return np.array([*begin, *ids, *end], np.uint32)


class JsonTokenizer:
    """A `tokenizer.json`. Begin and end tokens: the config's, else those of a `tokenizer_config.json` beside it."""

    def __init__(self, config: HuggingFaceTokenizer) -> None:
        import tokenizers

        data = _read(config.path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise DataError(f"{config.path} is not a tokenizer.json: {error}", hint="give the file `tokenizer.json` itself") from error
        self._tokenizer.encode_special_tokens = True  # text stays text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        beside = {} if config.begin_token and config.end_token else _read_beside(config.path)
        self._begin = self._special(config, config.begin_token or _content(beside, "bos_token"))
        self.end = self._special(config, config.end_token or _content(beside, "eos_token"))
        self.vocabulary = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = _digest("huggingface", data, json.dumps([self._begin, self.end]).encode())

    def _special(self, config: HuggingFaceTokenizer, token: str | None) -> list[int]:
        if not token:
            return []
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise DataError(f"{config.path} has no token {token!r}", hint="name one of its added_tokens as begin_token or end_token")
        return [found]

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        texts = [document.decode() for document in documents]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [_wrapped(one.ids, self._begin, self.end) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


class SentencePieceTokenizer:
    def __init__(self, config: SentencePiece) -> None:
        import sentencepiece

        data = _read(config.path)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{config.path} is not a SentencePiece model: {error}", hint="give the `.model` file itself") from error
        begin, end = self._model.bos_id(), self._model.eos_id()
        self._begin, self.end = [begin] if begin >= 0 else [], [end] if end >= 0 else []
        self.vocabulary = self._model.get_piece_size()
        self.fingerprint = _digest("sentencepiece", data)

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        encoded: list[list[int]] = self._model.encode([document.decode() for document in documents], out_type=int)
        return [_wrapped(ids, self._begin, self.end) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([one for one in ids if one < self.vocabulary])


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Raises DataError when the file cannot be read or is something else."""
    if isinstance(config, Bytes):
        return ByteTokenizer()
    return JsonTokenizer(config) if isinstance(config, HuggingFaceTokenizer) else SentencePieceTokenizer(config)


def _read(path: str) -> bytes:
    with open_file(path) as file:
        return file.read()


def _read_beside(path: str) -> dict[str, Any]:
    sibling = posixpath.join(posixpath.dirname(path), "tokenizer_config.json")
    try:
        return json.loads(_read(sibling))
    except DataError:
        return {}  # a tokenizer.json alone is complete
    except ValueError as error:
        raise DataError(f"{sibling} is not JSON: {error}") from error


def _content(document: dict[str, Any], key: str) -> str | None:
    value = document.get(key)
    return value["content"] if isinstance(value, dict) else value


def _digest(*parts: bytes | str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
