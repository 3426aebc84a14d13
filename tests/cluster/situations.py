"""Situations a job can be in, each made on a real control plane, with what `why` must say about it.

`python -m tests.cluster.record` makes all of them and keeps what the launcher reads of each in tests/launcher/situations;
tests/launcher/test_why.py judges the answers from there, tests/cluster/test_why.py makes a sample of them again.
"""

from __future__ import annotations

from tests.cluster import situations_of_pods, situations_of_queues
from tests.cluster.situation import SITUATIONS, Situation, Step

__all__ = ["SITUATIONS", "Situation", "Step", "situations_of_pods", "situations_of_queues"]
