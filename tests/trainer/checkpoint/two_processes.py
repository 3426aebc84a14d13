"""One of two JAX processes with four devices each; started by test_processes. Prints one JSON line per scenario.

python -m tests.trainer.checkpoint.two_processes INDEX PORT DIRECTORY...
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax._src import distributed
from jax._src.interpreters import pxla
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tests.trainer.checkpoint.states import abstract, differences, mesh, state
from trainer.checkpoint import Checkpoints, arrays
from trainer.checkpoint.commit import committed_steps
from trainer.checkpoint.layout import Same
from trainer.config.run import Checkpoint
from trainer.errors import TrainerError


def resume_and_save(directory: str) -> dict[str, Any]:
    """Step 10 was saved by one process on another mesh, stacked; 20 to 40 are saved here, unrolled."""
    checkpoints = Checkpoints(Checkpoint(keep_last=2), directory)
    on = mesh(4, 2)
    first = checkpoints.latest_step()
    assert first is not None
    wrong = differences(checkpoints.restore(first, abstract(on, unrolled=True)), first, on, unrolled=True)
    states = {step: state(step, on, unrolled=True) for step in (20, 30, 40)}
    programs = count_programs()
    for step, live in states.items():
        checkpoints.save(step, live, {"processes": jax.process_count()})
        checkpoints.check()
    checkpoints.wait()
    latest = checkpoints.latest_step()
    messages = [key for key, _ in distributed.global_state.client.key_value_dir_get(f"{checkpoints._peers._scope}/") if "save" in key]
    saves = len({key.split("/")[-2] for key in messages})
    return {"first": first, "wrong": wrong, "latest": latest, "steps": committed_steps(directory), "programs": programs, "messages": saves}


def one_fails(directory: str) -> dict[str, Any]:
    """Process 1 cannot write; both must learn of it at a `check`, long before the deadline."""
    checkpoints = Checkpoints(Checkpoint(), directory)
    live = state(50, mesh(8))
    checkpoints.latest_step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if jax.process_index() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    start = time.monotonic()
    checkpoints.save(50, live, {})
    try:
        while checkpoints.in_flight:
            checkpoints.check()
            time.sleep(0.01)
    except TrainerError as error:
        seconds = time.monotonic() - start
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return {"error": str(error), "code": int(error.exit_code), "seconds": seconds, "latest": checkpoints.latest_step()}
    raise AssertionError("the save was committed")


def damaged(directory: str) -> dict[str, Any]:
    """A bit of the newest step is flipped in a file that process 1 verifies or not: both fall back together."""
    checkpoints = Checkpoints(Checkpoint(), directory)
    return {"latest": checkpoints.latest_step(), "skipped": [*checkpoints.skipped]}


def one_reads(directory: str) -> dict[str, Any]:
    """Step 10 restored with data=2 over the processes, as it was saved and unrolled: by all, then by the first replica alone."""
    on = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    found: dict[str, Any] = {}
    for restore in ("all_replicas", "one_replica"):
        checkpoints = Checkpoints(Checkpoint(restore=restore), directory)
        before, wrong = bytes_read(), list[str]()
        for unrolled in (False, True):
            wrong += differences(checkpoints.restore(10, abstract(on, unrolled=unrolled)), 10, on, unrolled=unrolled)
        found[restore] = {"wrong": wrong, "bytes": bytes_read() - before}
    return found


def reader_fails(directory: str) -> dict[str, Any]:
    """The replica that reads for both cannot: both learn the cause."""
    on = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    checkpoints = Checkpoints(Checkpoint(restore="one_replica"), directory)
    leaf = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=NamedSharding(on, PartitionSpec()))
    read, wanted = arrays._read_here, {"embed/table": leaf}

    def fails(folder: str, wanted: Any) -> Any:
        if wanted:
            raise OSError(5, "Input/output error")
        return read(folder, wanted)

    arrays._read_here = fails
    try:
        with checkpoints._telling("unused", checkpoints._read_error):
            arrays.read(f"{directory}/checkpoints/10/params", (Same("embed/table"),), wanted, checkpoints._meeting)
    except TrainerError as error:
        return {"error": str(error), "code": int(error.exit_code)}
    finally:
        arrays._read_here = read
    raise AssertionError("it was read")


def bytes_read() -> int:
    """By TensorStore in this process so far, from files and buckets."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/")
    return sum(
        value["value"] for metric in metrics if metric["name"].endswith(("file/bytes_read", "gcs/bytes_read")) for value in metric["values"]
    )


def count_programs() -> list[str]:
    """Names of the programs run from now on."""
    programs: list[str] = []
    call = pxla.ExecuteReplicated.__call__

    def counted(self: Any, *arguments: Any) -> Any:
        programs.append(self.name)
        return call(self, *arguments)

    jax.clear_caches()
    pxla.ExecuteReplicated.__call__ = counted
    return programs


def main() -> None:
    index, port, *directories = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, 2, int(index), coordinator_bind_address=address, cluster_detection_method="deactivate")
    scenarios = {
        "one_reads": one_reads,
        "reader_fails": reader_fails,
        "resume_and_save": resume_and_save,
        "one_fails": one_fails,
        "damaged": damaged,
    }
    for scenario in directories:
        name, _, directory = scenario.partition("=")
        print(json.dumps(scenarios[name](directory)), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
