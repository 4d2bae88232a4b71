"""LSH attention: forward, and forward and backward, over lengths and rounds of hashing, beside exact attention.

All are causal, one example, chunks of 64. M is the number of tokens. The rate counts the products of LSH attention, for
all. `sdpa` is exact and has keys of its own; `hf` and `lucidrains` are the attentions of transformers and of
reformer-pytorch, `flex` is FlexAttention on sorted tokens: these share queries and keys as pyfast does, and hash too.
"""

import argparse
import contextlib
import functools
import itertools
import math
import pathlib

import torch

import pyfast
from bench import harness, lsh_peers, lsh_problem, machine, report
from bench.goals import Goals
from bench.lsh_peers import LSHPeer
from bench.lsh_problem import CHUNK, SEED, Problem
from bench.machine import DTYPES
from bench.peers import Lacks, nbytes
from bench.report import Goal

PEERS = lsh_peers.PEERS
BUDGET = {True: 420, False: 3600}  # seconds, quick and full: exact attention of 16K tokens takes some
DTYPE = {"cpu": "fp32", "cuda": "bf16"}
OPS = FORWARD, BOTH = "lsh_attention", "lsh_attention fwd+bwd"
SHAPE = {"cpu": "4x64", "cuda": "8x64"}
QUICK_N = {"cpu": "1K,2K,16K", "cuda": "4K,16K,64K"}
FULL_N = {"cpu": "1K,2K,4K,16K,64K", "cuda": "1K,2K,4K,8K,16K,64K,256K,1M"}
GOAL_N = {"cpu": 2**14, "cuda": 2**16}
QUICK_ROUNDS, FULL_ROUNDS, GOAL_ROUNDS = [1, 4], [1, 2, 4, 8], 4
LARGE_SHAPE, LARGE_N = "8x128", 2**20  # pyfast alone, on a GPU
CHECKED_N = 2**14  # tokens, where more are asked for
ACCURACY_N, ACCURACY_ROUNDS = 4096, [1, 2, 4, 8, 16]


class LSHAttention(harness.Case):
    def __init__(self, op: str, problem: Problem, alone: bool = False):
        self.op, self.problem, self.alone = op, problem, alone
        self.shape, self.dtype, self.m = problem.shape, problem.dtype, problem.n
        self.variant = f"r={problem.rounds}"
        self.parts = (FORWARD,) if op == BOTH else ()
        heads, dim = problem.size
        self.flops = (3.5 if op == BOTH else 1) * 8.0 * heads * problem.n * problem.rounds * CHUNK * dim

    @functools.cached_property
    def limit(self) -> float:
        """Twice plain torch's own error in this dtype."""
        buckets = PEERS["pyfast"].buckets(self.problem, None)
        dtypes = (DTYPES[self.dtype], torch.float64)
        plain, right = (lsh_problem.define(self.problem, buckets, pyfast.LSH_PRESETS["trax"], t) for t in dtypes)
        return 2 * lsh_problem.largest_error(plain, right) + 1e-6

    def build(self, peer: LSHPeer) -> harness.Trial:
        if self.alone and peer.name != "pyfast":
            raise Lacks
        attend = peer.attend(self.problem)
        dout, *given = (peer.fold(t) for t in self.problem.tensors("d" + peer.leaves))
        # Forward: what is given in, the output out. Backward: those and its gradient in, a gradient for each given out.
        moved = nbytes(*given, dout) + (2 * nbytes(*given, dout) if self.op == BOTH else 0)
        count = harness.rotation(moved, self.problem.device)
        sets = [[t.clone().requires_grad_() for t in given] for _ in range(count)]
        if self.op == FORWARD:
            return harness.Trial([functools.partial(torch.no_grad()(attend), *leaves) for leaves in sets], moved, 0)
        saved = harness.saved_bytes(lambda: attend(*sets[0]), [])
        return harness.Trial([functools.partial(self._both, attend, dout, leaves) for leaves in sets], moved, 0, saved)

    @staticmethod
    def _both(attend, dout, leaves):
        out, buckets = attend(*leaves)
        return out.detach(), buckets, *torch.autograd.grad(out, leaves, dout)

    def error(self, peer: LSHPeer, result) -> float:
        return peer.error(self.problem, result)


