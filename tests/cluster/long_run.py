"""A job of the real trainer whose log is followed while things happen to it."""

from __future__ import annotations

import re
import subprocess
import threading

from launcher.backend.kubernetes import KubernetesBackend
from launcher.observe.report import Report, report
from tests.cluster.tools import PATIENCE_SECONDS


class Run:
    """Waits are for lines of process 0."""

    def __init__(self, backend: KubernetesBackend, name: str) -> None:
        self.backend, self.name = backend, name
        self.lines: list[str] = []
        self.read = 0
        self.committed = 0
        self._more = threading.Condition()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        for line in self.backend.logs(self.name, follow=True, slice_index=0, worker=0):
            with self._more:
                self.lines.append(line.text)
                self._more.notify()

    def until(self, pattern: str) -> re.Match[str]:
        """The next line that matches, of those not looked at yet."""

        def found() -> re.Match[str] | None:
            while self.read < len(self.lines):
                self.read += 1
                if match := re.search(pattern, self.lines[self.read - 1]):
                    return match
            return None

        with self._more:
            match = self._more.wait_for(found, PATIENCE_SECONDS)
        assert match, f"no {pattern!r} in:\n" + "\n".join(self.lines[-60:])
        return match

    def commits(self) -> None:
        """A newer checkpoint than all before it."""
        while (step := int(self.until(r"checkpoint committed: step (\d+)")[1])) <= self.committed:
            pass
        self.committed = step

    def goes_on(self) -> None:
        """By itself, from its last checkpoint, to a newer one."""
        assert int(self.until(r"resumed: step (\d+)")[1]) >= self.committed
        self.commits()

    def pod(self, worker: int) -> str:
        (name,) = (pod.name for pod in self.backend.get(self.name).pods if pod.worker == worker and not pod.leaving)
        return name

    def execute(self, worker: int, program: str) -> str:
        """In the container of a host, which may be gone before it is done; what it prints."""
        command = ["kubectl", "-n", self.backend.namespace, "exec", self.pod(worker), "--", "python", "-c", program]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
        return done.stdout

    def told(self) -> Report:
        return report(self.backend.scene(self.name))
