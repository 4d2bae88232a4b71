"""PEFT's models before and after `pyfast.hf.patch`: Llama, dense and on bitsandbytes, and GPT-2; LoRA and DoRA.

A step is the forward and the backward of the loss of all tokens, M of them, to adapters of r = 16 on every linear layer
but the head; logits and gradients are first compared with the same model in float64. `pyfast` is the patched model,
`peft` the one as it was; fp32 adapters are PEFT's default. The rate counts the products with frozen weights, for both.
"""

import argparse
import functools
import itertools

from bench import harness, patch_peers
from bench.goals import Goals
from bench.machine import DTYPES
from bench.patch_peers import KINDS, PEFT, Problem
from bench.peers import nbytes
from bench.report import Goal

PEERS = patch_peers.PEERS
BUDGET = {True: 240, False: 900}


class Step(harness.Case):
    def __init__(self, problem: Problem):
        self.problem, self.dtype, self.m = problem, problem.dtype, problem.tokens
        self.op = f"{'dora' if problem.dora else 'lora'} {problem.kind}"
        self.shape, self.variant = f"{problem.layers}x{problem.size}", f"{problem.adapters} adapters"

    @property
    def flops(self) -> float:
        return patch_peers.exact(self.problem.exact).flops

    @functools.cached_property
    def limit(self) -> float:
        """Twice the error of dense layers of plain torch in this dtype."""
        model = patch_peers.plain(self.problem, DTYPES[self.dtype])
        return 2 * self.error(None, patch_peers.step(model, self.problem)())

    def build(self, peer: PEFT) -> harness.Trial:
        model = peer.model(self.problem)
        tensors = patch_peers.held(model)
        saved = harness.saved_bytes(lambda: patch_peers.loss(model, self.problem), tensors)
        size = nbytes(*tensors)
        return harness.Trial([patch_peers.step(model, self.problem)], 2 * size, size, saved)

    def error(self, peer: PEFT | None, result: list) -> float:
        """The largest of the logits' and any gradient's, as norms."""
        right = patch_peers.exact(self.problem.exact).result
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(result, right, strict=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="1b", help="of the Llamas, as in bench/llama.py; default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--m", help="tokens, 256,1024,...")


def cases(args: argparse.Namespace) -> list[harness.Case]:
    sizes = map(int, args.m.split(",")) if args.m else [256] if args.quick else [256, 1024]
    each = itertools.product(args.dtype, sizes, KINDS, (False, True), dict.fromkeys(["fp32", *args.dtype]))
    where = (args.shape, args.layers)
    return [
        Step(Problem(kind, *where, m, dtype, adapters, dora, args.device)) for dtype, m, kind, dora, adapters in each
    ]


def goals(rows: list[harness.Row], device: str) -> list[Goal]:
    """Patched is faster, whatever the model."""
    found = []
    for dtype in dict.fromkeys(row.dtype for row in rows if row.m):
        own = Goals(rows, dtype=dtype)
        for op, shape, m, variant in dict.fromkeys((r.op, r.shape, r.m, r.variant) for r in rows if r.dtype == dtype):
            own.speed(op, shape, m, "peft", 1.0, variant=variant)
        found += own.found
    return found