def tokens(text: str) -> int:
    """16384, 16K, 1M."""
    scale = {"K": 2**10, "M": 2**20}.get(text[-1:].upper())
    return int(text[:-1]) * scale if scale else int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", help="HEADSxDIM,...")
    parser.add_argument("--m", help="tokens, 1K,16K,1M,...")
    parser.add_argument("--r", help="rounds of hashing, 1,2,...")
    parser.add_argument(
        "--tokens",
        type=tokens,
        help="only this: one forward and backward of pyfast over so many tokens, its time and memory (shape 1x64, r=4)",
    )


def cases(args: argparse.Namespace) -> list[harness.Case]:
    """Lengths ascending, so that times can be foretold."""
    lengths = sorted(map(tokens, (args.m or (QUICK_N if args.quick else FULL_N)[args.device]).split(",")))
    rounds = list(map(int, args.r.split(","))) if args.r else QUICK_ROUNDS if args.quick else FULL_ROUNDS
    shapes = (args.shapes or SHAPE[args.device]).split(",")
    found = [
        LSHAttention(op, Problem(shape, dtype, args.device, n, r))
        for shape, dtype, n, r, op in itertools.product(shapes, args.dtype, lengths, rounds, OPS)
    ]
    if args.m is None and GOAL_ROUNDS in rounds:
        if "bf16" not in args.dtype:  # what it saves is a goal in bf16
            problem = Problem(shapes[0], "bf16", args.device, GOAL_N[args.device], GOAL_ROUNDS)
            found += [LSHAttention(BOTH, problem)]
        if args.device == "cuda" and not args.quick:
            problem = Problem(LARGE_SHAPE, "bf16", args.device, LARGE_N, GOAL_ROUNDS)
            found += [LSHAttention(BOTH, problem, alone=True)]
    return found


class LSHGoals(Goals):
    def __init__(self, rows: list[harness.Row], dtype: str):
        super().__init__(rows, dtype=dtype)
        self.variant = f"r={GOAL_ROUNDS}"

    def best(self, shape: str, m: int, target: float) -> None:
        """Against the fastest of the other LSH attentions."""
        mine = self.row(BOTH, shape, m, variant=self.variant)
        times = (self.row(BOTH, shape, m, name, self.variant).ms_p50 for name in ("hf", "lucidrains", "flex"))
        fastest = min(filter(None, times), default=None)
        value = fastest / mine.ms_p50 if fastest and mine.ms_p50 else None
        self.add(mine, "{:.2f}x as fast as the best other LSH attention", ">=", target, value, mine.note or "none ran")

    def saved(self, shape: str, m: int, target: float) -> None:
        row = self.row(BOTH, shape, m, variant=self.variant)
        value = None if row.saved_mb is None else 1e3 * row.saved_mb / (m * int(shape.split("x")[0]))
        self.add(row, "{:.3f} KB saved a token and head", "<=", target, value, row.note)

    def crossover(self, shape: str, target: int) -> None:
        own = [row for row in self.rows.values() if (row.op, row.shape, row.variant) == (BOTH, shape, self.variant)]
        if own:
            n, words = crossover(own)
            text = f"{BOTH} {shape} {self.dtype} {self.variant}: faster than SDPA {words}"
            self.found.append(Goal(text, "<=", target, n, words))

    def large(self) -> None:
        row = self.row(BOTH, LARGE_SHAPE, LARGE_N, variant=self.variant)
        self.add(row, "{:.1f} ms", "<=", 100, row.ms_p50, row.note)
        self.add(row, "peak {:.1f} GB", "<=", 20, row.peak_mb and row.peak_mb / 1e3, row.note)


