"""The trainer proper, a child of `python -m trainer`: read the config, run, turn every ending into an exit code."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.attempts import after_its_last_log, how_it_ended, log_stem, numbered, require_progress
from trainer.config import ConfigError, Problem, load_train_config
from trainer.config.diloco import worlds_apart
from trainer.contract import ATTEMPT_ENDED, DEVICES_PER_HOST, HINT, JOB_UID, Exit, slice_directory
from trainer.distributed import enter_own_world, lost_connection, lost_peer, rank_from_environment, shutdown
from trainer.distributed.preemption import install_handlers
from trainer.errors import TrainerError
from trainer.parent import link
from trainer.parent.installed import require_jax
from trainer.worlds.rounds import decided_rounds


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    link.attach()
    install_handlers()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    options = _options(arguments)
    try:
        code = _train(options)
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        _leave(Exit.CONFIG, str(error.problems[0]))
    except TrainerError as error:
        if error.exit_code != Exit.PREEMPTED:
            words = str(error) + (f"\n{HINT}{error.hint}" if error.hint else "")
            print(f"error: {words}", file=sys.stderr)
            _leave(error.exit_code, words)
        code, message = error.exit_code, str(error)
    except Exception as error:  # the one place where everything ends
        traceback.print_exc()
        _leave(*unexpected(error, rank_from_environment(os.environ).process_count))
    else:
        message = ""
    link.tell(exit_code=int(code), message=message)
    shutdown()
    sys.exit(code)


def _train(options: argparse.Namespace) -> Exit:
    config = load_train_config(options.config, options.set)
    if worlds_apart(config):
        enter_own_world(os.environ)
    rank = rank_from_environment(os.environ)
    require_jax()
    require_directory(config.run_directory)
    link.tell(processes=rank.process_count)
    job, attempt, slice_index = os.environ.get(JOB_UID, ""), rank.attempt, rank.slice_index + rank.replica
    if job:
        attempt = after_its_last_log(config.run_directory, slice_index, rank.worker)
    link.keep_output(config.run_directory, log_stem(attempt, slice_index, rank.worker))
    if rank.process_index == 0:
        hosts = [(index + rank.replica, worker) for index, worker in rank.hosts]
        if attempt and (end := how_it_ended(config.run_directory, attempt - 1, hosts)):
            print(f"{ATTEMPT_ENDED} {attempt - 1}: {end}", flush=True)
        directory = slice_directory(config.run_directory, rank.replica)
        rounds = decided_rounds(config.run_directory) if worlds_apart(config) else 0
        require_progress(directory, numbered(directory, rank.attempt, job), rounds=rounds)
    prepare_environment()
    from trainer.run import run

    return run(config)


def require_directory(path: str) -> None:
    """Raises ConfigError where the run directory `path` is a local one that cannot be made. What is on gs:// shows later."""
    if "://" in path:
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        message = f"cannot be made: {error.filename}: {error.strerror}"
        raise ConfigError([Problem(path="run_directory", message=message, hint="name another one", code="directory")]) from None


def unexpected(error: Exception, processes: int) -> tuple[Exit, str]:
    """The exit code for an exception that is not one of ours, and what to say."""
    words = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    if processes > 1:
        return (Exit.PEER if lost_peer(error) else Exit.SOFTWARE), words
    if lost_connection(error):
        return Exit.PEER, f"the connection to storage failed, a restart may cure it: {words}"
    return Exit.SOFTWARE, words


def prepare_environment() -> None:
    """What JAX reads when it is imported. On the CPU target a host's devices are made up."""
    devices = os.environ.get(DEVICES_PER_HOST)
    if devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_NUM_CPU_DEVICES"] = devices


def _leave(code: Exit, message: str) -> NoReturn:
    """End at once: the others must not be seen to end first, and no meeting of all processes can succeed any more."""
    link.tell(exit_code=int(code), message=message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer", description="Train from one TrainConfig document.",
        epilog="python -m trainer smoke: train, save and resume on 8 made-up CPU devices, and compare every bit.",
    )  # fmt: skip
    parser.add_argument("--config", required=True, metavar="FILE", help="the TrainConfig, YAML or JSON")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override one key; may be given several times")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
