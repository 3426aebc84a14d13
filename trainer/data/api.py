"""open_data: from a TrainConfig to splits one can take any batch of."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from trainer.config import ConfigError, Problem, TrainConfig
from trainer.config.data import Synthetic
from trainer.data.content import Content, digest
from trainer.data.order import MAX_SAMPLES, Mixture
from trainer.data.prepare import Packing, Prepared, Report, prepare_source
from trainer.data.split import EvalSplit, Rows, StoredRows, SyntheticRows, TrainSplit
from trainer.data.state import Identity
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.errors import DataError


@dataclass(frozen=True)
class Data:
    train: TrainSplit
    eval: EvalSplit | None
    """None when the config does not evaluate."""
    identity: Identity
    prepared: tuple[Prepared, ...]
    """Of the sources that are files, in the config's order."""

    def state(self, step: int) -> dict[str, Any]:
        """JSON for a checkpoint: `step` batches consumed, so batch `step` is next, and of which data."""
        return {"step": step, "identity": self.identity.to_json()}


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def open_data(config: TrainConfig, *, process_index: int = 0, process_count: int = 1, report: Report = _to_stderr) -> Data:
    """The data of a run; tokenises and packs what the cache does not have yet, sharing the work with the other processes.

    Needs no JAX and no other process. Raises ConfigError for what the document alone, or the tokenizer, rules out,
    before any work; DataError for sources that cannot be used, and when nothing is left to train on or to evaluate.
    """
    tokenizer = _checked_tokenizer(config)
    packing = Packing(config.batch.sequence_length, config.data.held_out)
    cache = config.data.cache_directory or f"{config.run_directory.rstrip('/')}/data"
    global_batch = config.batch.global_batch
    eval_batch = (config.eval and config.eval.global_batch) or global_batch
    train: list[Rows] = []
    held_out: list[Rows] = []
    contents: list[Content] = []
    prepared: list[Prepared] = []
    for source in config.data.sources:
        if isinstance(source, Synthetic):
            rows = source.distinct_batches * global_batch
            shape = {"length": packing.sequence_length, "vocabulary": config.model.vocab_size}
            train.append(SyntheticRows(count=rows, seed=2 * config.seed, **shape))
            held_out.append(SyntheticRows(count=eval_batch, seed=2 * config.seed + 1, **shape))
            contents.append(Content("synthetic", 0, 0, digest(["synthetic", rows, config.model.vocab_size])))
            continue
        assert tokenizer is not None
        found = prepare_source(
            source,
            tokenizer=tokenizer,
            packing_=packing,
            cache=cache,
            process_index=process_index,
            process_count=process_count,
            report=report,
        )
        train.append(StoredRows(found, "train", packing.sequence_length))
        held_out.append(StoredRows(found, "eval", packing.sequence_length))
        contents.append(found.content)
        prepared.append(found)
    _require_rows(config, contents, train, held_out, prepared)
    identity = Identity(tuple(contents), tokenizer.fingerprint if tokenizer else "none", packing)
    common: dict[str, Any] = {
        "sequence_length": packing.sequence_length,
        "vocabulary": config.model.vocab_size,
        "fingerprint": identity.dataset,
        "tokenizer_fingerprint": identity.tokenizer,
    }
    weights = [source.weight for source in config.data.sources]
    return Data(
        train=TrainSplit(
            sources=train,
            global_batch=global_batch,
            weights=weights,
            seed=config.seed,
            shuffle=config.data.shuffle,
            rows_before=config.batch.sequences_before,
            **common,
        ),
        eval=EvalSplit(sources=held_out, global_batch=eval_batch, **common) if config.eval else None,
        identity=identity,
        prepared=tuple(prepared),
    )


def prepare_data(config: TrainConfig, *, processes: int = 1) -> Data:
    """`open_data` with the work of making the cache shared among `processes` of this machine."""
    if processes > 1:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            for share in [pool.submit(_make_share, config, index, processes) for index in range(processes)]:
                share.result()
    return open_data(config)


def _make_share(config: TrainConfig, process_index: int, process_count: int) -> None:
    open_data(config, process_index=process_index, process_count=process_count)


def _checked_tokenizer(config: TrainConfig) -> Tokenizer | None:
    """The tokenizer, None where no source is text. Raises ConfigError for everything that needs no source."""
    problems: list[Problem] = []
    try:
        Mixture([source.weight for source in config.data.sources])
    except ValueError as error:
        problems.append(Problem(path="data.sources", message=str(error), hint="bring the weights closer together", code="weights"))
    if config.steps * config.batch.global_batch > MAX_SAMPLES:
        problems.append(Problem(path="steps", message=f"steps x global_batch is above {MAX_SAMPLES:,} rows", code="steps"))
    synthetic = [isinstance(source, Synthetic) for source in config.data.sources]
    tokenizer = None if all(synthetic) else load_tokenizer(config.data.tokenizer)
    if tokenizer:
        problems += check_tokenizer(tokenizer, config.model.vocab_size)
    if problems:
        raise ConfigError(problems)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> list[Problem]:
    if tokenizer.vocabulary <= vocab_size:
        return []
    return [
        Problem(
            path="model.vocab_size",
            message=f"is {vocab_size:,}, but the tokenizer has {tokenizer.vocabulary:,} tokens",
            hint=f"set model.vocab_size to {tokenizer.vocabulary:,} or more, or choose the tokenizer the model was made for",
            code="vocabulary",
            value=vocab_size,
            limit=tokenizer.vocabulary,
        )
    ]


def _require_rows(config: TrainConfig, contents: list[Content], train: list[Rows], held_out: list[Rows], prepared: list[Prepared]) -> None:
    for content, rows in zip(contents, train, strict=True):
        if not rows.count:
            raise DataError(
                f"{content.source}: nothing to train on: {content.files:,} files of {content.size:,} bytes gave no row",
                hint="add text, or lower data.held_out" if config.data.held_out else "add text",
            )
    if config.eval and not sum(rows.count for rows in held_out):
        documents = sum(sum(source.documents.values()) for source in prepared)
        raise DataError(
            f"nothing to evaluate on: none of {documents:,} documents is held out at data.held_out = {config.data.held_out:g}",
            hint="raise data.held_out, or cut the text into more documents (a text source's separator), or remove eval",
        )
