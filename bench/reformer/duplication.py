"""The Reformer paper's task, to copy w in 0w0w: trained with one attention, read with another.

The model is a Transformer of one layer that attends exactly or by hashes. One layer learns by
position where the copy is; only a key that a query sees can be copied from. Exact attention is LSH
attention without the hashing: queries are keys, of unit length, and see themselves only when alone.
So weights that were trained with one can be read with another. Loss and accuracy are those of the
second w.
"""

import math
import pathlib
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import pyfast
from bench import options, session
from bench.measure import machine
from bench.report import files, tables

TRAIN, READ = ["full", "lsh-4", "lsh-2", "lsh-1"], ["full", "lsh-8", "lsh-4", "lsh-2", "lsh-1"]
# Table 2 of the paper: accuracies in %, by the attention of training and of reading.
PAPER = {
    "full": (100, 94.8, 92.5, 76.9, 52.5),
    "lsh-4": (0.8, 100, 99.9, 99.4, 91.9),
    "lsh-2": (0.8, 100, 99.9, 98.1, 86.8),
    "lsh-1": (0.8, 99.9, 99.6, 94.8, 77.9),
}
OPTIONS = ("length", "symbols", "width", "batch", "steps", "seed")  # fields of a Setup
FRESH_SEED = 2**40  # of the first batch to read; seeds of training are smaller
READ_BATCHES = 16
SAVE_SECONDS = 20  # between two checkpoints


@dataclass(frozen=True)
class Setup:
    """Sizes and rates of a training."""

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
        """Length of w."""
        return self.length // 2 - 1

    def words(self, seed: int, device: str) -> torch.Tensor:
        """Return a batch of 0w0w."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.batch, self.word)
        word = torch.randint(1, self.symbols + 1, shape, generator=generator, device=device)
        once = F.pad(word, (1, 0))
        return torch.cat([once, once], dim=1)

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step: warmed up, then along a cosine."""
        return self.rate * min(
            (step + 1) / self.warmup, 0.51 + 0.49 * math.cos(math.pi * step / self.steps)
        )


SMALL = Setup(length=256, symbols=31, width=128, heads=4, chunk=16, batch=16, steps=1000)
FULL = Setup(length=1024, symbols=127, width=256, heads=4, chunk=64, batch=32, steps=6000)


