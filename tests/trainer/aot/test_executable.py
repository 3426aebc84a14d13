"""Why a saved executable is not this job's, part by part. Where nothing differs it runs: tests/launcher/test_compile.py."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.aot.executable import difference

SAVED: dict[str, Any] = {
    "program": "12ab",
    "versions": {"jax": "0.10.0", "jaxlib": "0.10.0", "libtpu": "0.0.40"},
    "options": {"xla_tpu_a": "true"},
    "flags": {"LIBTPU_INIT_ARGS": "--a"},
    "device_kind": "TPU v5p",
    "devices": [[0, 0, 0, 0, 0], [1, 0, 1, 0, 0]],
}
CONFIG = {"steps": 10, "model": {"width": 32, "remat": "full"}, "mesh": {"ici": {"fsdp": 2}}}
WIDER = {**CONFIG, "model": {"width": 64, "remat": "full"}, "mesh": {"ici": {"fsdp": -1}}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "nothing": ({}, CONFIG, None),
    "a config of the same program": ({}, {**CONFIG, "steps": 20}, None),
    "jax": ({"versions": {**SAVED["versions"], "jax": "0.10.1"}}, CONFIG, "jax was '0.10.0', now '0.10.1'"),
    "libtpu": ({"versions": {**SAVED["versions"], "libtpu": "0.0.41"}}, CONFIG, "libtpu was '0.0.40', now '0.0.41'"),
    "no libtpu": ({"versions": {"jax": "0.10.0", "jaxlib": "0.10.0"}}, CONFIG, "libtpu was '0.0.40', now None"),
    "an option": ({"options": {"xla_tpu_a": "false"}}, CONFIG, "xla_tpu_a was 'true', now 'false'"),
    "a flag": ({"flags": {}}, CONFIG, "LIBTPU_INIT_ARGS was '--a', now None"),
    "the generation": ({"device_kind": "TPU v5 lite"}, CONFIG, "devices were TPU v5p, now TPU v5 lite"),
    "the topology": ({"devices": SAVED["devices"][:1]}, CONFIG, "it was compiled for 2 devices, there are 1"),
    "the order of devices": ({"devices": SAVED["devices"][::-1]}, CONFIG, "devices are numbered in another order"),
    "the spec": ({"program": "34cd"}, WIDER, "the program is another one (model.width, mesh.ici.fsdp)"),
    "the code": ({"program": "34cd"}, CONFIG, "the program is another one (the code changed)"),
    "two of them": (
        {"program": "34cd", "options": {}}, WIDER,
        "xla_tpu_a was 'true', now None; the program is another one (model.width, mesh.ici.fsdp)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_what_differs_is_said_with_both_values(what: str) -> None:
    present, config, wanted = CASES[what]
    assert difference(SAVED, {**SAVED, **present}, CONFIG, config) == wanted
