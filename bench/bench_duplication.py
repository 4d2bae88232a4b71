"""The Reformer paper's task: copy w in 0w0w. Trained with exact or LSH attention, read with the same or another.

One layer learns by position where the copy is; only a key that a query sees can be copied from. Exact attention is that
of LSH attention without the hashing: queries are keys, of unit length, and see themselves only when alone. So weights
trained with one can be read with another. Loss and accuracy are those of the second w.
"""

import argparse
import contextlib
import itertools
import math
import pathlib
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import pyfast
from bench import machine, report
from bench.report import write_csv, write_json

TRAIN, READ = ["full", "lsh-4", "lsh-2", "lsh-1"], ["full", "lsh-8", "lsh-4", "lsh-2", "lsh-1"]
PAPER = {  # table 2, accuracies in %, by training and reading
    "full": (100, 94.8, 92.5, 76.9, 52.5),
    "lsh-4": (0.8, 100, 99.9, 99.4, 91.9),
    "lsh-2": (0.8, 100, 99.9, 98.1, 86.8),
    "lsh-1": (0.8, 99.9, 99.6, 94.8, 77.9),
}
OPTIONS = ("length", "symbols", "width", "batch", "steps", "seed")  # of a Setup
FRESH = 2**40  # the seed of the first batch to read; training's are smaller
READ_BATCHES = 16
SAVE_EVERY = 20  # seconds


@dataclass(frozen=True)
class Setup:
    length: int  # of 0w0w
    symbols: int
    width: int
    heads: int
    chunk: int
    batch: int
    steps: int
    warmup: int = 200
    rate: float = 2e-3
    seed: int = 0

    @property
    def word(self) -> int:
        return self.length // 2 - 1

    def words(self, seed: int, device: str) -> torch.Tensor:
        """A batch of 0w0w."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.batch, self.word)
        word = torch.randint(1, self.symbols + 1, shape, generator=generator, device=device)
        once = F.pad(word, (1, 0))
        return torch.cat([once, once], dim=1)

    def rate_at(self, step: int) -> float:
        return self.rate * min((step + 1) / self.warmup, 0.51 + 0.49 * math.cos(math.pi * step / self.steps))


SMALL = Setup(length=256, symbols=31, width=128, heads=4, chunk=16, batch=16, steps=1000)
FULL = Setup(length=1024, symbols=127, width=256, heads=4, chunk=64, batch=32, steps=6000)


def exact_attention(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k = q * (q.square().sum(-1, keepdim=True) + 1e-6 * q.shape[-1]).rsqrt()
    visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril(-1)
    visible[0, 0] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=1.0)


class Copier(nn.Module):
    """A Transformer of one layer."""

    def __init__(self, setup: Setup):
        super().__init__()
        self.setup, width = setup, setup.width
        self.symbol, self.position = nn.Embedding(setup.symbols + 1, width), nn.Embedding(setup.length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qk, self.v = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.logits = nn.Linear(width, setup.symbols + 1)

    def forward(self, words: torch.Tensor, attention: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and accuracy of the second w."""
        setup = self.setup
        x = self.symbol(words) + self.position.weight
        h = self.norms[0](x)
        q, v = (f(h).unflatten(-1, (setup.heads, -1)).transpose(1, 2) for f in (self.qk, self.v))
        if attention == "full":
            seen = exact_attention(q, v)
        else:
            hashes = int(attention.removeprefix("lsh-"))
            seen = pyfast.lsh_attention(q, v, n_hashes=hashes, chunk_length=setup.chunk, seed=seed)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        x = x + self.feed(self.norms[1](x))
        logits = self.logits(self.norms[2](x[:, -setup.word - 1 : -1])).float()
        right = words[:, -setup.word :]
        return F.cross_entropy(logits.mT, right), (logits.argmax(-1) == right).float().mean()


@dataclass
class Score:
    """One training, read in one way."""

    train: str
    read: str
    accuracy: float  # %
    loss: float
    paper: float | None
    steps: int
    seconds: float  # of training


