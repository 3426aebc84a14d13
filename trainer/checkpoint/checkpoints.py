"""The checkpoints of one run: save, list, verify, restore, delete."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import jax

from trainer.checkpoint.arrays import AbstractItem, Item, describe, read, start_writing, warm_up
from trainer.checkpoint.commit import (
    COMMIT_FILE,
    META_FILE,
    QUARANTINE,
    Damaged,
    checkpoint_directory,
    inspect,
    other_steps,
    read_commit,
    verify_contents,
)
from trainer.checkpoint.layout import Leaf, Plan, plan, shorten
from trainer.checkpoint.peers import Peers
from trainer.checkpoint.replicas import ITEM as REPLICAS
from trainer.checkpoint.replicas import read_replicas, replica_problems
from trainer.checkpoint.retention import steps_to_delete
from trainer.checkpoint.saving import Save
from trainer.checkpoint.storage import open_storage
from trainer.checkpoint.trouble import read_error, save_error
from trainer.config.run import Checkpoint
from trainer.errors import CheckpointError, TrainerError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A step that was committed."""

    step: int
    seconds: float  # from when it was asked for, as this process saw it


class Checkpoints:
    """Directory N of `<run_directory>/checkpoints` holds the state after N completed updates.

    Every process creates one and calls every method in the same order, except `check` and `meta`. An item is a flat
    dict of arrays by path; `params`, `opt` and `rest` are separate items, so that parameters can be read alone.
    """

    def __init__(self, config: Checkpoint, run_directory: str) -> None:
        self._config = config
        self._storage = open_storage(checkpoint_directory(run_directory))
        self._peers = Peers()
        self._operations = 0
        self._last_save = ""
        self._verified: set[int] = set()
        self._sound: set[tuple[int, str]] = set()  # of other steps, the items that were verified
        self._skipped: dict[int, str] = {}
        self._save: Save | None = None
        self._news: list[Saved] = []
        self._may_write = False
        self._warm = False

    @property
    def skipped(self) -> Mapping[int, str]:
        """Steps that `latest_step` found unfinished or damaged, with the reason."""
        return self._skipped

    @property
    def in_flight(self) -> int | None:
        """The step whose save is not known to be committed yet."""
        return None if self._save is None else self._save.step

    def latest_step(self, items: tuple[str, ...] | None = None) -> int | None:
        """The newest committed step whose content is what was written; None for a new run. items: all that is asked of it; default:
        everything.

        Steps that are unfinished or damaged are passed over, reported as warnings and kept in `skipped`. Raises
        CheckpointError when the directory cannot be read or is not ours.
        """
        operation, deadline = self._operation("latest")
        found: str | None = None
        if self._peers.is_primary:
            with self._telling(operation, self._read_error):
                inspection = inspect(self._storage)
            found = json.dumps({"steps": inspection.steps, "skipped": list(inspection.skipped.items())})
        verdict = json.loads(self._peers.broadcast(operation, found, deadline=deadline))
        self._skipped = {}
        for step, reason in verdict["skipped"]:
            if step != self.in_flight:
                self._skip(step, reason)
        for step in reversed(verdict["steps"]):
            if not (wrong := self._verify(step, items)):
                return step
            self._skip(step, "; ".join(wrong[:3]))
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """What was given to `save`. Raises CheckpointError where the step is not committed."""
        if step not in self._verified:
            self._require_commit(step)
        return self._document(step)["run"]

    def items(self, step: int) -> frozenset[str]:
        """Names of what the step holds. Raises CheckpointError where it is not committed."""
        if step not in self._verified:
            self._require_commit(step)
        return frozenset(self._document(step)["items"])

    def save(self, step: int, items: Mapping[str, Item], meta: Mapping[str, Any]) -> None:
        """Begin to save; returns when the values are copied off the devices, so the arrays may be donated at once.

        Never skips: while an earlier save is in flight it waits for that one first. Saving a step that is already
        committed does nothing. Raises what made an earlier save fail, and CheckpointError or SaveFailed of its own.
        """
        self.wait()
        if step in self._verified:
            return
        asked_at = time.monotonic()
        self._take_possession(step)
        operation, _ = self._operation(f"save-{step}")
        with self._telling(operation, lambda error: save_error(step, self._storage.root, error)):
            described = {name: {path: asdict(leaf) for path, leaf in describe(item).items()} for name, item in items.items()}
            writing = start_writing(f"{self._storage.root}/{step}", items)
        self._save = Save(
            step=step,
            asked_at=asked_at,
            meta={"step": step, "items": described, "run": meta},
            storage=self._storage,
            peers=self._peers,
            writing=writing,
            timeout_seconds=self._config.save_timeout_seconds,
            operation=operation,
            earlier_operation=self._last_save,
            after_commit=self._delete_old,
        )
        self._last_save = operation

    def check(self) -> None:
        """Raises what made the save in flight fail; otherwise returns at once. Call it every step."""
        save = self._save
        if save is None:
            if not self._warm:
                self._warm = True
                warm_up()
            return
        try:
            committed = save.check()
        except TrainerError:
            self._save = None
            raise
        if committed:
            self._verified.add(save.step)
            self._news.append(Saved(save.step, save.seconds))
            self._save = None

    def newly_committed(self) -> list[Saved]:
        """Steps this process saw committed since it last asked."""
        news, self._news = self._news, []
        return news

    def wait(self) -> None:
        """Until the save in flight is committed. Raises as `check`."""
        if self._save is not None:
            self._save.wait()
            self.check()

    def close(self) -> None:
        """Wait for the save in flight. Raises as `check`."""
        self.wait()

    def restore(self, step: int, abstract_items: Mapping[str, AbstractItem]) -> dict[str, dict[str, jax.Array]]:
        """The named items of a committed step, each tensor with the shape, dtype and sharding of its abstract leaf.

        The mesh, the number of processes, of replicas, and the stacking of layers may differ from those of the save. Files are
        verified first. Raises CheckpointError for a step that is not there or damaged, and for tensors that are
        missing, left over or of another shape or dtype: all of them at once.
        """
        if wrong := self._verify(step, tuple(abstract_items)):
            raise CheckpointError(f"step {step} of {self._storage.root} cannot be restored: {'; '.join(wrong[:3])}")
        document = self._document(step)["items"]
        plans: dict[str, Plan] = {}
        problems: list[str] = []
        replicas: dict[str, Leaf] = {}
        for name, wanted in abstract_items.items():
            saved = {path: Leaf(tuple(leaf["shape"]), leaf["dtype"]) for path, leaf in document.get(name, {}).items()}
            if name == REPLICAS:
                replicas = saved
                problems += [f"{name}: {problem}" for problem in replica_problems(saved, wanted)]
                continue
            plans[name] = plan(saved, describe(wanted))
            problems += [f"{name}: {problem}" for problem in plans[name].problems]
        if problems:
            raise CheckpointError(
                f"step {step} of {self._storage.root} does not fit this model, {len(problems)} problems:\n{shorten(problems)}",
                hint="use the model and optimizer configuration the checkpoint was written with (see its meta.json)",
            )
        folder = f"{self._storage.root}/{step}"
        try:
            meeting = self._meeting if self._config.restore == "one_replica" else None
            found = {name: read(f"{folder}/{name}", made.moves, abstract_items[name], meeting) for name, made in plans.items()}
            if REPLICAS in abstract_items:
                found[REPLICAS] = read_replicas(f"{folder}/{REPLICAS}", replicas, abstract_items[REPLICAS], meeting)
            return found
        except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors
            raise self._read_error(error) from error

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """What this process does inside succeeds on all processes, or fails on all with the cause."""
        operation, deadline = self._operation("read")
        with self._telling(operation, self._read_error):
            yield
        self._peers.barrier(operation, deadline=deadline)

    def _verify(self, step: int, items: tuple[str, ...] | None = None) -> list[str]:
        """What is wrong with the content of a step, all of it or these items; each process reads its share of the files. Agreed on."""
        if step in self._verified or (items is not None and all((step, item) in self._sound for item in items)):
            return []
        operation, deadline = self._operation(f"verify-{step}")
        wrong: list[str] = []
        if self._peers.is_primary or not self._storage.lists_checksums:
            with self._telling(operation, self._read_error):
                wrong = self._verify_share(step, items)
        parts = self._peers.gather(operation, json.dumps(wrong), deadline=deadline)
        together = json.dumps(list(dict.fromkeys(reason for part in parts for reason in json.loads(part))))
        agreed = json.loads(self._peers.broadcast(operation, together if self._peers.is_primary else None, deadline=deadline))
        if not agreed and items is None:
            self._verified.add(step)
        elif not agreed:
            self._sound |= {(step, item) for item in items or ()}
        return agreed

    def _verify_share(self, step: int, items: tuple[str, ...] | None) -> list[str]:
        try:
            commit = read_commit(self._storage, step)
        except Damaged as reason:
            return [str(reason)]
        if self._storage.lists_checksums:  # then reading the commit has compared them
            return []
        needed = sorted(path for path in commit.files if items is None or path.partition("/")[0] in (*items, META_FILE))
        return verify_contents(self._storage, commit, needed[self._peers.index :: self._peers.count])

    def _require_commit(self, step: int) -> None:
        try:
            read_commit(self._storage, step)
        except Damaged as reason:
            words = f"step {step} of {self._storage.root} cannot be used: {reason}"
            raise CheckpointError(words, hint=other_steps(self._storage)) from None
        except OSError as error:
            raise self._read_error(error) from error

    def _document(self, step: int) -> dict[str, Any]:
        try:
            return json.loads(self._storage.read(f"{step}/{META_FILE}"))
        except FileNotFoundError:  # of another slice, which deletes its old steps
            raise CheckpointError(f"step {step} of {self._storage.root} cannot be used: {META_FILE} is not there any more") from None
        except OSError as error:
            raise self._read_error(error) from error

    def _skip(self, step: int, reason: str) -> None:
        self._skipped[step] = reason
        if self._peers.is_primary:
            _log.warning("checkpoint %s of %s is not used: %s", step, self._storage.root, reason)

    def _take_possession(self, first_step: int) -> None:
        """Before the first write: nothing is ever written into what an earlier attempt left behind.

        Unfinished steps are deleted; damaged ones are evidence and move to `quarantine/`.
        """
        if self._may_write:
            return
        operation, deadline = self._operation("possession")
        if self._peers.is_primary:
            with self._telling(operation, lambda error: save_error(first_step, self._storage.root, error)):
                self._clear(first_step)
        self._peers.barrier(operation, deadline=deadline)
        self._may_write = True

    def _clear(self, first_step: int) -> None:
        inspection = inspect(self._storage)
        for step in sorted(inspection.skipped.keys() | self._skipped.keys()):
            if step in inspection.unfinished:
                self._storage.remove_tree(str(step))
            else:
                names = (f"{step}.{n}" if n else str(step) for n in range(len(inspection.quarantined) + 1))
                name = next(name for name in names if name not in inspection.quarantined)
                self._storage.move_tree(str(step), f"{QUARANTINE}/{name}")
                _log.warning("damaged checkpoint %s of %s moved to %s/%s", step, self._storage.root, QUARANTINE, name)
        if first_step in inspection.steps and first_step not in self._skipped:
            raise CheckpointError(
                f"{self._storage.root} already holds a committed step {first_step} that this run did not start from",
                hint="resume from the newest step, or use another run_directory",
            )

    def _delete_old(self, committed: int) -> None:
        """Runs on process 0 after a commit. The commit file goes first: a step that is half deleted does not exist."""
        try:
            steps = {*inspect(self._storage).steps, committed}
            for step in steps_to_delete(steps, keep_last=self._config.keep_last, keep_every_steps=self._config.keep_every_steps):
                self._storage.remove(f"{step}/{COMMIT_FILE}")
                self._storage.remove_tree(str(step))
        except (OSError, CheckpointError) as error:  # too many checkpoints harm less than a lost run; the next save tries again
            _log.warning("old checkpoints of %s could not be deleted: %s", self._storage.root, error)

    @contextmanager
    def _telling(self, operation: str, failure: Callable[[Exception], TrainerError]) -> Iterator[None]:
        """Turn trouble into `failure`, and tell the processes that wait for this one."""
        try:
            yield
        except (OSError, ValueError, CheckpointError) as error:
            raised = failure(error)
            self._peers.fail(operation, str(raised))
            if raised is error:
                raise
            raise raised from error

    def _read_error(self, error: Exception) -> TrainerError:
        return read_error(self._storage.root, error)

    def _operation(self, name: str) -> tuple[str, float]:
        self._operations += 1
        return f"{self._operations}-{name}", time.monotonic() + self._config.save_timeout_seconds
