"""Policies of rematerialisation, for `jax.checkpoint`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import jax

from trainer.config.remat import RematPolicy, RematTensors, tensors_of

Policy = Callable[..., bool]

# By what a product is, not by what it is called.
_POLICIES: Final[dict[RematPolicy, Policy]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
}


def policy_of(remat: RematPolicy | RematTensors) -> Policy | None:
    """What the backward pass keeps of a block, tensors by the names the model gives them; None where everything is kept."""
    if remat == "none":
        return None
    named = tensors_of(remat)
    if named is None:
        assert not isinstance(remat, RematTensors)
        return _POLICIES[remat]
    if not named.offload:
        return jax.checkpoint_policies.save_only_these_names(*named.keep)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(named.keep),
        names_which_can_be_offloaded=list(named.offload),
        offload_src="device",
        offload_dst="pinned_host",
    )
