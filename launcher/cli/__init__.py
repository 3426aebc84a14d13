"""The command line. A command is a file in this package; it is imported only when it is the one that runs.

A command module defines `command`: a function (its docstring is the help text) or a `typer.Typer` with subcommands.
It may define `CONTEXT_SETTINGS`, passed on to Typer, and `EXAMPLES`, shown below its help.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from keyword import iskeyword
from typing import Annotated, Any, Final, NoReturn

import typer
import typer.exceptions

from launcher.errors import NnxlaunchError, complain, report

COMMANDS: Final[dict[str, str]] = {
    "init": "Write a commented starter spec.",
    "validate": "Check a job spec; print every problem at once.",
    "render": "Print the Kubernetes manifests of a job spec.",
    "explain": "Show what a job spec means: devices, mesh, memory, timeouts, exit codes.",
    "types": "List the accelerator types and their arithmetic.",
    "submit": "Start a job from a spec.",
    "status": "Show how a job is doing.",
    "why": "Say what a job waits for or died of, with evidence and what to do.",
    "events": "Print what the cluster said about a job.",
    "describe": "Print everything known of a job.",
    "list": "List jobs.",
    "logs": "Print or follow the logs of a job.",
    "wait": "Wait until a job ends; the exit code tells how.",
    "cancel": "Stop a job and remove it.",
    "delete": "Remove jobs, running or ended.",
    "suspend": "Stop a job's pods and keep the job.",
    "resume": "Let a suspended job go on.",
    "restart": "Stop all pods of a job and start them again.",
    "doctor": "Check that a cluster can run jobs; name what repairs it.",
    "image": "Build or push the trainer image.",
    "data": "Prepare the tokenised, packed data cache.",
    "compile": "Compile the train step for hardware that is not here: memory, collectives, bounds.",
    "import": "Check a Hugging Face folder and print what a job spec needs to start from it.",
    "export": "Write a checkpoint's parameters, as Hugging Face safetensors or by themselves.",
    "generate": "Continue prompts with a trained model.",
}

_EXAMPLES: Final = """Examples:

\b
  nnxlaunch init > job.yaml                  a starter spec
  nnxlaunch validate job.yaml                every problem at once
  nnxlaunch render job.yaml                  the manifests, nothing is sent
  nnxlaunch submit job.yaml --backend local  run it on this machine
  nnxlaunch logs my-run -f --backend local   follow it; without --backend, one on the cluster
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit; with None, the arguments of this process."""
    gc.set_threshold(100_000)  # imports make many objects and no garbage: a tenth of a short command went into looking for it
    words = [*(sys.argv[1:] if arguments is None else arguments)]  # `list` is a command of this package
    try:
        try:
            code = app(_chosen(words))(args=words, prog_name="nnxlaunch", standalone_mode=False)
        finally:
            print(end="", flush=True)  # what cannot be written is an error here, and a traceback at the interpreter's end
    except typer.exceptions.TyperException as error:
        sys.exit(_misused(error))
    except (NnxlaunchError, ValueError) as error:
        sys.exit(report(error))
    except OSError as error:  # a full disk, a folder that is a file: of the machine, not of this program
        code = report(error)
        _drop_output()
    sys.exit(code)


def _misused(error: typer.exceptions.TyperException) -> int:
    """Say what is wrong with the command line as every other error is said; return the exit code."""
    message = error.format_message().replace("Value error, ", "")
    if message.startswith("Usage:"):  # no arguments where some are needed: the message is the help
        print(message, file=sys.stderr)
    else:
        command = getattr(getattr(error, "ctx", None), "command_path", "nnxlaunch")
        complain(f"{message[:1].lower()}{message[1:]}".rstrip("."), f"{command} --help")
    return error.exit_code


def _drop_output() -> None:
    """Forget output that cannot be written, so that the interpreter does not try again."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def app(chosen: str | None = None) -> typer.Typer:
    """The Typer app with every command in its help and only `chosen` imported."""
    result = typer.Typer(
        name="nnxlaunch",
        help="One checked job spec becomes a running, resumable training job.",
        epilog=_EXAMPLES,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    result.callback()(_root)
    for name, line in COMMANDS.items():
        if name == chosen:
            module = f"{name}_" if iskeyword(name) else name
            _register(result, name, import_module(f"{__name__}.{module}"))
        else:
            result.command(name, help=line)(_unreachable)
    return result


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"nnxlaunch {version('nnxlaunch')}")
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")] = False,
) -> None:
    del version


def _unreachable() -> None:
    raise AssertionError("only the chosen command runs")


def _register(result: typer.Typer, name: str, module: Any) -> None:
    command: typer.Typer | Callable[..., None] = module.command
    examples = getattr(module, "EXAMPLES", "")
    epilog = f"Examples:\n\n\b\n{examples}" if examples else None
    settings = getattr(module, "CONTEXT_SETTINGS", None)
    if isinstance(command, typer.Typer):
        result.add_typer(command, name=name, help=COMMANDS[name], epilog=epilog, no_args_is_help=True)
    else:
        result.command(name, epilog=epilog, context_settings=settings)(command)


def _chosen(words: Sequence[str]) -> str | None:
    """The command among `words`, or among the words a shell is completing."""
    if "_NNXLAUNCH_COMPLETE" in os.environ:
        line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS") or ""
        words = line.split()[1:]
    return next((word for word in words if word in COMMANDS), None)
