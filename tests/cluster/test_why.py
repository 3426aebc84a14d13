"""A sample of the situations made again on this cluster: what `why` says of each. All of them, recorded: tests/launcher/test_why.py."""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor

from launcher.backend.kubernetes_scene import REQUESTS
from launcher.observe.cause import Cause
from launcher.observe.why import why
from tests.cluster.record import clear, make
from tests.cluster.situations import SITUATIONS, Situation
from tests.cluster.tools import nnxlaunch, until_told


def judge(situation: Situation) -> str:
    """Empty when all is as it should be."""
    ns = f"w-{situation.name}-{uuid.uuid4().hex[:4]}"
    try:
        backend, job = make(situation, ns)
        before = backend._api.requests
        found = why(backend.scene(job))
        assert backend._api.requests - before <= REQUESTS
        if not right(situation, found):  # controllers and the kubelet may still be on the way to it
            found = until_told(backend, job, situation.code)
        if situation.name == "bad-config":
            typed = nnxlaunch("why", job, "-n", ns, "--output", "json")
            assert json.loads(typed.stdout)["code"] == found.code, typed.stderr
    finally:
        clear(situation, ns)
    return "" if right(situation, found) else f"{situation.name}: {found}"


def right(situation: Situation, found: Cause) -> bool:
    return found.code == situation.code and all(words in found.sentence for words in situation.words) and bool(found.evidence)


def test_why_names_the_cause_of_each_situation_of_the_sample() -> None:
    sample = [situation for situation in SITUATIONS if situation.sampled]
    assert len(sample) >= 10
    with ThreadPoolExecutor(6) as pool:
        wrong = [answer for answer in pool.map(judge, sample) if answer]
    assert not wrong, "\n".join(wrong)
