"""The demo's trainings: a model pretrained, fine-tuned by every method, its adapters switched, a rate caught."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from pyfast._support.measure import held_bytes, peak_bytes
from pyfast._support.progress import Progress
from pyfast.adapters.api import mixed_batch, set_adapter
from pyfast.adapters.files import load_adapter
from pyfast.adapters.parameter_summary import summary
from pyfast.demo.texts import Masked
from pyfast.finetune import methods
from pyfast.finetune.data import Record, classified
from pyfast.finetune.distributed import World
from pyfast.finetune.job import SETTINGS, Job
from pyfast.finetune.learning_rate import RateTooHigh
from pyfast.finetune.output_files import write_json
from pyfast.finetune.settings import Settings
from pyfast.finetune.trainer import Trainer

SEED = 0
BLOCK = 64  # tokens of a row in pretraining
RANK, BOTTLENECK = 8, 16
PRETRAINING_RATE, TOO_HIGH = 2e-3, 1.0
NEVER = 1 << 30  # steps; the last is evaluated all the same


@dataclass(frozen=True)
class Way:
    """A way to fine-tune."""

    name: str
    method: str
    lr: float
    options: dict = field(default_factory=dict)


def ways(layers: int) -> list[Way]:
    """All that the table compares; the rates were found by trying, on the sentences that judge: see `conditions`."""
    lora = {"rank": RANK, "alpha": 2.0 * RANK}
    return [
        Way("full", "full", 3e-3),
        Way("selective", "select", 3e-3, {"select": (f"layers.{layers - 1}.*",)}),
        Way("adapter, Houlsby", "adapter", 3e-3, {"bottleneck": BOTTLENECK, "style": "houlsby"}),
        Way("adapter, Pfeiffer", "adapter", 3e-3, {"bottleneck": BOTTLENECK, "style": "pfeiffer"}),
        Way("LoRA", "lora", 3e-3, lora),
        Way("DoRA", "dora", 3e-3, lora),
        Way("QLoRA", "qlora", 3e-3, lora),
    ]


# --- pretraining ---


def pretrain(
    model: nn.Module, tokenizer, texts: Sequence[str], held_out: Sequence[str], steps: int
) -> dict:
    """Trains a model to guess hidden words, in place; what was measured."""
    world = World.join()
    encode = methods.encoder(tokenizer, BLOCK)

    def dataset(lines: Sequence[str]) -> Masked:
        return Masked(list(map(encode, lines)), tokenizer.pad_token_id, tokenizer.mask_token_id)

    data = dataset(texts)
    schedule = {"schedule": "cosine", "warmup": 0.05, "weight_decay": 0.1}
    settings = Settings(
        steps=steps, batch=32, lr=PRETRAINING_RATE, seed=SEED, eval_every=NEVER, **schedule
    )
    trainer = Trainer(
        model.to(world.device), data, settings, evaluation=dataset(held_out), world=world
    )
    records, seconds = _train(trainer, "   pretrain")
    seen = sum(
        len(data.tokens[row]) for step in range(trainer.steps) for row in trainer.order.step(step)
    )
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "characters": sum(map(len, texts)),
        "tokens": sum(map(len, data.tokens)),
        "vocabulary": len(tokenizer),
        "steps": trainer.steps,
        "seconds": seconds,
        "tokens_per_second": seen / seconds,
        "curve": _curve(records),
        "held_out_loss": records[-1]["eval_loss"],
        "untrained_loss": trainer.guard.level,
    }


def _train(trainer: Trainer, what: str) -> tuple[list[dict], float]:
    """Its records and the seconds it took, shown as they come."""
    records: list[dict] = []
    begin = time.perf_counter()
    with Progress(what, trainer.steps) as bar:

        def log(record: dict) -> None:
            records.append(record)
            if "loss" in record:
                bar.step(f"loss {record['loss']:.3f}")

        trainer.run(log, lambda: None)
    return records, time.perf_counter() - begin


def _curve(records: Sequence[dict]) -> list[list[float]]:
    return [[r["step"], r["loss"]] for r in records if "loss" in r]


# --- fine-tuning ---


@dataclass(frozen=True)
class Task:
    """Texts with labels, and how long to train on them."""

    records: Sequence[dict]
    labels: Sequence[str]
    epochs: float
    batch: int = 16

    def part(self, split: str) -> list[Record]:
        return [
            Record(r["text"], r["label"], split, "demo")
            for r in self.records
            if r["split"] == split
        ]

    def described(self) -> dict:
        """Its size, and how often a guess of the most frequent label is right."""
        test = [r.label for r in self.part("test")]
        chance = max(test.count(label) for label in self.labels) / len(test)
        return {
            "train": len(self.part("train")),
            "test": len(test),
            "epochs": self.epochs,
            "chance": chance,
        }

    def settings(self, lr: float) -> Settings:
        return Settings(epochs=self.epochs, eval_every=NEVER, batch=self.batch, lr=lr, seed=SEED)


class FineTuning:
    """One run: the checkpoint read, made ready for its method, trained."""

    def __init__(self, checkpoint: Path, task: Task, way: Way, lr: float | None = None) -> None:
        self.checkpoint, self.task, self.way = checkpoint, task, way
        self.options, self.settings = methods.Options(**way.options), task.settings(lr or way.lr)
        world = World.join()
        torch.manual_seed(SEED)  # of the head and of adapters
        model, self.tokenizer, new = methods.load(
            str(checkpoint), task.labels, False, torch.float32
        )
        self.model = methods.apply(model, way.method, self.options, "classify", new).to(
            world.device
        )
        encode = methods.encoder(self.tokenizer, BLOCK)
        train, test = (
            classified(task.part(split), task.labels, encode, self.tokenizer.pad_token_id)
            for split in ("train", "test")
        )
        self._again = lambda settings: Trainer(
            self.model, train, settings, evaluation=test, world=world
        )
        self.trainer = self._again(self.settings)

    def run(self) -> dict:
        """What was measured; of memory, the most that weights, gradients, moments and activations take in a step."""
        records, seconds = _train(self.trainer, f"   {self.way.name}")
        counts = summary(self.model)
        found = {
            "method": self.way.name,
            "trainable": counts.trainable,
            "total": counts.total,
            "seconds": seconds,
        }
        return found | {
            "accuracy": records[-1]["eval_accuracy"],
            "lr": self.settings.lr,
            "curve": _curve(records),
        }

    def peak_bytes(self) -> int:
        """Of two more steps, optimizer and all; the model is another one after it."""
        self.trainer = None  # its moments are not these steps'
        held = held_bytes(self.model)
        again = self._again(replace(self.settings, steps=2, guard=False))
        return held + peak_bytes(
            lambda: again.run(lambda record: None, lambda: None), again.world.device
        )

    def write(self, out: Path, model: str) -> None:
        """As `finetune` leaves it, so that `predict` reads it; `model` is where the checkpoint will be."""
        methods.write(self.model, self.tokenizer, self.way.method, out)
        job = Job(
            model=model,
            data="pyfast/demo_data",
            out=str(out),
            task="classify",
            method=self.way.method,
            max_length=BLOCK,
            options=self.options,
            training=self.settings,
        )
        write_json(out / SETTINGS, {"job": asdict(job), "labels": list(self.task.labels)})


def compare(pretrained: Path, untrained: Path, task: Task, found: Sequence[Way]) -> Iterator[dict]:
    """A row for each way, from both checkpoints."""
    for way in found:
        run = FineTuning(pretrained, task, way)
        row = run.run() | {"peak_bytes": run.peak_bytes()}
        scratch = FineTuning(untrained, task, way).run()
        yield row | {
            "accuracy_from_scratch": scratch["accuracy"],
            "curve_from_scratch": scratch["curve"],
        }


# --- a rate that is too high ---


def too_high(checkpoint: Path, task: Task, way: Way, lr: float) -> dict:
    """What the guard says, and the losses until then; with the rate of the comparison, all of them."""
    run = FineTuning(checkpoint, task, way, lr)
    records: list[dict] = []
    found = {"method": way.name, "rate": lr, "message": None, "proposal": None}
    try:
        run.trainer.run(records.append, lambda: None)
    except RateTooHigh as error:
        found |= {"message": str(error), "step": error.step, "proposal": error.proposal}
    found["curve"] = _curve(records)
    good = FineTuning(checkpoint, task, way).run()
    found |= {"good_rate": way.lr, "good_curve": good["curve"], "good_accuracy": good["accuracy"]}
    return found


# --- two tasks ---


def switch(
    checkpoint: Path, tasks: dict[str, Task], way: Way, out: Path, model: str, texts: Sequence[str]
) -> dict:
    """An adapter for each task, written, put into one model, and switched."""
    found = {"tasks": {}, "sentences": []}
    for name, task in tasks.items():
        run = FineTuning(checkpoint, task, way)
        row = run.run()
        run.write(out / name, model)
        found["tasks"][name] = {
            "accuracy": row["accuracy"],
            "bytes": _size(out / name / "adapter_model.safetensors"),
        }
    labels = next(iter(tasks.values())).labels
    both, tokenizer, _ = methods.load(str(checkpoint), labels, False, torch.float32)
    for name in tasks:
        load_adapter(both, out / name, name, trainable=False)
    both.to(World.join().device).eval()
    for text in texts:
        said = {name: _answer(both, tokenizer, name, text, labels) for name in tasks}
        found["sentences"].append({"text": text} | said)
    found["switch_seconds"] = _seconds_a_switch(both, list(tasks))
    found["mixed_agrees"] = _mixed_agrees(both, tokenizer, list(tasks), texts, labels)
    return found


def _answer(model: nn.Module, tokenizer, adapter: str, text: str, labels: Sequence[str]) -> list:
    set_adapter(model, adapter)
    probability, label = _logits(model, tokenizer, [text])[0].softmax(-1).max(-1)
    return [labels[label], probability.item()]


@torch.no_grad()
def _logits(model: nn.Module, tokenizer, texts: Sequence[str]) -> torch.Tensor:
    return model(
        **tokenizer(list(texts), padding=True, return_tensors="pt").to(model.device)
    ).logits


def _seconds_a_switch(model: nn.Module, names: Sequence[str]) -> float:
    begin, rounds = time.perf_counter(), 50
    for i in range(rounds):
        set_adapter(model, names[i % len(names)])
    return (time.perf_counter() - begin) / rounds


def _mixed_agrees(
    model: nn.Module, tokenizer, names: Sequence[str], texts: Sequence[str], labels
) -> bool:
    """Whether one batch, a row with one adapter, the next with the other, says what they say one by one."""
    rows = [names[i % len(names)] for i in range(len(texts))]
    with mixed_batch(model, rows):
        together = _logits(model, tokenizer, texts).argmax(-1)
    alone = [_answer(model, tokenizer, name, text, labels)[0] for name, text in zip(rows, texts)]
    return [labels[i] for i in together] == alone


def _size(path: Path) -> int:
    return path.stat().st_size
