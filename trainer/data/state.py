"""What a checkpoint keeps of the data, and what differs when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainer.data.content import Content, digest
from trainer.data.prepare import Packing


@dataclass(frozen=True)
class Difference:
    """`name` (`data`, `tokenizer` or `packing`) is what `checkpoint.allow_mismatch` accepts it by."""

    name: str
    message: str


@dataclass(frozen=True)
class Identity:
    """Everything besides seed and config that decides the content of batch n."""

    contents: tuple[Content, ...]
    tokenizer: str
    packing: Packing

    @property
    def dataset(self) -> str:
        return digest([content.fingerprint for content in self.contents])

    def to_json(self) -> dict[str, Any]:
        sources = [asdict(content) for content in self.contents]
        return {"dataset": self.dataset, "sources": sources, "tokenizer": self.tokenizer, "packing": asdict(self.packing)}


def differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[Difference]:
    """Between two values of `Data.state`: what makes the same step number mean other rows, one sentence each."""
    old, new = saved["identity"], present["identity"]
    found: list[Difference] = []
    if old["dataset"] != new["dataset"]:
        changed = f"{old['dataset']} -> {new['dataset']}"
        found.append(Difference("data", f"the data set changed ({changed}): {_sources(old['sources'], new['sources'])}"))
    if old["tokenizer"] != new["tokenizer"]:
        found.append(Difference("tokenizer", f"the tokenizer changed ({old['tokenizer']} -> {new['tokenizer']})"))
    before, after = old["packing"], new["packing"]
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if keys:
        changes = ", ".join(f"{key} {before.get(key)} -> {after.get(key)}" for key in keys)
        found.append(Difference("packing", f"the packing changed: {changes}"))
    return found


def _sources(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str:
    if len(old) != len(new):
        return f"{len(old)} sources -> {len(new)} sources"
    return "; ".join(
        f"source {i} ({after['source']}): {_amount(before)} -> {_amount(after)}"
        for i, (before, after) in enumerate(zip(old, new, strict=True))
        if before["fingerprint"] != after["fingerprint"]
    )


def _amount(source: dict[str, Any]) -> str:
    return f"{source['files']:,} files, {source['size']:,} bytes"