class Training:
    """Can be stopped at any step, and resumed from its file as if it had not been."""

    def __init__(self, setup: Setup, attention: str, device: str, path: pathlib.Path):
        self.setup, self.attention, self.device, self.path = setup, attention, device, path
        torch.manual_seed(setup.seed)
        self.model = Copier(setup).to(device)
        self.adam = torch.optim.Adam(self.model.parameters(), betas=(0.9, 0.99))
        self.steps, self.seconds = 0, 0.0
        self.curve: list[tuple[int, float, float]] = []  # step, loss, accuracy

    def resume(self) -> None:
        if not self.path.exists():
            return
        found = torch.load(self.path, map_location=self.device, weights_only=True)
        if found["setup"] != asdict(self.setup):
            raise SystemExit(f"{self.path} was made with {found['setup']}, this is {asdict(self.setup)}")
        self.model.load_state_dict(found["model"])
        self.adam.load_state_dict(found["adam"])
        self.steps, self.seconds, self.curve = found["steps"], found["seconds"], found["curve"]

    def save(self) -> None:
        found = {"setup": asdict(self.setup), "model": self.model.state_dict(), "adam": self.adam.state_dict()}
        found |= {"steps": self.steps, "seconds": self.seconds, "curve": self.curve}
        report.write(self.path, lambda draft: torch.save(found, draft))

    def run(self, until: float) -> None:
        """To the last step, or to that time."""
        begun = saved = time.monotonic()
        before = self.seconds
        try:
            while self.steps < self.setup.steps and time.monotonic() < until:
                loss, accuracy = self.step()
                now = time.monotonic()
                self.seconds = before + now - begun
                if self.steps % max(1, self.setup.steps // 50) == 0:
                    self._note(float(loss), float(accuracy))
                if now - saved > SAVE_EVERY:
                    self.save()
                    saved = now
        finally:
            self.save()
            print(file=sys.stderr)

    def step(self):
        # Everything random follows from the number of the step.
        seed = self.setup.seed * 2**32 + self.steps
        for group in self.adam.param_groups:
            group["lr"] = self.setup.rate_at(self.steps)
        loss, accuracy = self.model(self.setup.words(seed, self.device), self.attention, seed)
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adam.step()
        self.steps += 1
        return loss.detach(), accuracy

    def _note(self, loss: float, accuracy: float) -> None:
        self.curve.append((self.steps, loss, accuracy))
        words = f"\rtrain {self.attention}: step {self.steps}/{self.setup.steps}, loss {loss:.3f}, "
        print(words + f"accuracy {accuracy:.1%}, {self.seconds:.0f} s ", end="", file=sys.stderr, flush=True)

    @torch.no_grad()
    def read(self, attention: str) -> Score:
        """On fresh words, and fresh hashes."""
        seeds = range(FRESH, FRESH + READ_BATCHES)
        found = [torch.stack(self.model(self.setup.words(s, self.device), attention, s)) for s in seeds]
        loss, accuracy = torch.stack(found).mean(0).tolist()
        paper = PAPER[self.attention][READ.index(attention)]
        return Score(self.attention, attention, 100 * accuracy, loss, paper, self.steps, self.seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", default=",".join(TRAIN), help="attentions to train with; default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    for name in OPTIONS:
        parser.add_argument(f"--{name}", type=int, help="instead of this size's")


def setup_of(args: argparse.Namespace) -> Setup:
    """The paper's on a GPU, unless in a hurry."""
    default = SMALL if args.quick or args.device == "cpu" else FULL
    return replace(default, **{name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None})


def run(args: argparse.Namespace) -> bool:
    setup, about = setup_of(args), machine.describe(args.device)
    trained = args.train.split(",")
    if unknown := set(trained) - set(TRAIN):
        raise SystemExit(f"--train {', '.join(sorted(unknown))}: there are {', '.join(TRAIN)}")
    stem = args.out / f"duplication-{args.device}-{machine.short_name(args.device)}"
    print(setup, flush=True)
    scores: list[Score] = []
    curves: dict[str, list] = {}
    end = time.monotonic() + (args.budget or math.inf)
    for left, name in zip(range(len(trained), 0, -1), trained):
        training = Training(setup, name, args.device, stem.with_name(f"{stem.name}-{name}.pt"))
        if args.resume:
            training.resume()
        try:
            training.run(time.monotonic() + (end - time.monotonic()) / left)
        except KeyboardInterrupt:
            raise SystemExit(
                f"stopped: {training.path} is at step {training.steps}; --resume goes on from there"
            ) from None
        scores += [training.read(attention) for attention in READ]
        curves[name] = training.curve
        found = {"bench": "duplication", "machine": about, "setup": asdict(setup), "curves": curves}
        write_json(stem.with_name(stem.name + ".json"), found | {"rows": [asdict(score) for score in scores]})
        write_csv(stem.with_name(stem.name + ".csv"), scores, about)
        with contextlib.suppress(ImportError):  # of matplotlib
            plot(stem.with_name(stem.name + ".png"), scores, f"duplication: {setup.length} tokens")
    print(table(scores))
    short = [s.train for s in scores if s.read == "full" and s.steps < setup.steps]
    if short:
        print(f"not trained to the end: {', '.join(short)}; --resume goes on")
    print(f"\nwritten: {stem}.json, .csv, .png, and checkpoints")
    return True


def table(scores: list[Score]) -> str:
    lines = []
    for train, own in itertools.groupby(scores, key=lambda score: score.train):
        own = list(own)
        line = {"trained with": train} | {f"read {s.read}": f"{s.accuracy:.1f} ({s.paper:g})" for s in own}
        lines.append(line | {"steps": own[0].steps, "s": own[0].seconds})
    return "accuracy in % (the paper's, of 1024 tokens after 150000 steps)\n" + report.table(lines, list(lines[0]))


def plot(path: pathlib.Path, scores: list[Score], title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axis = figure.subplots()
    for number, train in enumerate(dict.fromkeys(score.train for score in scores)):
        own = {score.read: score for score in scores if score.train == train}
        places, color = range(len(READ)), f"C{number}"
        axis.plot(places, [own[read].accuracy for read in READ[::-1]], "o-", color=color, label=f"trained with {train}")
        axis.plot(places, [own[read].paper for read in READ[::-1]], ":", color=color)
    axis.plot([], [], ":", color="gray", label="the paper's")
    axis.set(xlabel="read with", ylabel="accuracy, %", ylim=(0, 103))
    axis.set_xticks(range(len(READ)), READ[::-1])
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize=7)
    report.write(path, figure.savefig)
