"""The Reformer paper's task: copy w in 0w0w, by a Transformer of one layer that attends exactly or
by hashes.

One layer learns by position where the copy is; only a key that a query sees can be copied from.
Exact attention is that of LSH attention without the hashing: queries are keys, of unit length, and
see themselves only when alone. So weights trained with one can be read with another. Loss and
accuracy are those of the second w.
"""

import math
import pathlib
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

import pyfast
from bench.report import tables

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
        return self.rate * min(
            (step + 1) / self.warmup, 0.51 + 0.49 * math.cos(math.pi * step / self.steps)
        )


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
        self.symbol, self.position = (
            nn.Embedding(setup.symbols + 1, width),
            nn.Embedding(setup.length, width),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qk, self.v = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.logits = nn.Linear(width, setup.symbols + 1)

    def forward(
        self, words: torch.Tensor, attention: str, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
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
            raise SystemExit(
                f"{self.path} was made with {found['setup']}, this is {asdict(self.setup)}"
            )
        self.model.load_state_dict(found["model"])
        self.adam.load_state_dict(found["adam"])
        self.steps, self.seconds, self.curve = found["steps"], found["seconds"], found["curve"]

    def save(self) -> None:
        found = {
            "setup": asdict(self.setup),
            "model": self.model.state_dict(),
            "adam": self.adam.state_dict(),
        }
        found |= {"steps": self.steps, "seconds": self.seconds, "curve": self.curve}
        tables.write(self.path, lambda draft: torch.save(found, draft))

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
        print(
            words + f"accuracy {accuracy:.1%}, {self.seconds:.0f} s ",
            end="",
            file=sys.stderr,
            flush=True,
        )

    @torch.no_grad()
    def read(self, attention: str) -> tuple[float, float]:
        """Loss, and accuracy in %, on fresh words, and fresh hashes."""
        seeds = range(FRESH, FRESH + READ_BATCHES)
        found = [
            torch.stack(self.model(self.setup.words(s, self.device), attention, s)) for s in seeds
        ]
        loss, accuracy = torch.stack(found).mean(0).tolist()
        return loss, 100 * accuracy