def exact_attention(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend exactly, with queries as keys."""
    k = q * (q.square().sum(-1, keepdim=True) + 1e-6 * q.shape[-1]).rsqrt()
    visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril(-1)
    visible[0, 0] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=1.0)


class Copier(nn.Module):
    """A Transformer of one layer."""

    def __init__(self, setup: Setup):
        super().__init__()
        self.setup, width = setup, setup.width
        self.symbol = nn.Embedding(setup.symbols + 1, width)
        self.position = nn.Embedding(setup.length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qk, self.v = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.logits = nn.Linear(width, setup.symbols + 1)

    def forward(
        self, words: torch.Tensor, attention: str, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return loss and accuracy of the second w."""
        setup = self.setup
        x = self.symbol(words) + self.position.weight
        h = self.norms[0](x)
        q, v = (f(h).unflatten(-1, (setup.heads, -1)).transpose(1, 2) for f in (self.qk, self.v))
        if attention == "full":
            attended = exact_attention(q, v)
        else:
            hashing = {"n_hashes": int(attention.removeprefix("lsh-")), "seed": seed}
            attended = pyfast.lsh_attention(q, v, chunk_length=setup.chunk, **hashing)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.feed(self.norms[1](x))
        logits = self.logits(self.norms[2](x[:, -setup.word - 1 : -1])).float()
        expected = words[:, -setup.word :]
        accuracy = (logits.argmax(-1) == expected).float().mean()
        return F.cross_entropy(logits.mT, expected), accuracy


class Training:
    """A training that can be stopped at any step, and resumed from its file exactly."""

    def __init__(self, setup: Setup, attention: str, device: str, path: pathlib.Path):
        self.setup, self.attention, self.device, self.path = setup, attention, device, path
        torch.manual_seed(setup.seed)
        self.model = Copier(setup).to(device)
        self.adam = torch.optim.Adam(self.model.parameters(), betas=(0.9, 0.99))
        self.steps, self.seconds = 0, 0.0
        self.curve: list[tuple[int, float, float]] = []  # step, loss, accuracy

    def resume(self) -> None:
        """Load the checkpoint, if there is one."""
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        if state["setup"] != asdict(self.setup):
            raise SystemExit(
                f"{self.path} was made with {state['setup']}, this is {asdict(self.setup)}"
            )
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        self.steps, self.seconds, self.curve = state["steps"], state["seconds"], state["curve"]

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "setup": asdict(self.setup),
            "model": self.model.state_dict(),
            "adam": self.adam.state_dict(),
            "steps": self.steps,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        files.write_atomically(self.path, lambda draft: torch.save(state, draft))

    def run(self, until: float) -> None:
        """Train to the last step, or until that time."""
        begin = saved = time.monotonic()
        before = self.seconds
        try:
            while self.steps < self.setup.steps and time.monotonic() < until:
                loss, accuracy = self.step()
                now = time.monotonic()
                self.seconds = before + now - begin
                if self.steps % max(1, self.setup.steps // 50) == 0:
                    self._record(float(loss), float(accuracy))
                if now - saved > SAVE_SECONDS:
                    self.save()
                    saved = now
        finally:
            self.save()
            print(file=sys.stderr)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one step; return its loss and accuracy."""
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

    def _record(self, loss: float, accuracy: float) -> None:
        self.curve.append((self.steps, loss, accuracy))
        progress = f"train {self.attention}: step {self.steps}/{self.setup.steps}"
        line = f"\r{progress}, loss {loss:.3f}, accuracy {accuracy:.1%}, {self.seconds:.0f} s "
        print(line, end="", file=sys.stderr, flush=True)

    @torch.no_grad()
    def read(self, attention: str) -> tuple[float, float]:
        """Return the loss, and the accuracy in %, on fresh words with fresh hashes."""
        results = []
        for seed in range(FRESH_SEED, FRESH_SEED + READ_BATCHES):
            words = self.setup.words(seed, self.device)
            results.append(torch.stack(self.model(words, attention, seed)))
        loss, accuracy = torch.stack(results).mean(0).tolist()
        return loss, 100 * accuracy


@dataclass
class Score:
    """One training, read with one attention."""

    train: str
    read: str
    loss: float
    accuracy: float  # %
    paper: float
    steps: int
    seconds: float  # of training


def add_arguments(parser):
    """Add the bench's options."""
    options.add_budget(parser)
    parser.add_argument(
        "--train", default=",".join(TRAIN), help="attentions to train with; default: %(default)s"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    for name in OPTIONS:
        parser.add_argument(f"--{name}", type=int, help=f"{name}; default: by device and --quick")


def run(args):
    """Train with each attention and read with all; on a GPU at the paper's size, if not --quick."""
    default = SMALL if args.quick or args.device == "cpu" else FULL
    changes = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    setup = replace(default, **changes)
    trained, scores, curves = args.train.split(","), [], {}
    if unknown := set(trained) - set(TRAIN):
        raise SystemExit(f"--train {', '.join(sorted(unknown))}: there are {', '.join(TRAIN)}")
    print(setup, flush=True)
    path, end = args.out / "duplication.json", time.monotonic() + (args.budget or math.inf)
    header = {"bench": "duplication", "machine": machine.describe(args.device)}
    header |= {"flags": args.flags, "setup": asdict(setup)}
    for trainings_left, name in zip(range(len(trained), 0, -1), trained):
        training = Training(setup, name, args.device, args.out / f"duplication-{name}.pt")
        until = time.monotonic() + (end - time.monotonic()) / trainings_left
        _train(training, until, args.resume)
        for attention, paper in zip(READ, PAPER[name]):
            loss, accuracy = training.read(attention)
            scores.append(
                Score(name, attention, loss, accuracy, paper, training.steps, training.seconds)
            )
        curves[name] = training.curve
        rows = list(map(asdict, scores))
        files.write_json(path, header | {"curves": curves, "rows": rows})
        files.write_csv(path.with_suffix(".csv"), rows, header["machine"])
    print(table(scores))
    if unfinished := {score.train for score in scores if score.steps < setup.steps}:
        print(f"not trained to the end: {', '.join(sorted(unfinished))}; --resume goes on")
    print(f"\n{session.describe_written(path)}, and checkpoints")


def _train(training: Training, until: float, resume: bool) -> None:
    if resume:
        training.resume()
    try:
        training.run(until)
    except KeyboardInterrupt:
        print(f"{training.path} is at step {training.steps}; --resume goes on from there")
        raise


def table(scores: list[Score]) -> str:
    """Return a line for each training, with the accuracy of each reading."""
    lines: dict[str, dict] = {}
    for score in scores:
        line = lines.setdefault(score.train, {"trained with": score.train})
        line[f"read {score.read}"] = f"{score.accuracy:.1f} ({score.paper:g})"
    for score in scores:
        lines[score.train] |= {"steps": score.steps, "s": score.seconds}
    rows = list(lines.values())
    heading = "accuracy in % (the paper's, of 1024 tokens after 150000 steps)"
    return f"{heading}\n{tables.table(rows, list(rows[0]))}"
