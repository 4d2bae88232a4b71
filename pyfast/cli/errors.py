"""Exit codes of the commands, and error messages of one line on stderr."""

import os
import sys
from collections.abc import Callable

import torch

from pyfast.finetune.errors import JobError
from pyfast.finetune.learning_rate import RateTooHigh
from pyfast.formats.errors import CheckpointError

DONE, WRONG, RATE_TOO_HIGH, STOPPED = 0, 2, 3, 130
EXIT_CODES = (
    "exit codes: 0 success, 2 an error that you can correct, 3 learning rate too high, "
    "130 interrupted"
)


def run_reporting(
    command: str, run: Callable[[], int], *, stopped: str = "stopped", out_of_memory: str = ""
) -> int:
    """Run a command and return its exit code; report a user's error in one line on stderr.

    Args:
        command: name of the command, with which the line begins.
        run: the command; returns its exit code.
        stopped: the line's text after Ctrl-C.
        out_of_memory: advice for the line when memory is exhausted; by default there is none.
    """
    rank = os.environ.get("RANK", "0")
    name = f"pyfast {command}" + (f" (process {rank})" if rank != "0" else "")
    try:
        return run()
    except RateTooHigh as error:
        if rank == "0":
            advice = f"; {error.advice}" if error.advice else ""
            print(f"{name}: {error}{advice}", file=sys.stderr)
        return RATE_TOO_HIGH
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        return STOPPED
    except (JobError, CheckpointError) as error:
        print(f"{name}: {error}", file=sys.stderr)
    except (MemoryError, torch.OutOfMemoryError):
        advice = f"; {out_of_memory}" if out_of_memory else ""
        print(f"{name}: out of memory{advice}", file=sys.stderr)
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        print(f"{name}: {file}{error.strerror or error}", file=sys.stderr)
    return WRONG


def check_device(device: str | None) -> None:
    """Raise JobError unless torch can use the device; None stands for torch's default."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise JobError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None


def default_device() -> str:
    """Return "cuda" if there is a CUDA device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"
