"""What hashes buy: how near LSH attention comes to exact attention, and how long it takes, by rounds of hashing."""

import functools
import math
import pathlib

import torch

import pyfast
from bench import session
from bench.lsh_attention import problem as lsh_problem
from bench.lsh_attention.peers import PEERS
from bench.lsh_attention.problem import CHUNK, SEED, LSHAttention
from bench.measure import harness
from bench.measure.case import BOTH
from bench.report import tables

MOST, ROUNDS = 4096, (1, 2, 4, 8, 16)  # tokens, for the exact ones are all pairs


def clustered(n: int, heads: int, dim: int, device: str) -> torch.Tensor:
    """Queries of length 12 around one center for every 16 of them, at a cosine of 0.8: what attention is to find."""
    generator = torch.Generator(device).manual_seed(SEED)
    centers = torch.randn(heads, -(-n // 16), dim, generator=generator, device=device)
    which = torch.randint(centers.shape[1], (heads, n, 1), generator=generator, device=device)
    noise = torch.randn(heads, n, dim, generator=generator, device=device)
    near = 0.8**0.5 * centers.gather(1, which.expand(-1, -1, dim)) + 0.2**0.5 * noise
    return 12 * torch.nn.functional.normalize(near, dim=-1)[None]


def exact(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What LSH attention approximates, and its log-sum-exp: causal, the own key only where there is no other."""
    scores = q @ lsh_problem.normalized(q, "rms").mT
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(-1)
    visible[0, 0] = True
    scores = scores.masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def accuracy(n: int, shape: str, device: str, dtype: str) -> list[dict]:
    problem = LSHAttention(shape, "fp32", device, n)
    q, v = clustered(n, *problem.size, device), problem.tensor("v")
    right, lse = exact(q, v)
    found = []
    for rounds in ROUNDS:
        attend = functools.partial(
            pyfast.lsh_attention, q, v, n_hashes=rounds, chunk_length=CHUNK, seed=SEED
        )
        out = attend()
        _, once = attend(correct_duplicates=True, return_lse=True)
        case = LSHAttention(shape, dtype, device, n, BOTH, rounds)
        (row,) = harness.run_case(
            case, [PEERS["pyfast"]], device, 0.5, math.inf, harness.Forecast()
        )
        found.append(
            {
                "hashes": rounds,
                "% of the softmax seen": 100 * float((once - lse)[..., 1:].exp().mean()),
                "error of the output": float((out - right).norm() / right.norm()),
                "ms fwd+bwd": row.ms_p50,
            }
        )
    return found


def measure(args, stem: pathlib.Path) -> str:
    """Files beside those of a run, and the table."""
    n = min(MOST, max(args.m))
    found = accuracy(n, args.shapes[0], args.device, args.dtype[0])
    path, about = (
        stem.with_name(f"{stem.name}-accuracy.json"),
        f"{args.shapes[0]} heads, {n} tokens in clusters of 16",
    )
    tables.write_json(path, {"inputs": about, "rows": found})
    session.plot(path)
    return f"hashes and accuracy, {about}\n{tables.table(found, list(found[0]))}"
