"""Default compiler options: those of the device kind, under the config's own; each says why it is there."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import yaml
from jax.experimental import topologies
from jax.sharding import Mesh

from tests.trainer.configs import config, layout
from trainer.config.compiler import Compiler
from trainer.config.problem import ConfigError
from trainer.parallel import compiler
from trainer.parallel.compiler import check_options, compiler_options

OFFLOADED = "xla_tpu_enable_sparse_core_collective_offload_all_gather"


def described(topology: str, slices: int) -> np.ndarray:
    """Devices of so many slices that are not here, slice after slice."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TPU_SKIP_MDS_QUERY", "1")
        environment.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        options = {"num_slices": slices} if slices > 1 else {}
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    return np.array(sorted(devices, key=lambda device: getattr(device, "slice_index", 0)))


@pytest.fixture(scope="module")
def v5p() -> Mesh:
    return Mesh(described("v5p:2x2x1", 1), ("fsdp",))


def test_the_options_of_a_kind_hold_until_the_config_says_otherwise(v5p: Mesh) -> None:
    found = compiler_options(config().compiler, v5p)
    assert found is not None and found[OFFLOADED] is True
    changed = config(f"compiler.options.{OFFLOADED}=null", "compiler.options.xla_tpu_scoped_vmem_limit_kib=1024").compiler
    assert compiler_options(changed, v5p) == {**{name: value for name, value in found.items() if name != OFFLOADED},
                                              "xla_tpu_scoped_vmem_limit_kib": 1024}  # fmt: skip
    assert compiler_options(config("compiler.default_options=false").compiler, v5p) is None


def test_they_hold_on_meshes_of_the_axes_they_were_tried_on_that_split_weights(v5p: Mesh) -> None:
    alone = compiler_options(config().compiler, v5p)
    for other in ("data", "tensor", "stage"):
        assert compiler_options(config().compiler, Mesh(v5p.devices.reshape(2, 2), (other, "fsdp"))) == alone
    assert compiler_options(config().compiler, Mesh(v5p.devices, ("tensor",))) is None
    assert compiler_options(config().compiler, Mesh(v5p.devices.reshape(2, 2), ("diloco", "fsdp"))) is None


def test_slices_that_hold_copies_of_the_weights_have_the_options_of_one() -> None:
    devices = described("v6e:2x2", 2)
    alone = compiler_options(config().compiler, Mesh(devices[:4], ("fsdp",)))
    for copies in ((devices.reshape(2, 4), ("data", "fsdp")), (devices.reshape(2, 2, 2), ("stage", "fsdp", "tensor"))):
        assert alone is not None and compiler_options(config().compiler, Mesh(*copies)) == alone
    assert compiler_options(config().compiler, Mesh(devices, ("fsdp",))) is None  # weights would be gathered between slices
    assert compiler_options(config().compiler, Mesh(devices.reshape(4, 2), ("data", "fsdp"))) is None


def test_devices_without_options_of_their_own_have_none() -> None:
    assert compiler_options(config().compiler, layout(config()).mesh) is None


def test_every_default_has_a_value_and_a_reason() -> None:
    table = yaml.safe_load((compiler.resources.files("trainer.parallel") / "compiler_options.yaml").read_text(encoding="utf-8"))
    entries = [entry for kind in table.values() for entry in kind["options"].values()]
    assert all(entry.keys() == {"value", "reason"} and entry["reason"] for entry in entries)


def test_options_the_compiler_does_not_know_are_refused_by_name_and_known_ones_are_taken() -> None:
    known = Compiler(options={"xla_cpu_enable_fast_math": False})
    check_options(known, jax.devices()[0])
    with pytest.raises(ConfigError) as refused:
        check_options(Compiler(options={**known.options, "xla_no_such_option": True}), jax.devices()[0])
    assert [(problem.path, problem.value) for problem in refused.value.problems] == [("compiler.options.xla_no_such_option", True)]
