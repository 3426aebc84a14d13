"""Devices of a TPU that is not here: libtpu knows every generation by the words the compile command uses for it."""

from __future__ import annotations

from itertools import product

import pytest

from trainer.aot.lower import devices_of
from trainer.config.target import Target

CASES = [
    ("v4:2x2x4", (2, 2, 4), 16, "TPU v4"),
    ("v5e:4x4", (4, 4), 16, "TPU v5 lite"),
    ("v5p:2x2x4", (2, 2, 4), 16, "TPU v5"),
    ("v6e:4x4", (4, 4), 16, "TPU v6 lite"),
    ("tpu7x:2x2x2", (2, 2, 2), 16, "TPU7x"),
]


@pytest.mark.parametrize(("topology", "torus", "count", "kind"), CASES, ids=[case[0] for case in CASES])
def test_a_slice_has_as_many_devices_as_jax_sees_at_run_time(
    topology: str, torus: tuple[int, ...], count: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    wraps = tuple(False for _ in torus)
    found = devices_of(Target(platform="tpu", name=topology, topology=topology, torus=torus, wraps=wraps, devices_per_slice=count))
    assert {device.device_kind for device in found} == {kind}
    assert len(found) == count
    places = {tuple(device.coords)[: len(torus)] for device in found}
    assert places == set(product(*(range(size) for size in torus)))
