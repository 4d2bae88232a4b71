"""Learning real text, step by step.

The text is the prose of Python's documentation, byte by byte; every tenth block of it is held out.
Both see the same batches at the same rates.
"""

import math
import sys
import time
from dataclasses import dataclass

import torch

import pyfast
from bench.reformer.models import MODELS, size, text


@dataclass(frozen=True)
class Setup:
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
        return self.rate * min(
            (step + 1) / self.warmup, 0.55 + 0.45 * math.cos(math.pi * step / self.steps)
        )


@dataclass
class Curve:
    """How one model learned."""

    model: str
    parameters: int
    steps: int = 0
    seconds: float = 0.0
    held_out: float = math.nan  # the loss at the end, in nats a byte
    points: tuple[tuple[int, float], ...] = ()  # step, loss of training, smoothed


def blocks(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """To learn from, and held out: every tenth."""
    cut = text()
    cut = cut[: len(cut) // length * length].view(-1, length)
    held = torch.arange(len(cut)) % 10 == 9
    return cut[~held], cut[held]


def learn(setup: Setup, name: str, device: str, until: float) -> Curve:
    torch.manual_seed(setup.seed)
    model = MODELS[name](setup.config()).to(device)
    curve, smooth, points = Curve(name, size(model)), None, []
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    train, held = blocks(setup.length)
    stream = train.flatten()
    order = torch.Generator().manual_seed(setup.seed)
    begun = time.monotonic()
    for step in range(setup.steps):
        if step and time.monotonic() > until:
            break
        starts = torch.randint(len(stream) - setup.length, (setup.batch,), generator=order)
        ids = torch.stack([stream[start : start + setup.length] for start in starts.tolist()]).to(
            device
        )
        for group in adam.param_groups:
            group["lr"] = setup.rate_at(step)
        loss = model(ids, labels=ids)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        smooth = loss.item() if smooth is None else 0.96 * smooth + 0.04 * loss.item()
        curve.steps, curve.seconds = step + 1, time.monotonic() - begun
        if step % max(1, setup.steps // 200) == 0:
            points.append((step, smooth))
            print(
                f"\r{name}: step {step}/{setup.steps}, loss {smooth:.3f} ",
                end="",
                file=sys.stderr,
                flush=True,
            )
    print(file=sys.stderr)
    curve.points, curve.held_out = tuple(points), evaluate(model, held.to(device), setup.batch)
    return curve


@torch.no_grad()
def evaluate(model: torch.nn.Module, held: torch.Tensor, batch: int) -> float:
    model.eval()
    torch.manual_seed(1)  # of the hashes
    return sum(model(ids, labels=ids).item() * len(ids) for ids in held.split(batch)) / len(held)
