"""A small Reformer and a Transformer of its size learn real text: the losses of both, by step.

The text is the prose of Python's documentation, byte by byte; every tenth block of it is held out.
Both models see the same batches at the same learning rates.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch

import pyfast
from bench import options, session
from bench.measure import machine
from bench.reformer.models import MODELS, count_parameters, load_text
from bench.report import files, tables
from bench.report.goals import Goal

OPTIONS = ("length", "width", "batch", "steps", "n_hashes", "seed")  # fields of a Setup
MAX_LOSS_RATIO = 1.02  # of the Reformer's held-out loss to the Transformer's
QUICK_STEPS = 300


@dataclass(frozen=True)
class Setup:
    """Sizes and rates of a training."""

    length: int = 256
    width: int = 192
    heads: int = 3
    layers: tuple[str, ...] = ("local", "lsh") * 2
    n_hashes: int = 4
    batch: int = 8
    steps: int = 500
    warmup: int = 100
    rate: float = 2e-3
    seed: int = 0

    def config(self) -> pyfast.ReformerConfig:
        return pyfast.ReformerConfig(
            256, self.width, self.layers, self.heads, max_length=self.length, n_hashes=self.n_hashes
        )

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step: warmed up, then along a cosine."""
        return self.rate * min(
            (step + 1) / self.warmup, 0.55 + 0.45 * math.cos(math.pi * step / self.steps)
        )


@dataclass
class Curve:
    """The losses of one model as it learned."""

    model: str
    parameters: int
    steps: int = 0
    seconds: float = 0.0
    held_out: float = math.nan  # the loss at the end, in nats a byte
    points: tuple[tuple[int, float], ...] = ()  # step, loss of training, smoothed


def split_text(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the blocks to learn from, and every tenth block, which is held out."""
    text = load_text()
    blocks = text[: len(text) // length * length].view(-1, length)
    is_held_out = torch.arange(len(blocks)) % 10 == 9
    return blocks[~is_held_out], blocks[is_held_out]


def learn(setup: Setup, name: str, device: str, until: float) -> Curve:
    """Train a model to the last step, or until that time, and measure its held-out loss."""
    torch.manual_seed(setup.seed)
    model = MODELS[name](setup.config()).to(device)
    curve, smooth, points = Curve(name, count_parameters(model)), None, []
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    train, held_out = split_text(setup.length)
    stream = train.flatten()
    generator = torch.Generator().manual_seed(setup.seed)
    begin = time.monotonic()
    for step in range(setup.steps):
        if step and time.monotonic() > until:
            break
        ids = _draw_batch(stream, setup, generator).to(device)
        for group in adam.param_groups:
            group["lr"] = setup.rate_at(step)
        loss = model(ids, labels=ids)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        smooth = loss.item() if smooth is None else 0.96 * smooth + 0.04 * loss.item()
        curve.steps, curve.seconds = step + 1, time.monotonic() - begin
        if step % max(1, setup.steps // 200) == 0:
            points.append((step, smooth))
            line = f"\r{name}: step {step}/{setup.steps}, loss {smooth:.3f} "
            print(line, end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    curve.points = tuple(points)
    curve.held_out = evaluate(model, held_out.to(device), setup.batch)
    return curve


def _draw_batch(stream: torch.Tensor, setup: Setup, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(stream) - setup.length, (setup.batch,), generator=generator)
    return torch.stack([stream[start : start + setup.length] for start in starts.tolist()])


@torch.no_grad()
def evaluate(model: torch.nn.Module, held_out: torch.Tensor, batch: int) -> float:
    """Return the mean loss of held-out blocks."""
    model.eval()
    torch.manual_seed(1)  # of the hashes
    total = sum(model(ids, labels=ids).item() * len(ids) for ids in held_out.split(batch))
    return total / len(held_out)


def add_arguments(parser):
    """Add the bench's options."""
    options.add_budget(parser)
    for name in OPTIONS:
        option, default = f"--{name.replace('_', '-')}", getattr(Setup, name)
        parser.add_argument(option, type=int, default=default, help="default: %(default)s")


def run(args):
    """Train both models, then write and print their curves."""
    setup = replace(Setup(), **{name: getattr(args, name) for name in OPTIONS})
    setup = replace(setup, steps=min(setup.steps, QUICK_STEPS)) if args.quick else setup
    print(setup, flush=True)
    end, curves = time.monotonic() + (args.budget or math.inf), []
    for models_left, name in zip((2, 1), MODELS):
        until = time.monotonic() + (end - time.monotonic()) / models_left
        curves.append(learn(setup, name, args.device, until))
    path, goal = args.out / "learning.json", judge(setup, *curves)
    content = {"bench": "learning", "machine": machine.describe(args.device), "flags": args.flags}
    content |= {"setup": asdict(setup), "rows": [asdict(curve) for curve in curves]}
    content["goals"] = [asdict(goal) | {"met": goal.met}]
    files.write_json(path, content)
    lines = []
    for curve in curves:
        line = {key: value for key, value in asdict(curve).items() if key != "points"}
        lines.append(line | {"held_out": f"{curve.held_out:.4f}"})
    print(tables.table(lines, list(lines[0])))
    print(f"\n{tables.goals_table([goal])}\n\n{session.describe_written(path)}")


def judge(setup: Setup, reformer: Curve, transformer: Curve) -> Goal:
    """Return the goal for the ratio of the held-out losses."""
    unfinished = [curve.model for curve in (reformer, transformer) if curve.steps < setup.steps]
    ratio = None if unfinished else reformer.held_out / transformer.held_out
    why = f"not trained to the end: {', '.join(unfinished)}"
    text = "held-out loss: {:.3f} of the Transformer's"
    return Goal(text, "<=", MAX_LOSS_RATIO, ratio, why)
