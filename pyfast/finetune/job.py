"""A fine-tuning from files to files: a local transformers checkpoint and texts in, an adapter or a checkpoint out."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from pyfast._support import checks
from pyfast._support.progress import Progress
from pyfast.adapters.parameter_summary import summary
from pyfast.finetune import methods
from pyfast.finetune.data import Dataset, Record, classified, label_names, packed, read
from pyfast.finetune.distributed import World, whole_parameters
from pyfast.finetune.errors import JobError
from pyfast.finetune.learning_rate import RATES, RateTooHigh
from pyfast.finetune.output_files import Checkpoint, Metrics, read_json, sweep, write_json
from pyfast.finetune.plots import plot_range, plot_training
from pyfast.finetune.settings import Settings
from pyfast.finetune.trainer import Trainer

TASKS = ("classify", "lm")
SETTINGS = "finetune.json"


@dataclass(frozen=True)
class Job:
    """What is trained on what, and how; all of it is in the output's finetune.json."""

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
        methods.check(self.method, self.options)


def finetune(job: Job, world: World) -> dict:
    """Trains, and writes the output; the last record of the metrics."""
    out = Path(job.out)
    _check_output(out)
    run = _Run(job, world)
    given = {name: path and os.path.abspath(path) for name, path in _sources(job).items()}
    world.wait()  # until every process has found all in order
    if world.first:
        _create(out)
        write_json(out / SETTINGS, {"job": asdict(job) | given, "labels": run.labels})
    world.wait()
    return run.train()


def _sources(job: Job) -> dict[str, str | None]:
    """What it reads; noted so that it goes on, and is used, from any directory."""
    return {"model": job.model, "data": job.data, "evaluation": job.evaluation}


def resume(directory: str, world: World, lr: float | None = None) -> dict:
    """Goes on with a training that was stopped, as if it had not been; or with another rate."""
    job, labels = read_job(Path(directory))
    job = replace(job, out=directory)
    if lr is not None:
        job = replace(job, training=replace(job.training, lr=lr))
    run = _Run(job, world, labels)
    if world.first:
        sweep(Path(directory))
    if lr is not None and world.first:
        write_json(Path(directory) / SETTINGS, {"job": asdict(job), "labels": labels})
    return run.train(Checkpoint(Path(directory) / "checkpoint").read(), new_rate=lr is not None)


def find_rate(job: Job, world: World) -> float | None:
    """Runs the range test, and writes its curve; the rate to take."""
    out = Path(job.out)
    _check_output(out)
    trainer = _Run(job, world).trainer
    with Progress("test rates", RATES, shown=world.first) as bar:
        test = trainer.find_rate(lambda rate, loss: bar.step(f"lr {rate:.2g}, loss {loss:.3f}"))
    if world.first:
        _create(out)
        write_json(out / "learning_rate.json", test._asdict())
        _say(plot_range(test, out / "learning_rate.png") or f"plot: {out / 'learning_rate.png'}")
    return test.proposal


def read_job(directory: Path) -> tuple[Job, list[str] | None]:
    """The job of an output directory, and its labels."""
    fields = read_json(directory / SETTINGS, ("job", "labels"))
    try:
        job = dict(fields["job"])
        job["training"], job["options"] = (
            Settings(**job["training"]),
            methods.Options(**job["options"]),
        )
        return Job(**job), fields["labels"]
    except (TypeError, ValueError, KeyError) as error:
        raise JobError(f"{directory / SETTINGS} is not of this version: {error}") from None


