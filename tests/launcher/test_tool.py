"""A command and the program of the trainer it runs end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background is started without
from launcher.cli.tool import run_trainer_module
sys.exit(run_trainer_module("waits", [], needs="json").returncode)
"""
PROGRAM = "import os, signal\nprint(os.getpid(), flush=True)\nsignal.pause()\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_a_command_ends_the_program_it_runs(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as command:
        assert command.stdout is not None
        program = int(command.stdout.readline())
        command.send_signal(number)
        assert command.wait(60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(program, 0)
