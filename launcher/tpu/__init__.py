"""The accelerator table: which TPU slices exist, how many hosts, chips and devices they have."""

from launcher.tpu.table import Family, Slice, TpuError, families, find_family, resolve, resolve_topology

__all__ = ["Family", "Slice", "TpuError", "families", "find_family", "resolve", "resolve_topology"]