def goals(rows: list[harness.Row], device: str) -> list[Goal]:
    found, shape, n = LSHGoals(rows, DTYPE[device]), SHAPE[device], GOAL_N[device]
    if device == "cuda":
        found.speed(BOTH, shape, n, "sdpa", 8, variant=found.variant)
        found.best(shape, n, 8)
        found.crossover(shape, 8192)
        found.large()
        return found.found
    for impl in ("hf", "lucidrains"):
        found.speed(BOTH, shape, n, impl, 10, variant=found.variant)
    found.speed(BOTH, shape, 1024, "sdpa", 1, variant="r=1")
    found.speed(BOTH, shape, 2048, "sdpa", 1, variant="r=4")
    narrow = LSHGoals(rows, "bf16")
    narrow.saved(shape, n, 0.45)
    return found.found + narrow.found


# --- beside the times: where exact attention is overtaken, and what hashes buy ---


def crossover(rows: list[harness.Row]) -> tuple[float | None, str]:
    """The length from which pyfast is faster than exact attention; between two, on a line through the logarithms."""
    times = {(row.m, row.impl): row.ms_p50 for row in rows if row.ms_p50}
    lengths = sorted(n for n, impl in times if impl == "pyfast" and (n, "sdpa") in times)
    leads = [math.log(times[n, "sdpa"] / times[n, "pyfast"]) for n in lengths]
    if not lengths:
        return None, "- not measured"
    if leads[-1] < 0:
        return None, f"not up to {lengths[-1]} tokens"
    behind = [i for i, lead in enumerate(leads) if lead < 0]
    if not behind:
        return lengths[0], f"from {lengths[0]} tokens or fewer"
    last = behind[-1]
    share = leads[last] / (leads[last] - leads[last + 1])
    n = lengths[last] * (lengths[last + 1] / lengths[last]) ** share
    return n, f"from {n:.0f} tokens"


def crossovers(rows: list[harness.Row]) -> str:
    kinds = dict.fromkeys((row.op, row.shape, row.dtype, row.variant) for row in rows if row.op in OPS)
    lines = []
    for kind in kinds:
        own = [row for row in rows if (row.op, row.shape, row.dtype, row.variant) == kind]
        if len({row.m for row in own}) > 1:
            lines.append(f"  {' '.join(kind)}: {crossover(own)[1]}")
    return "\n".join(["faster than SDPA", *lines]) if lines else ""


