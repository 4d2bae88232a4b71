"""Runs of a job: a new training, a resumed one, and the test of learning rates."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from pyfast._support.progress import Progress
from pyfast.adapters.parameter_summary import summary
from pyfast.finetune import methods, pretrained
from pyfast.finetune.data import (
    Dataset,
    Record,
    classification_dataset,
    label_names,
    language_dataset,
    read_records,
)
from pyfast.finetune.distributed import World, full_parameters
from pyfast.finetune.errors import JobError
from pyfast.finetune.job import Job, read_job, write_job
from pyfast.finetune.learning_rate import RANGE_TEST_STEPS, RateTooHigh
from pyfast.finetune.output_files import Checkpoint, Metrics, remove_leftovers, write_json
from pyfast.finetune.plots import plot_range, plot_training
from pyfast.finetune.trainer import Trainer


def finetune(job: Job, world: World) -> dict:
    """Train, write the output, and return the last record of the metrics.

    Raises:
        JobError: the job cannot run; nothing is written then.
        RateTooHigh: the guard stopped the training.
    """
    out = Path(job.out)
    _check_output(out)
    run = _Run(job, world)
    world.wait()  # no process writes before all have checked their inputs
    if world.is_first:
        _create(out)
        write_job(job, run.labels, out)
    world.wait()
    return run.train()


def resume(directory: str, world: World, lr: float | None = None) -> dict:
    """Continue a stopped training as if it had not stopped; return the last record.

    Args:
        directory: the training's output directory.
        world: the processes that train together.
        lr: another learning rate, or None.
    """
    out = Path(directory)
    job, labels = read_job(out)
    job = replace(job, out=directory)
    if lr is not None:
        job = replace(job, training=replace(job.training, lr=lr))
    run = _Run(job, world, labels)
    if world.is_first:
        remove_leftovers(out)
        if lr is not None:
            write_job(job, labels, out)
    return run.train(Checkpoint(out / "checkpoint").read(), new_rate=lr is not None)


def find_rate(job: Job, world: World) -> float | None:
    """Run the range test, write its curve, and return the rate to take; None if there is none."""
    out = Path(job.out)
    _check_output(out)
    trainer = _Run(job, world).trainer
    with Progress("test rates", RANGE_TEST_STEPS, shown=world.is_first) as bar:
        test = trainer.find_rate(lambda rate, loss: bar.step(f"lr {rate:.2g}, loss {loss:.3f}"))
    if world.is_first:
        _create(out)
        write_json(out / "learning_rate.json", test._asdict())
        plot = out / "learning_rate.png"
        _report(plot_range(test, plot) or f"plot: {plot}")
    return test.proposal


class _Run:
    """A job in memory: its model, its data and its trainer."""

    def __init__(self, job: Job, world: World, labels: list[str] | None = None) -> None:
        self.job, self.world, self.out = job, world, Path(job.out)
        train, test = _read_splits(job)
        self.labels = labels
        if job.task == "classify" and labels is None:
            self.labels = label_names(train)
        torch.manual_seed(job.training.seed)  # for the weights of new heads and adapters
        self.model, self.tokenizer, new_modules = pretrained.load(
            job.model, self.labels, job.allow_pickle, job.load_dtype, job.method
        )
        data = self._make_dataset(train)
        evaluation = self._make_dataset(test) if test else None
        try:
            model = methods.apply(self.model, job.method, job.options, job.task, new_modules)
            self.model = model.to(world.device)
            if job.task == "lm":
                _check_causal(job.model, self.model, data.tokens[0])
            self.trainer = Trainer(
                self.model, data, job.training, evaluation=evaluation, world=world, shard=job.shard
            )
        except (ValueError, TypeError) as error:
            raise JobError(str(error)) from None

    def _make_dataset(self, records: Sequence[Record]) -> Dataset:
        length = pretrained.limit_length(self.model, self.tokenizer, self.job.max_length)
        pad = self.model.config.pad_token_id
        if self.job.task == "classify":
            encode = pretrained.make_encoder(self.tokenizer, length, self.model)
            return classification_dataset(records, self.labels, encode, pad)
        encode = pretrained.make_encoder(self.tokenizer, None, self.model)
        return language_dataset(records, length, encode, self.tokenizer.eos_token_id, pad)

    def train(self, state: tuple | None = None, new_rate: bool = False) -> dict:
        """Train, from a checkpoint's state if there is one, and write the result."""
        trainer = self.trainer
        if state is not None:
            try:
                trainer.load_state(*state, new_rate=new_rate)
            except ValueError as error:
                raise JobError(f"{self.out / 'checkpoint'}: {error}") from None
        metrics = None
        if self.world.is_first:
            metrics = Metrics(self.out / "metrics.jsonl", trainer.done)
            _report(f"{self.job.method}: {summary(self.model)}")

        def log(record: dict) -> None:
            if metrics is not None:
                metrics.add(record)
            if "loss" in record:
                bar.show(record["step"], _describe(record))

        with Progress("train", trainer.steps, shown=self.world.is_first) as bar:
            try:
                trainer.run(log, self._save)
            except RateTooHigh as error:
                error.advice = self._advise(error)
                raise
        self._write_result()
        if metrics is None:
            return {}
        plot = self.out / "loss.png"
        _report(plot_training(metrics.records, plot) or f"plot: {plot}")
        return metrics.records[-1]

    def _save(self) -> None:
        tensors, fields = self.trainer.state()
        if self.world.is_first:
            Checkpoint(self.out / "checkpoint").write(tensors, fields)

    def _advise(self, error: RateTooHigh) -> str:
        """Return the command that continues with the proposed rate, and from which step."""
        checkpoint = Checkpoint(self.out / "checkpoint").read()
        start = "the beginning; no step was worth saving"
        if checkpoint is not None:
            start = f"step {checkpoint[1]['step']}, the last good one"
        return f"finetune --resume {self.out} --lr {error.proposal:g} continues from {start}"

    def _write_result(self) -> None:
        with full_parameters(self.model, keep=self.world.is_first):
            if self.world.is_first:
                methods.write(self.model, self.tokenizer, self.job.method, self.out)
        self.world.wait()


