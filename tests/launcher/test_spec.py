"""The spec as a person writes it: short forms, the train file, overrides, and where a problem is said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.spec import JobSpec, from_document, from_yaml
from tests.launcher.test_checks import CPU, TPU
from trainer.config import ConfigError, apply_overrides


def refused(document: dict[str, Any], *overrides: str) -> list[tuple[str, str]]:
    """(path, hint) of every problem of form."""
    with pytest.raises(ConfigError) as caught:
        from_document(apply_overrides(document, overrides))
    return [(problem.path, problem.hint) for problem in caught.value.problems]


def test_run_directory_and_cache_follow_from_the_spec() -> None:
    spec = from_document(TPU)
    assert spec.train.run_directory == "gs://bucket/runs/run"
    assert spec.train.data.cache_directory == "gs://bucket/runs/data"
    assert from_document(apply_overrides(TPU, ["directory=gs://b/"])).train.run_directory == "gs://b/run"
    assert from_document(apply_overrides(TPU, ["train.data.cache_directory=gs://b/c"])).train.data.cache_directory == "gs://b/c"


def test_plain_text_is_short_for_a_node() -> None:
    spec = from_document(apply_overrides(TPU, ["capacity=spot", "queue=q", "image=a:1", "placement=none"]))
    assert (spec.capacity.type, spec.container_image.reference, spec.placed.type) == ("spot", "a:1", "none")
    assert spec.queue is not None and spec.queue.name == "q"


@pytest.mark.parametrize(
    ("overrides", "path", "hint"),
    [
        (["train.schedule.warmpu_steps=3"], "train.schedule.warmpu_steps", "did you mean 'warmup_steps'?"),
        (["train.schedule.type=cosin"], "train.schedule.type", "did you mean 'cosine'?"),
        (["train.schedule={type: null}"], "train.schedule.type", "one of: constant, cosine, linear, wsd"),
        (["train.data.sources=[{type: jsonl, pahts: [a]}]"], "train.data.sources.0.pahts", "did you mean 'paths'?"),
        (["train.model.preset=tinny"], "train.model.preset", "did you mean 'tiny'?"),
        (["train.model.segments.0.pattern.0.mlp.hiden=3"], "train.model.segments.0.pattern.0.mlp.hiden", "did you mean 'hidden'?"),
        (["train.model.remat=ful"], "train.model.remat", "did you mean 'full'?"),
        (["capacity={type: spto}"], "capacity.type", "did you mean 'spot'?"),
        (["capacity={type: reservation, nmae: x}"], "capacity.nmae", "did you mean 'name'?"),
        (["env={A: {secretKeyRef: {nmae: x}}}"], "env.A.secretKeyRef.nmae", "did you mean 'name'?"),
        (["env={A: 3}"], "env.A", "put it in quotes"),
        (["volumes=[{type: pvc, clam: x, mount_path: /x}]"], "volumes.0.clam", "did you mean 'claim'?"),
        (["tpu=[1]"], "tpu", "known keys: accelerator, machine, placement_policy, slices, topology, type"),
        (["tpu.tpye=v5p-8"], "tpu.tpye", "did you mean 'type'?"),
        (["cpu={hosts: 1}", "train.steps=x"], "cpu", "remove one of them; on the command line, `--set cpu=null`"),
        (["tpu=null"], "tpu", "such as `tpu: {type: v5e-16}`"),
    ],
)
def test_a_problem_is_where_the_person_wrote_it_with_the_nearest_word(overrides: list[str], path: str, hint: str) -> None:
    assert (path, hint) in refused(TPU, *overrides)


def test_a_missing_part_is_named_once_without_its_consequences() -> None:
    assert refused(TPU, "train.data.sources=[{type: text}]") == [("train.data.sources.0.paths", "")]


def write(folder: Path, document: dict[str, Any], train: Any = None) -> Path:
    (folder / "job.yaml").write_text(yaml.safe_dump(document))
    if train is not None:
        (folder / "train.yaml").write_text(yaml.safe_dump(train))
    return folder / "job.yaml"


def test_train_may_be_a_file_beside_the_spec_and_overrides_reach_into_it(tmp_path: Path) -> None:
    path = write(tmp_path, {**TPU, "train": "train.yaml"}, {**TPU["train"], "run_directory": "elsewhere"})
    spec = from_yaml(path, ["train.steps=7"])
    assert (spec.train.steps, spec.train.run_directory) == (7, "gs://bucket/runs/run")
    assert spec == from_document(apply_overrides(TPU, ["train.steps=7"]))


@pytest.mark.parametrize("name", ["../train.yaml", "/etc/passwd", "link.yaml", "missing.yaml", "a\0b", "", "."])
def test_a_train_file_outside_of_the_folder_or_unreadable_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside.yaml").write_text("steps: 1")
    folder = tmp_path / "spec"
    folder.mkdir()
    (folder / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    with pytest.raises(ConfigError) as caught:
        from_yaml(write(folder, {**TPU, "train": name}))
    assert [problem.path for problem in caught.value.problems] == ["train"]


def test_a_spec_comes_from_standard_input_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path, CPU)
    with path.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert from_yaml("-") == from_yaml(path)


def test_the_hash_changes_with_anything_in_the_spec_and_with_nothing_else() -> None:
    hashes = {from_document(apply_overrides(TPU, [change])).hash for change in ("train.seed=1", "env={A: b}")}
    assert len(hashes | {from_document(TPU).hash}) == 3
    assert from_document(dict(reversed(TPU.items()))).hash == from_document(TPU).hash


def test_a_spec_is_frozen_and_survives_its_own_dump() -> None:
    spec = from_document(TPU)
    with pytest.raises(ValueError, match="frozen"):
        setattr(spec, "name", "other")  # noqa: B010  (a type checker refuses the assignment)
    assert JobSpec.model_validate(spec.model_dump(mode="json")) == spec
