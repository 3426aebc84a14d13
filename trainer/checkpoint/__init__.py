"""Save, commit, verify, restore onto any mesh. `commit`, `storage`, `layout`, `mismatch` and `retention` import no JAX."""
