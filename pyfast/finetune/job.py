"""A job: what is fine-tuned on what data, and how; and the file that records it."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from pyfast._support import checks
from pyfast.finetune import methods
from pyfast.finetune.errors import JobError
from pyfast.finetune.output_files import read_json, write_json
from pyfast.finetune.settings import Settings

TASKS = ("classify", "lm")
SETTINGS_FILE = "finetune.json"
_INPUTS = ("model", "data", "evaluation")


@dataclass(frozen=True)
class Job:
    """A fine-tuning from files to files; all of it is in the output's finetune.json.

    Args:
        model: directory of a transformers checkpoint.
        data: file of the training data.
        out: directory of the output.
        task: "classify" or "lm".
        method: one of `methods.METHODS`.
        evaluation: file of the evaluation data; None for the records of `data` with split "test".
        max_length: largest number of tokens of a text, or of a block for "lm".
        options: options of the method.
        training: settings of the training.
        shard: whether the parameters are sharded over the processes.
        allow_pickle: whether pickled weights may be read.

    Raises:
        ValueError: a field is not one of its values, or an option does not fit the method.
    """

    model: str
    data: str
    out: str
    task: str
    method: str
    evaluation: str | None = None
    max_length: int = 256
    options: methods.Options = field(default_factory=methods.Options)
    training: Settings = field(default_factory=Settings)
    shard: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        checks.one_of("task", self.task, TASKS)
        checks.one_of("method", self.method, methods.METHODS)
        checks.size("max_length", self.max_length)
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; it must be 2 or more")
        methods.check_options(self.method, self.options)

    @property
    def load_dtype(self) -> torch.dtype:
        """Dtype in which the weights are loaded; weights that train are in float32."""
        is_frozen = self.method not in ("full", "select")
        is_bf16 = self.training.precision == "bf16"
        return torch.bfloat16 if is_bf16 and is_frozen else torch.float32


def read_job(directory: Path) -> tuple[Job, list[str] | None]:
    """Return the job of an output directory, and its labels."""
    path = directory / SETTINGS_FILE
    entries = read_json(path, ("job", "labels"))
    try:
        job = dict(entries["job"])
        job["training"] = Settings(**job["training"])
        job["options"] = methods.Options(**job["options"])
        return Job(**job), entries["labels"]
    except (TypeError, ValueError, KeyError) as error:
        raise JobError(f"{path} is not of this version: {error}") from None


def write_job(job: Job, labels: Sequence[str] | None, directory: Path) -> None:
    """Write a job and its labels to an output directory, for `read_job`.

    Paths of inputs become absolute, so that the output can be used from any directory.
    """
    entries = asdict(job)
    for name in _INPUTS:
        entries[name] = entries[name] and os.path.abspath(entries[name])
    write_json(directory / SETTINGS_FILE, {"job": entries, "labels": labels})
