"""The TPU table against facts of Google Cloud's pages and of three other launchers, counted independently."""

from __future__ import annotations

import math

import pytest

from launcher.tpu import Slice, TpuError, families, resolve, resolve_topology


@pytest.mark.parametrize(
    ("name", "topology", "hosts", "chips", "devices", "machine"),
    [
        ("v4-8", "2x2x1", 1, 4, 4, "ct4p-hightpu-4t"),
        ("v4-128", "4x4x4", 16, 64, 64, "ct4p-hightpu-4t"),
        ("v4-4096", "8x16x16", 512, 2048, 2048, "ct4p-hightpu-4t"),
        ("v5e-1", "1x1", 1, 1, 1, "ct5lp-hightpu-1t"),
        ("v5e-16", "4x4", 4, 16, 16, "ct5lp-hightpu-4t"),
        ("v5litepod-256", "16x16", 64, 256, 256, "ct5lp-hightpu-4t"),
        ("v5p-8", "2x2x1", 1, 4, 4, "ct5p-hightpu-4t"),
        ("v5p-128", "4x4x4", 16, 64, 64, "ct5p-hightpu-4t"),
        ("v5p-768", "4x8x12", 96, 384, 384, "ct5p-hightpu-4t"),
        ("v5p-12288", "16x16x24", 1536, 6144, 6144, "ct5p-hightpu-4t"),
        ("v6e-4", "2x2", 1, 4, 4, "ct6e-standard-4t"),
        ("trillium-256", "16x16", 64, 256, 256, "ct6e-standard-4t"),
        ("tpu7x-2", "1x1x1", 1, 1, 2, "tpu7x-standard-1t"),
        ("ironwood-128", "4x4x4", 16, 64, 128, "tpu7x-standard-4t"),
        ("tpu7x-18432", "16x24x24", 2304, 9216, 18432, "tpu7x-standard-4t"),
    ],
)
def test_a_known_type_has_its_known_numbers(name: str, topology: str, hosts: int, chips: int, devices: int, machine: str) -> None:
    one = resolve(name)
    assert (one.topology_text, one.hosts, one.chips, one.devices, one.machine) == (topology, hosts, chips, devices, machine)


def test_every_name_in_the_table_is_a_shape_of_its_family_with_the_number_the_name_says() -> None:
    for family in families().values():
        for count, topology in family.names.items():
            machines = [machine for machine, _ in family.hosts_of(tuple(map(int, topology.split("x"))))]
            for machine in machines:
                one = resolve(f"{family.name}-{count}", machine=machine)
                assert one.topology_text == topology and one.name == f"{family.name}-{count}"
                assert one.chips * family.units_per_chip == count
                assert one.hosts * one.chips_per_host == one.chips and one.hosts * one.devices_per_host == one.devices


@pytest.mark.parametrize(("name", "shapes"), [("v4", 800), ("v5p", 414), ("tpu7x", 433)])
def test_the_shape_rule_gives_as_many_topologies_as_the_published_lists(name: str, shapes: int) -> None:
    family = families()[name]
    assert family.cubes is not None
    most = 64 * family.cubes.max
    found = sum(
        family.has((a, b, c))
        for a in range(4, 257, 4)
        for b in range(4, min(256, most // (4 * a)) + 1, 4)
        for c in range(4, min(256, most // (a * b)) + 1, 4)
    )
    assert found + len(family.topologies) == shapes


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("v5p-120", "tpu-size", "v5p-64 (2x4x4), v5p-128 (4x4x4)"),
        ("v5p-7", "tpu-size", "v5p-8"),
        ("v6e-512", "tpu-size", "v6e-256"),
        ("v4-640", "tpu-topology-needed", "v4-4x4x20"),
        ("tpu7x-16640", "tpu-topology-needed", "tpu7x-4x20x104"),
        ("v6e-8", "tpu-ambiguous", "`machine: ct6e-standard-8t` (1 host of 8 chips)"),
        ("v5e-2x4", "tpu-ambiguous", "`machine: ct5lp-hightpu-4t` (2 hosts of 4 chips)"),
        ("v5p-8x4x4", "tpu-topology", "4x4x8"),
        ("v5p-4x4x5", "tpu-topology", "multiples of 4"),
        ("v6e-32x32", "tpu-topology", "16x16"),
        ("tpu7-128", "tpu-family", "tpu7x-128"),
        ("v6f-16", "tpu-family", "v6e-16"),
        ("h100-8", "tpu-family", "v5p"),
        ("v5p", "tpu-size", "v5p-16"),
        ("v5p-١٦", "tpu-size", "v5p-16"),
        ("v5p-1e3", "tpu-size", "v5p-16"),
        ("v5p--8", "tpu-family", "v5p"),
        ("v5p-" + "9" * 4000, "tpu-size", "v5p-16"),
        ("", "tpu-family", "v5p"),
    ],
)
def test_a_type_that_is_not_one_is_refused_with_those_that_are(name: str, code: str, said: str) -> None:
    with pytest.raises(TpuError) as caught:
        resolve(name)
    assert caught.value.code == code and said in caught.value.hint
    assert len(str(caught.value)) < 200


def test_a_machine_type_settles_what_the_topology_leaves_open() -> None:
    assert (resolve("v6e-8", machine="ct6e-standard-8t").hosts, resolve("v6e-2x4", machine="ct6e-standard-4t").hosts) == (1, 2)
    with pytest.raises(TpuError, match="cannot carry"):
        resolve("v6e-16", machine="ct6e-standard-8t")


def test_a_family_answers_to_its_aliases_and_its_gke_label() -> None:
    def of(accelerator: str) -> Slice:
        return resolve_topology(accelerator, "4x4")

    assert of("v5e") == of("V5litepod") == of("tpu-v5-lite-podslice")
    assert of("trillium") == of("tpu-v6e-slice")


@pytest.mark.parametrize("name", ["v5", "V5-8", "v5-4x4"])
def test_the_beginning_of_several_families_names_all_of_them_and_guesses_none(name: str) -> None:
    with pytest.raises(TpuError, match="'v5' is ambiguous: v5e, v5p begin") as caught:
        resolve(name)
    size = name[2:]
    assert caught.value.hint == f"one of 'v5e{size}', 'v5p{size}'" and caught.value.code == "tpu-family"


def test_the_beginning_of_one_family_is_a_near_miss() -> None:
    with pytest.raises(TpuError) as caught:
        resolve("v6-16")
    assert caught.value.hint == "did you mean 'v6e-16'?"


def test_hbm_and_peak_are_those_of_a_device() -> None:
    ironwood = resolve("tpu7x-8")
    assert (ironwood.hbm_gib_per_device, ironwood.peak_bf16_tflops_per_device) == (96, 1153.5)
    assert math.isclose(resolve("v5p-8").peak_bf16_tflops_per_device, 459)