def _read_splits(job: Job) -> tuple[list[Record], list[Record]]:
    """Return the records to train on and those to evaluate on, by their split if they have one."""
    records = read_records(Path(job.data), job.task)
    train = [record for record in records if record.split != "test"]
    if not train:
        raise JobError(
            f"{job.data} has records of the split 'test' only; some must be for training"
        )
    if job.evaluation is None:
        return train, [record for record in records if record.split == "test"]
    records = read_records(Path(job.evaluation), job.task)
    return train, [record for record in records if record.split == "test"] or records


@torch.no_grad()
def _check_causal(directory: str, model: nn.Module, tokens: list[int]) -> None:
    """Raise JobError if the model sees the token that it is to predict; it would learn to copy."""
    first, second = tokens[:2]
    other = 1 if second == 0 else 0
    ids = torch.tensor([[first, second], [first, other]], device=model.device)
    logits, changed = model.eval()(input_ids=ids).logits[:, 0].float()
    rounding = 4 * torch.finfo(model.dtype).eps * logits.abs().max().item()
    if not torch.allclose(logits, changed, rtol=0, atol=rounding, equal_nan=True):
        raise JobError(
            f"--model {directory} is a {type(model).__name__} that sees the tokens after each, "
            "too; --task lm needs one that predicts the next"
        )


def _check_output(out: Path) -> None:
    """Raise JobError unless the output directory can be created, or is empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise JobError(
            f"--out {out} is there already, and not an empty directory; "
            f"choose another, or --resume {out}"
        )
    parent = next(path for path in [out, *out.absolute().parents] if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise JobError(f"--out {out} cannot be written: {parent} is not a writable directory")


def _create(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"--out {out} cannot be written: {error.strerror}") from None


def _report(line: str) -> None:
    print(line, file=sys.stderr)


def _describe(record: dict) -> str:
    """Return the text beside the progress bar."""
    parts = [f"loss {record['loss']:.3f}"]
    if "eval_loss" in record:
        parts.append(f"evaluation {record['eval_loss']:.3f}")
    parts.append(f"lr {record['lr']:.2g}")
    parts.append(f"{record['tokens_per_second']:.0f} tokens/s")
    parts.append(f"{record['memory']:.0f} MB")
    return ", ".join(parts)
