"""One process for all trainer tests: eight CPU devices, strict numerics. Set before anything imports JAX.

Compiled code is not optimised: these programs run for milliseconds and compiling them is most of the work."""

import os

from hypothesis import settings

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

pytest_plugins = ["tests.gcs_emulator"]

# No time limit for an example: a loaded machine is no fault of the code.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
