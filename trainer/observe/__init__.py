"""What a run tells: metrics, their writers, the header, profiles; and the compile cache."""

from trainer.observe.compile_cache import enable_compile_cache
from trainer.observe.header import config_hash, make_header
from trainer.observe.metrics import read
from trainer.observe.profiler import Profiler
from trainer.observe.reporter import Reporter

__all__ = ["Profiler", "Reporter", "config_hash", "enable_compile_cache", "make_header", "read"]
