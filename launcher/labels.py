"""Labels that say whose an object is, what a node has and what follows from that, for those who look and need no spec. Imports nothing, so
looking is fast."""

from __future__ import annotations

from typing import Final

MANAGED_BY_LABEL: Final = "app.kubernetes.io/managed-by"
MANAGED_BY: Final = "nnxlaunch"
XPK_LABEL: Final = "xpk.google.com/workload"
"""What XPK and the dashboards made for it select jobs by."""

DEFAULT_CONTAINER_ANNOTATION: Final = "kubectl.kubernetes.io/default-container"

ACCELERATOR_LABEL: Final = "cloud.google.com/gke-tpu-accelerator"
TOPOLOGY_LABEL: Final = "cloud.google.com/gke-tpu-topology"
SPOT_LABEL: Final = "cloud.google.com/gke-spot"
SPOT_GRACE_SECONDS: Final = 30
"""A spot node goes about 30 seconds after its notice, whatever the pod asks for; some 15 of them are the pod's."""