class _Run:
    """All of a job that is in memory."""

    def __init__(self, job: Job, world: World, labels: list[str] | None = None) -> None:
        self.job, self.world = job, world
        train, test = _records(job)
        self.labels = label_names(train) if job.task == "classify" and labels is None else labels
        torch.manual_seed(job.training.seed)  # of new heads and adapters
        options = (job.allow_pickle, dtype_of(job), job.method)
        self.model, self.tokenizer, new = methods.load(job.model, self.labels, *options)
        self.data = self._dataset(train)
        evaluation = self._dataset(test) if test else None
        try:
            self.model = methods.apply(self.model, job.method, job.options, job.task, new).to(
                world.device
            )
            if job.task == "lm":
                _check_causal(job.model, self.model, self.data.tokens[0])
            settings = {"evaluation": evaluation, "world": world, "shard": job.shard}
            self.trainer = Trainer(self.model, self.data, job.training, **settings)
        except (ValueError, TypeError) as error:
            raise JobError(str(error)) from None

    def _dataset(self, records: Sequence[Record]) -> Dataset:
        limit, pad = (
            length_of(self.model, self.tokenizer, self.job.max_length),
            self.model.config.pad_token_id,
        )
        encode = methods.encoder(
            self.tokenizer, limit if self.job.task == "classify" else None, self.model
        )
        if self.job.task == "classify":
            return classified(records, self.labels, encode, pad)
        return packed(records, limit, encode, self.tokenizer.eos_token_id, pad)

    def train(self, state: tuple | None = None, new_rate: bool = False) -> dict:
        job, out, trainer = self.job, Path(self.job.out), self.trainer
        if state is not None:
            try:
                trainer.load_state(*state, new_rate=new_rate)
            except ValueError as error:
                raise JobError(f"{out / 'checkpoint'}: {error}") from None
        metrics = Metrics(out / "metrics.jsonl", trainer.done) if self.world.first else None
        if self.world.first:
            _say(f"{job.method}: {summary(self.model)}")

        def log(record: dict) -> None:
            if metrics is not None:
                metrics.add(record)
            if "loss" in record:
                bar.at(record["step"], _words(record))

        with Progress("train", trainer.steps, shown=self.world.first) as bar:
            try:
                trainer.run(log, self._save)
            except RateTooHigh as error:
                error.advice = self._advice(error)
                raise
        self._write_result()
        if metrics is None:
            return {}
        _say(plot_training(metrics.records, out / "loss.png") or f"plot: {out / 'loss.png'}")
        return metrics.records[-1]

    def _save(self) -> None:
        tensors, fields = self.trainer.state()
        if self.world.first:
            Checkpoint(Path(self.job.out) / "checkpoint").write(tensors, fields)

    def _advice(self, error: RateTooHigh) -> str:
        out = Path(self.job.out)
        kept = Checkpoint(out / "checkpoint").read()
        where = (
            "the beginning; no step was worth keeping"
            if kept is None
            else f"step {kept[1]['step']}, the last good one"
        )
        return f"finetune --resume {out} --lr {error.proposal:g} goes on from {where}"

    def _write_result(self) -> None:
        with whole_parameters(self.model, keep=self.world.first):
            if self.world.first:
                methods.write(self.model, self.tokenizer, self.job.method, Path(self.job.out))
        self.world.wait()


def _records(job: Job) -> tuple[list[Record], list[Record]]:
    """To train on and to evaluate on: by their split where they have one."""
    records = read(Path(job.data), job.task)
    train = [r for r in records if r.split != "test"]
    if not train:
        raise JobError(
            f"{job.data} has records of the split 'test' only; some must be for training"
        )
    if job.evaluation is None:
        return train, [r for r in records if r.split == "test"]
    records = read(Path(job.evaluation), job.task)
    return train, [r for r in records if r.split == "test"] or records


def dtype_of(job: Job) -> torch.dtype:
    """Of the weights as they are loaded: those that train are in float32."""
    frozen = job.method not in ("full", "select")
    return torch.bfloat16 if job.training.precision == "bf16" and frozen else torch.float32


def length_of(model: nn.Module, tokenizer, length: int) -> int:
    """No longer than the model has positions."""
    return min(length, positions_of(model) or length, tokenizer.model_max_length)


def positions_of(model: nn.Module) -> int | None:
    """How many tokens the model takes, where that is limited; RoBERTa's count begins after padding's."""
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return module.num_embeddings - module.padding_idx - 1
    return getattr(model.config, "max_position_embeddings", None)


@torch.no_grad()
def _check_causal(directory: str, model: nn.Module, tokens: list[int]) -> None:
    """A model that sees the token it is to predict would learn to look at it."""
    first, last = tokens[:2]
    ids = torch.tensor([[first, last], [first, 1 if last == 0 else 0]], device=model.device)
    one, other = model.eval()(input_ids=ids).logits[:, 0].float()
    rounding = 4 * torch.finfo(model.dtype).eps * one.abs().max().item()
    if not torch.allclose(one, other, rtol=0, atol=rounding, equal_nan=True):
        raise JobError(
            f"--model {directory} is a {type(model).__name__} that sees the tokens after each, too; "
            "--task lm needs one that predicts the next"
        )


def _check_output(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise JobError(
            f"--out {out} is there already, and not an empty directory; choose another, or --resume {out}"
        )
    parent = next(path for path in [out, *out.absolute().parents] if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise JobError(f"--out {out} cannot be written: {parent} is not a writable directory")


def _create(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"--out {out} cannot be written: {error.strerror}") from None


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _words(record: dict) -> str:
    """What stands beside the bar."""
    words = f"loss {record['loss']:.3f}, "
    words += f"evaluation {record['eval_loss']:.3f}, " if "eval_loss" in record else ""
    return (
        words
        + f"lr {record['lr']:.2g}, {record['tokens_per_second']:.0f} tokens/s, {record['memory']:.0f} MB"
    )
