"""Exit codes, and errors that take one line."""

import os
import sys
from collections.abc import Callable

import torch

from pyfast.finetune.errors import JobError
from pyfast.finetune.learning_rate import RateTooHigh
from pyfast.formats.errors import CheckpointError

CODES = (
    "exit codes: 0 done, 2 something to put right, 3 learning rate too high, 130 stopped by hand"
)


WRONG, RATE_TOO_HIGH, STOPPED = 2, 3, 130  # exit codes


def _one_line(command: str, run: Callable[[], int]) -> int:
    """The exit code; what the user can put right is a line on stderr."""
    rank = os.environ.get("RANK", "0")
    name = f"pyfast {command}" + (f" (process {rank})" if rank != "0" else "")
    try:
        return run()
    except RateTooHigh as error:
        if rank == "0":
            print(f"{name}: {error}; {error.advice}", file=sys.stderr)
        return RATE_TOO_HIGH
    except KeyboardInterrupt:
        print(f"{name}: stopped; finetune --resume goes on", file=sys.stderr)
        return STOPPED
    except (JobError, CheckpointError) as error:
        print(f"{name}: {error}", file=sys.stderr)
    except (MemoryError, torch.OutOfMemoryError):
        print(
            f"{name}: out of memory; a smaller --batch or --max-length takes less", file=sys.stderr
        )
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{name}: {where}{error.strerror or error}", file=sys.stderr)
    return WRONG


def _check_device(device: str | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise JobError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
