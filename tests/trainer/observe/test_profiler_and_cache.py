"""Traces of chosen steps, and a second start that compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from tests.gcs_emulator import Gcs
from trainer.checkpoint.storage import open_storage
from trainer.config.run import Profiler as ProfilerConfig
from trainer.observe import Profiler


def traced(directory: str, config: ProfilerConfig | None, process_index: int, first: int = 0) -> None:
    profiler = Profiler(config, directory, process_index)
    step = jax.jit(lambda x: x + 1)
    for n in range(first, 4):
        profiler.before(n)
        profiler.after(n, {"loss": step(jnp.float32(n))})
    profiler.close()


def test_chosen_steps_are_traced_on_chosen_processes_also_when_a_run_resumes_among_them(tmp_path: Path) -> None:
    config = ProfilerConfig(first_step=1, last_step=2, processes=(1,))
    traced(str(tmp_path / "none"), None, 0)
    traced(str(tmp_path / "other"), config, 0)
    traced(str(tmp_path / "after"), config, 1, first=3)
    traced(str(tmp_path / "within"), config, 1, first=2)
    traces = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.xplane.pb")]
    assert len(traces) == 1 and traces[0].startswith("within/profile/process-1/plugins/profile/")


def test_a_trace_still_running_at_the_end_is_written(tmp_path: Path) -> None:
    traced(str(tmp_path), ProfilerConfig(first_step=3, last_step=100), 0)
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_traces_reach_gs(gcs: Gcs) -> None:
    traced(f"{gcs.url}/run", ProfilerConfig(first_step=1, last_step=1), 0)
    assert any(name.endswith(".xplane.pb") for name in open_storage(f"{gcs.url}/run/profile/process-0").files())


CACHED = """
import sys, jax
from jax.experimental.compilation_cache import compilation_cache
from trainer.observe import enable_compile_cache
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
for path in sys.argv[1:]:
    compilation_cache.reset_cache()
    jax.clear_caches()
    events.clear()
    enable_compile_cache(path)
    jax.jit(lambda x: x * 2 + 1)(1.0).block_until_ready()
    print(events.count("/jax/compilation_cache/cache_hits"), events.count("/jax/compilation_cache/cache_misses"))
"""


def cached(*paths: str) -> list[list[int]]:
    """Cache hits and misses at each path of a fresh process that compiles small programs."""
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", CACHED, *paths], env=environment, capture_output=True, text=True, check=True)
    return [[int(count) for count in line.split()] for line in done.stdout.splitlines()]


def test_a_second_process_finds_every_program_in_the_compile_cache_of_a_folder_and_of_gs(tmp_path: Path, gcs: Gcs) -> None:
    paths = str(tmp_path / "cache"), f"{gcs.url}/cache"
    first, second = cached(*paths), cached(*paths)
    assert len(first) == 2 and all(hits == 0 and misses > 0 for hits, misses in first)
    assert second == [[misses, 0] for _, misses in first]
