"""Tokenizers: small real ones, trained here, and the ids they give."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tests.gcs_emulator import Gcs
from tests.trainer.data.conftest import Configure
from trainer.config import ConfigError
from trainer.config.data import Bytes, HuggingFaceTokenizer, SentencePiece
from trainer.data import open_data
from trainer.data.storage import bucket_client
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.errors import DataError

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "naïve café <|end|> [BOS]"] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokenizer.json` with its `tokenizer_config.json`, `alone.json` without one, and `small.model`."""
    path = tmp_path_factory.mktemp("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXT,
        tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["[BOS]", "<|end|>"], show_progress=False),
    )
    bpe.enable_truncation(4)
    bpe.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "[BOS]", "eos_token": {"content": "<|end|>"}}))
    (path / "elsewhere").mkdir()
    bpe.save(str(path / "elsewhere" / "alone.json"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=300, byte_fallback=True, hard_vocab_limit=False, minloglevel=2
    )
    (path / "small.model").write_bytes(model.getvalue())
    return path


def encode(tokenizer: Tokenizer, *texts: str) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode([text.encode() for text in texts])]


@given(st.text())
def test_bytes_are_bytes_between_a_begin_and_an_end(text: str) -> None:
    (ids,) = encode(load_tokenizer(Bytes()), text)
    assert ids == [256, *text.encode(), 257]


def test_a_tokenizer_json_gives_its_own_ids_between_the_tokens_its_config_names(folder: Path) -> None:
    tokenizer = load_tokenizer(HuggingFaceTokenizer(path=str(folder / "tokenizer.json")))
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_truncation()
    begin, end = reference.token_to_id("[BOS]"), reference.token_to_id("<|end|>")
    assert encode(tokenizer, TEXT[0]) == [[begin, *reference.encode(TEXT[0]).ids, end]]
    assert tokenizer.vocabulary == reference.get_vocab_size()


def test_the_path_of_a_tokenizer_may_begin_at_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    at_home, named = (load_tokenizer(HuggingFaceTokenizer(path=f"{base}/tokenizer.json")) for base in ("~", folder))
    assert encode(at_home, TEXT[0]) == encode(named, TEXT[0])


def test_text_that_looks_like_a_special_token_is_encoded_as_text(folder: Path) -> None:
    tokenizer = load_tokenizer(HuggingFaceTokenizer(path=str(folder / "tokenizer.json")))
    ((begin, *inside, end),) = encode(tokenizer, "a <|end|> b [BOS]")
    assert begin not in inside and end not in inside
    assert tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode(inside) == "a <|end|> b [BOS]"


def test_begin_and_end_tokens_can_be_named_and_must_exist(folder: Path) -> None:
    path = str(folder / "elsewhere" / "alone.json")
    plain = encode(load_tokenizer(HuggingFaceTokenizer(path=path)), "fox")[0]
    ended = encode(load_tokenizer(HuggingFaceTokenizer(path=path, end_token="<|end|>")), "fox")[0]
    assert ended[:-1] == plain
    with pytest.raises(DataError, match=r"has no token '</s>'"):
        load_tokenizer(HuggingFaceTokenizer(path=path, begin_token="</s>"))


def test_a_sentencepiece_model_gives_its_own_ids_between_begin_and_end(folder: Path) -> None:
    tokenizer = load_tokenizer(SentencePiece(path=str(folder / "small.model")))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "small.model"))
    assert encode(tokenizer, *TEXT[:3]) == [[reference.bos_id(), *reference.encode(text), reference.eos_id()] for text in TEXT[:3]]
    assert tokenizer.vocabulary == reference.get_piece_size()


def test_the_fingerprint_follows_the_file_and_the_border_tokens(folder: Path, gcs: Gcs) -> None:
    path = folder / "elsewhere" / "alone.json"
    prints = {
        load_tokenizer(config).fingerprint
        for config in (
            Bytes(),
            HuggingFaceTokenizer(path=str(path)),
            HuggingFaceTokenizer(path=str(path), end_token="<|end|>"),
            SentencePiece(path=str(folder / "small.model")),
        )
    }
    assert len(prints) == 4
    bucket_client().pipe_file(f"{gcs.bucket}/tokenizers/copy.json", path.read_bytes())
    assert load_tokenizer(HuggingFaceTokenizer(path=f"{gcs.url}/tokenizers/copy.json")).fingerprint in prints


@pytest.mark.parametrize("config", [HuggingFaceTokenizer, SentencePiece])
def test_a_file_that_is_missing_or_something_else_is_named(
    config: type[HuggingFaceTokenizer] | type[SentencePiece], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="absent cannot be read: No such file"):
        load_tokenizer(config(path=str(tmp_path / "absent")))
    (tmp_path / "wrong").write_text('{"model": "none"}')
    with pytest.raises(DataError, match="wrong is not a"):
        load_tokenizer(config(path=str(tmp_path / "wrong")))


def test_a_vocabulary_larger_than_the_models_is_refused_before_any_work(configure: Configure, folder: Path, tmp_path: Path) -> None:
    config = configure(
        {"type": "text", "paths": [str(tmp_path / "not there")]},
        vocab_size=299,
        tokenizer={"type": "huggingface", "path": str(folder / "tokenizer.json")},
    )
    with pytest.raises(ConfigError, match=r"model\.vocab_size: is 299, but the tokenizer has 300 tokens"):
        open_data(config)
    assert not (tmp_path / "cache").exists()
