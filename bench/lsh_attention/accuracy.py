"""Bench of LSH attention's error against exact attention, and of its time, by rounds of hashing."""

import functools
import math
import pathlib

import torch

import pyfast
from bench import session
from bench.lsh_attention import problem
from bench.lsh_attention.peers import PEERS
from bench.lsh_attention.problem import CHUNK, SEED, LSHAttention
from bench.measure import harness
from bench.measure.case import BOTH
from bench.report import files, tables

MAX_TOKENS = 4096  # exact attention takes all pairs of tokens
ROUNDS = (1, 2, 4, 8, 16)


def draw_clustered(n: int, heads: int, dim: int, device: str) -> torch.Tensor:
    """Return queries of length 12 in clusters of 16, at a cosine of 0.8 to their center.

    The clusters are what attention is to find.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    centers = torch.randn(heads, -(-n // 16), dim, generator=generator, device=device)
    index = torch.randint(centers.shape[1], (heads, n, 1), generator=generator, device=device)
    noise = torch.randn(heads, n, dim, generator=generator, device=device)
    near = 0.8**0.5 * centers.gather(1, index.expand(-1, -1, dim)) + 0.2**0.5 * noise
    return 12 * torch.nn.functional.normalize(near, dim=-1)[None]


def attend_exactly(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what LSH attention approximates, and its log-sum-exp.

    It is causal; a query sees its own key only where there is no other.
    """
    scores = q @ problem.normalize_keys(q, "rms").mT
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(-1)
    visible[0, 0] = True
    scores = scores.masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def measure_accuracy(n: int, shape: str, device: str, dtype: str) -> list[dict]:
    """Return a row for each number of rounds."""
    case = LSHAttention(shape, "fp32", device, n)
    q, v = draw_clustered(n, *case.size, device), case.draw_tensor("v")
    exact, lse = attend_exactly(q, v)
    rows = []
    for rounds in ROUNDS:
        attend = functools.partial(
            pyfast.lsh_attention, q, v, n_hashes=rounds, chunk_length=CHUNK, seed=SEED
        )
        out = attend()
        _, seen_lse = attend(correct_duplicates=True, return_lse=True)
        timed_case = LSHAttention(shape, dtype, device, n, BOTH, rounds)
        (timed,) = harness.measure_case(
            timed_case, [PEERS["pyfast"]], device, 0.5, math.inf, harness.Forecast()
        )
        rows.append(
            {
                "hashes": rounds,
                "% of the softmax seen": 100 * float((seen_lse - lse)[..., 1:].exp().mean()),
                "error of the output": float((out - exact).norm() / exact.norm()),
                "ms fwd+bwd": timed.ms_p50,
            }
        )
    return rows


def measure(args, stem: pathlib.Path) -> str:
    """Write the accuracy beside the files of a run; return the table."""
    n = min(MAX_TOKENS, max(args.m))
    rows = measure_accuracy(n, args.shapes[0], args.device, args.dtype[0])
    path = stem.with_name(f"{stem.name}-accuracy.json")
    inputs = f"{args.shapes[0]} heads, {n} tokens in clusters of 16"
    files.write_json(path, {"inputs": inputs, "rows": rows})
    session.plot(path)
    return f"hashes and accuracy, {inputs}\n{tables.table(rows, list(rows[0]))}"