def clustered(n: int, heads: int, dim: int, device: str) -> torch.Tensor:
    """Queries of length 12 around one centre for every 16 of them, at a cosine of 0.8: what attention is to find."""
    generator = torch.Generator(device).manual_seed(SEED)
    centres = torch.randn(heads, -(-n // 16), dim, generator=generator, device=device)
    which = torch.randint(centres.shape[1], (heads, n, 1), generator=generator, device=device)
    noise = torch.randn(heads, n, dim, generator=generator, device=device)
    near = 0.8**0.5 * centres.gather(1, which.expand(-1, -1, dim)) + 0.2**0.5 * noise
    return 12 * torch.nn.functional.normalize(near, dim=-1)[None]


def exact(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What LSH attention approximates, and its log-sum-exp: causal, the own key only where there is no other."""
    scores = q @ lsh_problem.normalised(q, "rms").mT
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(-1)
    visible[0, 0] = True
    scores = scores.masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def accuracy(n: int, shape: str, device: str) -> list[dict]:
    """How near LSH attention comes to exact attention, and how long it takes, by hashes."""
    heads, dim = map(int, shape.split("x"))
    q, v = clustered(n, heads, dim, device), Problem(shape, "fp32", device, n, 1).tensor("v")
    right, lse = exact(q, v)
    found = []
    for rounds in ACCURACY_ROUNDS:
        attend = functools.partial(pyfast.lsh_attention, q, v, n_hashes=rounds, chunk_length=CHUNK, seed=SEED)
        out = attend()
        _, once = attend(correct_duplicates=True, return_lse=True)
        case = LSHAttention(BOTH, Problem(shape, DTYPE[device], device, n, rounds))
        (row,) = harness.run_case(case, [PEERS["pyfast"]], device, 0.5, math.inf, harness.Forecast())
        found.append(
            {
                "hashes": rounds,
                "% of the softmax seen": 100 * float((once - lse)[..., 1:].exp().mean()),
                "error of the output": float((out - right).norm() / right.norm()),
                "ms fwd+bwd": row.ms_p50,
            }
        )
    return found


def plot_accuracy(path: pathlib.Path, found: list[dict], title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=9)
    hashes, seen, error, ms = ([line[key] for line in found] for key in found[0])
    for axis, x, label in zip(figure.subplots(1, 2), (hashes, ms), ("hashes", "ms, forward and backward")):
        axis.plot(x, seen, "o-", label="% of the softmax seen")
        axis.plot(x, [100 * e for e in error], "o-", label="error of the output, %")
        axis.set(xscale="log", xlabel=label, ylim=(0, None))
        axis.set_xticks(x, [f"{number:.4g}" for number in x])
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize=7)
    report.write(path, figure.savefig)


def after(args: argparse.Namespace, rows: list[harness.Row], stem: pathlib.Path, title: str) -> str:
    """Crossovers, and the price of accuracy."""
    n, shape = min(ACCURACY_N, max(row.m or 0 for row in rows)), (args.shapes or SHAPE[args.device]).split(",")[0]
    found = accuracy(n, shape, args.device)
    path = stem.with_name(stem.name + "-accuracy")
    about = f"{shape} heads, {n} tokens in clusters of 16"
    report.write_json(path.with_suffix(".json"), {"inputs": about, "rows": found})
    with contextlib.suppress(ImportError):  # of matplotlib
        plot_accuracy(path.with_suffix(".png"), found, f"{title}, {about}")
    table = report.table(found, list(found[0]))
    return "\n\n".join(filter(None, [crossovers(rows), f"hashes and accuracy, {about}\n{table}"]))


# --- one big call ---


def peak_rss(call) -> tuple[float, float] | None:
    """The most memory that the process has had during a call, and what it had before it, in MB; on Linux."""
    status = pathlib.Path("/proc/self/status")
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None

    def read(key: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024 / 1e6

    before = read("VmRSS")
    call()
    return read("VmHWM"), before


def run(args: argparse.Namespace) -> bool:
    """`--tokens`: checked at a length whose definition can be had, then timed at its own."""
    if not args.tokens:
        return False
    rounds = int(args.r.split(",")[0]) if args.r else GOAL_ROUNDS
    case, checked = (
        LSHAttention(BOTH, Problem(args.shapes or "1x64", args.dtype[0], args.device, n, rounds))
        for n in (args.tokens, min(args.tokens, CHECKED_N))
    )
    peer, about = PEERS["pyfast"], machine.describe(args.device)
    rows = harness.run_case(checked, [peer], args.device, 1, math.inf, harness.Forecast())
    (call, *_) = case.build(peer).calls
    rss = peak_rss(call)
    seconds = sorted(harness.timed_call(call, args.device)[1] for _ in range(3))
    peak = harness.peak_bytes(call, args.device) / 1e6
    print(report.tables(rows))
    print(f"\n{case.op} {case.shape} {case.dtype} {args.tokens} tokens {case.variant}")
    print(f"  {seconds[1]:.2f} s ({seconds[0]:.2f} to {seconds[2]:.2f}), {peak:.0f} MB allocated at most")
    if rss:
        print(f"  resident memory: {rss[0]:.0f} MB at most, {rss[1]:.0f} MB before the call")
    stem = args.out / f"lsh_attention-{args.tokens}-{args.device}-{machine.short_name(args.device)}.json"
    found = {"tokens": args.tokens, "seconds": seconds, "peak_mb": peak, "rss_mb": rss}
    report.write_json(stem, {"machine": about, **found, "checked": [vars(row) for row in rows]})
    print(f"written: {stem}")
    return True
