"""JAX's persistent compile cache: a restarted run loads its programs instead of compiling them."""

from __future__ import annotations

import jax


def enable_compile_cache(path: str) -> None:
    """Keep compiled programs in `path`, a folder or gs://. Call before the first program is compiled.

    Process 0 writes, all read (JAX's own rule). Whoever can write there can run code in the trainer.
    """
    jax.config.update("jax_compilation_cache_dir", path)
    # Everything is kept: a start compiles dozens of small programs, and together they take seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # XLA's own extra caches write to local paths only.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
