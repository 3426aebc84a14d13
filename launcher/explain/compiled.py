"""`nnxlaunch compile`: the hardware of a job as the trainer's compiler needs it, and its report as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from launcher.spec import JobSpec
from launcher.tpu import Slice
from trainer.config.target import Target

# Assumed: 200 Gbit/s of network for a host. The link model needs a number; docs/compile.md says so.
DCN_BYTES_PER_SECOND_PER_HOST: Final = 25e9


def target_of(spec: JobSpec) -> Target:
    """Units of a device; those of a chip are shared by its devices."""
    layout, tpu = spec.layout, spec.layout.tpu
    if tpu is None:
        return Target(platform="cpu", name="cpu", slices=spec.world_slices, devices_per_slice=layout.devices_per_slice)
    family = tpu.family
    each = family.devices_per_chip
    return Target(
        platform="tpu",
        name=tpu.name,
        topology=f"{family.name}:{tpu.topology_text}",
        torus=tpu.topology,
        wraps=wraps(tpu),
        slices=spec.world_slices,
        devices_per_slice=layout.devices_per_slice,
        hbm_bytes=int(tpu.hbm_gib_per_device * 2**30),
        peak_flops=tpu.peak_bf16_tflops_per_device * 1e12,
        hbm_bytes_per_second=family.hbm_gbytes_per_s_per_chip * 1e9 / each,
        # The table has both directions of all links of a chip: two of each dim.
        ici_link_bytes_per_second=family.ici_gbytes_per_s_per_chip * 1e9 / (4 * len(tpu.topology)) / each,
        dcn_bytes_per_second=DCN_BYTES_PER_SECOND_PER_HOST / tpu.devices_per_host,
    )


def wraps(tpu: Slice) -> tuple[bool, ...]:
    """Which dims are rings: in three dims all of them where every one is a multiple of 4 (whole cubes), in two those of 16."""
    if len(tpu.topology) == 3:
        return (all(size % 4 == 0 for size in tpu.topology),) * 3
    return tuple(size == 16 for size in tpu.topology)


def described(found: Mapping[str, Any]) -> str:
    """The report of `python -m trainer.aot` as text."""
    mesh = " x ".join(f"{axis}={degree}" for axis, degree in found["mesh"].items()) or "one device"
    lines = [
        f"{found['target']}, slices {found['slices']}, devices {found['devices']}: {mesh}; "
        f"{found['global_batch']} sequences of {found['sequence_length']} a step",
    ]
    if "memory_per_device" not in found:
        return "\n".join([*lines, f"does not fit: {found['compiler']}"])
    lines += _memory(found["memory_per_device"])
    for region in found["collectives"]:
        lines += _region(region)
    lines += _bounds(found["bounds"])
    if found["options"]:
        lines += ["compiler options", *(f"  {name}={_value(value)}" for name, value in found["options"].items())]
    lines.append(f"compiled in {found['seconds']['compile']:.0f} s, after {found['seconds']['lower']:.1f} s of tracing")
    if "saved" in found:
        lines.append(f"saved {found['saved']['path']}, {found['saved']['bytes']:,} bytes")
    return "\n".join(lines)


def _memory(memory: Mapping[str, Any]) -> list[str]:
    sizes = [(name, _gigabytes(memory[name])) for name in ("arguments", "output", "temporaries", "peak", "host") if memory[name]]
    lines = ["memory of a device, GB", *(f"  {name:12}{size:>10}" for name, size in sizes)]
    if memory["capacity"]:
        share = memory["peak"] / memory["capacity"]
        lines.append(f"  {'capacity':12}{_gigabytes(memory['capacity']):>10}  {'fits' if memory['fits'] else 'does not fit'}: {share:.0%}")
    return lines


def _region(region: Mapping[str, Any]) -> list[str]:
    exposed = region["exposed_seconds"]
    note = "" if exposed is None else f", exposed {_milliseconds(exposed)} of an execution"
    times = f"{region['executions']} times" if region["executions"] != 1 else "once"
    lines = [f"{region['region']}, {times} a step{note}"]
    header = ("kind", "", "", "count", "MB", "network", "links", "group", "ms", "algorithm")
    rows = [
        (
            row["kind"],
            row["runs"],
            "overlapped" if row["overlapped"] else "exposed",
            str(row["count"]),
            f"{row['bytes'] / 1e6:,.1f}",
            row["network"],
            str(row["links"]),
            str(row["group"] or "-"),
            "-" if row["seconds"] is None else f"{1e3 * row['seconds']:.3f}",
            row["algorithm"] or "-",
        )
        for row in sorted(region["collectives"], key=lambda row: -row["bytes"])
    ]
    return lines + _columns([header, *rows])


def _bounds(bounds: Mapping[str, Any]) -> list[str]:
    lines = [
        "a step at the least",
        f"  {bounds['flops_per_device'] / 1e12:,.1f} TFLOP of a device ({bounds['flops_convention']})",
        f"  {bounds['arithmetic_intensity']:,.0f} FLOP for each byte of HBM traffic"
        + (f"; {bounds['intensity_needed']:,.0f} are needed to be limited by compute" if bounds["intensity_needed"] else ""),
    ]
    if bounds["seconds"]:
        parts = ", ".join(f"{name} {_milliseconds(value)}" for name, value in bounds["seconds"].items())
        lines.append(f"  {parts}: limited by {bounds['limited_by']}")
        lines.append(f"  collectives that nothing runs beside: {_milliseconds(bounds['exposed_seconds'])}")
    return lines


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"
