"""What the README shows: which rows of which results, as which kind of block, in which words."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.llama.run import FASTER
from bench.report import record
from bench.report.figures_kinds import (
    Column,
    Comparison,
    Line,
    Pivot,
    Results,
    Sentence,
    fact,
    file,
    link,
    picture,
    ratio,
    said,
    setup,
    timed,
)
from bench.report.goals import Goal
from bench.report.record import Damaged

OLDER, GPU = "AVX2", "NVIDIA H200"  # other machines

FULL = {"shape": "4096x4096", "dtype": "bf16"}
PLAIN, DROPPED = (
    FULL | {"m": 512, "variant": "r=16"},
    FULL | {"m": 512, "variant": "r=16, dropout 0.05"},
)
STEP = {"op": "lsh_attention fwd+bwd", "shape": "4x64", "dtype": "fp32"}
BLOCKS_12 = {"op": "reversible fwd+bwd", "shape": "384x512", "m": 12}
MILLION = 1 << 20

NF4 = Comparison(
    "nf4",
    "NF4, ms",
    [
        Column("pyfast", ("pyfast",)),
        Column("bitsandbytes (in eval mode)", ("bnb-train",), beside="bnb-eval"),
        Column("torch, not quantized", ("torch",)),
    ],
    [
        Line("weight in memory", FULL | {"op": "linear", "m": 1}, "held_mb", " MB"),
        Line("quantize", FULL | {"op": "quantize"}),
        Line("dequantize", FULL | {"op": "dequantize"}),
        Line("forward, 1 row", FULL | {"op": "linear", "m": 1}),
        Line("forward, 64 rows", FULL | {"op": "linear", "m": 64}),
        Line("forward, 512 rows", FULL | {"op": "linear", "m": 512}),
        Line("backward to x, 512 rows", FULL | {"op": "linear dX", "m": 512}),
    ],
)

LORA = Comparison(
    "lora",
    "LoRA, r = 16, 512 rows, forward + backward, ms",
    [
        Column("pyfast, fp32 A and B", ("pyfast",)),
        Column("PEFT, fp32 A and B (its default)", ("peft", "peft-bnb")),
        Column("PEFT, bf16 A and B", ("peft-16bit", "peft-bnb-16bit")),
        Column("a frozen bf16 layer alone", ("frozen",), judged=False),
    ],
    [
        Line("dense weight", PLAIN | {"op": "lora dense fwd+bwd"}),
        Line("the same, dropout 0.05", DROPPED | {"op": "lora dense fwd+bwd"}),
        Line("NF4 weight (PEFT: bitsandbytes')", PLAIN | {"op": "lora nf4 fwd+bwd"}),
        Line("the same, dropout 0.05", DROPPED | {"op": "lora nf4 fwd+bwd"}),
        Line("DoRA, NF4 weight", PLAIN | {"op": "dora nf4 fwd+bwd"}),
        Line(
            "saved for the backward, dropout 0.05",
            DROPPED | {"op": "lora nf4 fwd+bwd"},
            "saved_mb",
            " MB",
        ),
        Line(
            "peak memory, NF4 weight included",
            DROPPED | {"op": "lora nf4 fwd+bwd"},
            "peak_mb",
            " MB",
        ),
    ],
)

LSH = Comparison(
    "lsh_attention",
    "LSH attention, fp32, 4 heads of 64, causal, forward + backward, ms: tokens, rounds of hashing",
    [
        Column("pyfast", ("pyfast",)),
        Column("transformers' LSHSelfAttention", ("hf",)),
        Column("reformer-pytorch", ("lucidrains",)),
        Column("exact (torch's SDPA)", ("sdpa",)),
    ],
    [
        *(
            Line(f"{n}, {rounds}", STEP | {"m": n, "variant": f"r={rounds}"})
            for n, rounds in ((1024, 1), (2048, 4), (16384, 1), (16384, 4))
        ),
        Line("peak memory, 16384, 4", STEP | {"m": 16384, "variant": "r=4"}, "added_mb", " MB"),
    ],
)

WIDE, DORA = {"shape": "14336x4096", "dtype": "bf16"}, {"dense": "dense", "nf4": "NF4"}
GPU_NF4 = Comparison(
    "nf4",
    "NF4 on an H200, 14336 x 4096, ms",
    [
        Column("pyfast", ("pyfast",)),
        Column("bitsandbytes", ("bnb-train",)),
        Column("dequantized, then torch", ("dequantize+torch",)),
        Column("torch, not quantized", ("torch",)),
    ],
    [
        Line("weight in memory", WIDE | {"op": "linear", "m": 1}, "held_mb", " MB"),
        Line("dequantize", WIDE | {"op": "dequantize"}),
        *(
            Line(f"forward, {m} row{'s'[: m - 1]}", WIDE | {"op": "linear", "m": m})
            for m in (1, 16, 64, 512, 8192)
        ),
        *(
            Line(f"backward to x, {m} rows", WIDE | {"op": "linear dX", "m": m})
            for m in (512, 8192)
        ),
    ],
    GPU,
)

GPU_LORA = replace(
    LORA,
    corner="LoRA on an H200, r = 16, 512 rows, 4096 x 4096, forward + backward, ms",
    lines=[
        *LORA.lines[:4],
        *(
            Line(f"DoRA, {name} weight", PLAIN | {"op": f"dora {base} fwd+bwd"})
            for base, name in DORA.items()
        ),
    ],
    machine=GPU,
)

HEADS = STEP | {"shape": "8x64", "dtype": "bf16"}
GPU_LSH = replace(
    LSH,
    corner="LSH attention on an H200, bf16, 8 heads of 64, causal, forward + backward, ms: tokens, rounds of hashing",
    lines=[
        Line(f"{n}, {rounds}", HEADS | {"m": n, "variant": f"r={rounds}"})
        for n, rounds in ((4096, 1), (16384, 1), (16384, 4), (65536, 1), (65536, 4))
    ],
    machine=GPU,
)

DUPLICATION = Pivot(
    "duplication",
    "trained with",
    (
        "train",
        {
            "full": "exact attention",
            "lsh-4": "LSH, 4 rounds",
            "lsh-2": "LSH, 2 rounds",
            "lsh-1": "LSH, 1 round",
        },
    ),
    (
        "read",
        {
            "full": "read with exact attention",
            "lsh-8": "LSH, 8 rounds",
            "lsh-4": "4",
            "lsh-2": "2",
            "lsh-1": "1",
        },
    ),
    "{accuracy:.3g} ({paper:g})",
)

CONDITIONS = Sentence(
    "Measured on {cores} of an {cpu} ({isa}), torch {torch}, bitsandbytes {bitsandbytes}, PEFT {peft}: medians in "
    "ms, weights cold, 4096 x 4096 (nested NF4), inputs bf16. `make bench` measures again; `python -m bench.report.page "
    "bench/results` shows it all as one page.",
    {
        "cores": lambda results: fact("cores")(results).partition(",")[0],
        "cpu": fact("cpu"),
        "isa": lambda results: record.isa(results.of("nf4").machine),
        "torch": lambda results: fact("torch")(results).partition("+")[0],
        "bitsandbytes": fact("bitsandbytes"),
        "peft": fact("peft"),
    },
)

ATTENTION = Sentence(
    "A million tokens of one head of 64 take {seconds:.1f} s, forward and backward, and {gb:.1f} GB ({million}). "
    "LSH attention is another function than exact attention: on queries in clusters of 16 among 4096 tokens it "
    "sees {one:.0f} % of the softmax with one round, {four:.0f} % with four and {sixteen:.0f} % with sixteen "
    "({curve}), and a model is to be trained with it. `python -m bench duplication` shows what that buys on the "
    "Reformer paper's task, to repeat the first half of a sequence, scaled down to {length} tokens and {steps} "
    "steps: accuracy in %, in brackets the paper's, of 1024 tokens.",
    {
        "seconds": lambda results: sorted(
            results.of("long_attention", tokens=MILLION).data["seconds"]
        )[1],
        "gb": lambda results: results.of("long_attention", tokens=MILLION).data["peak_mb"] / 1e3,
        "million": file("long_attention", tokens=MILLION),
        "one": said("accuracy", "% of the softmax seen", hashes=1),
        "four": said("accuracy", "% of the softmax seen", hashes=4),
        "sixteen": said("accuracy", "% of the softmax seen", hashes=16),
        "curve": picture("accuracy", "curve"),
        "length": setup("duplication", "length"),
        "steps": setup("duplication", "steps"),
    },
)


def resident(depth: int) -> Callable[[Results], float]:
    """All of the process, in GB."""
    parts = [
        said("long_context", key, 1e-9, tokens=MILLION, depth=depth)
        for key in ("peak_bytes", "before_bytes")
    ]
    return lambda results: sum(part(results) for part in parts)


REFORMER = Sentence(
    "A Reformer's forward and backward over {tokens:,} tokens at once (width {width}, {heads} heads of {head_dim}, "
    "feed-forward {hidden}, {n_hashes} round of hashing, fp32: the shape of the Reformer paper's half a million "
    "tokens) takes {gb6:.1f} GB with 6 layers and {gb12:.1f} with 12, Python and torch included, and {s6:.0f} and "
    "{s12:.0f} s ({million}). A small one learns real text as an equal-size Transformer does: {mine:.3f} nats a "
    "byte held out against {theirs:.3f} after {steps} steps ({curves}).",
    {
        **{
            key: setup("long_context", key, tokens=MILLION)
            for key in ("width", "heads", "head_dim", "hidden")
        },
        "n_hashes": setup("long_context", "n_hashes", tokens=MILLION),
        "tokens": said("long_context", "tokens", tokens=MILLION),
        "gb6": resident(6),
        "gb12": resident(12),
        "s6": said("long_context", "seconds", tokens=MILLION, depth=6),
        "s12": said("long_context", "seconds", tokens=MILLION, depth=12),
        "million": file("long_context", tokens=MILLION),
        "mine": said("learning", "held_out", model="Reformer"),
        "theirs": said("learning", "held_out", model="Transformer"),
        "steps": said("learning", "steps", model="Reformer"),
        "curves": picture("learning", "curves"),
    },
)


def exactness(error: Callable[[Results], float]) -> Callable[[Results], str]:
    return lambda results: f"off by {100 * error(results):.1g} %" if error(results) else "exact"


REVERSIBLE = Sentence(
    "Reversible blocks, {blocks} of width 384 over 512 tokens ({record}): {mine:.1f} MB beside parameters and "
    "gradients where stored activations take {stored:.0f}, in {fp32:.2f} times their time (fp32; bf16: "
    "{mine16:.1f} MB for {stored16:.0f}, {bf16:.2f} times). Inputs recovered through {deep} blocks in bf16 are "
    "{exact}; other libraries' are off by {drift:.1f} %.",
    {
        "blocks": lambda results: BLOCKS_12["m"],
        "record": file("reversible", dtype="fp32"),
        "mine": timed("reversible", "added_mb", dtype="fp32", impl="pyfast", **BLOCKS_12),
        "stored": timed("reversible", "added_mb", dtype="fp32", impl="torch", **BLOCKS_12),
        "fp32": ratio("reversible", "torch", dtype="fp32", **BLOCKS_12),
        "mine16": timed("reversible", "added_mb", dtype="bf16", impl="pyfast", **BLOCKS_12),
        "stored16": timed("reversible", "added_mb", dtype="bf16", impl="torch", **BLOCKS_12),
        "bf16": ratio("reversible", "torch", dtype="bf16", **BLOCKS_12),
        "deep": said("drift", "blocks", dtype="bf16", impl="revtorch", blocks=48),
        "exact": exactness(
            said("drift", "recovered input", dtype="bf16", impl="pyfast", blocks=48)
        ),
        "drift": said("drift", "recovered input", 100, dtype="bf16", impl="revtorch", blocks=48),
    },
)

SEVEN, STEP_1B = {"shape": "7b", "layers": 32}, {"shape": "1b", "seq": 512}


def reached(text: str, kind: str = "training_step", **where: Any) -> Callable[[Results], float]:
    """The value of a goal."""

    def value(results: Results) -> float:
        one = results.of(kind, **where)
        found = [goal["value"] for goal in one.data["goals"] if goal["text"] == text]
        if not found:
            raise Damaged(f"{one.path}: no goal {text!r}")
        return found[0]

    return value


MODELS = Sentence(
    "QLoRA of a Llama of 7B's shape ({layers} layers, {seq} tokens, each layer's activations computed again) takes "
    "{gb:.2f} GB, Python and torch included, at {mine:.1f} tokens/s on these cores; PEFT with bitsandbytes "
    "{gb_bnb:.2f} GB at {theirs:.1f} ({seven}). A training step of {depth} layers of a 1B Llama is {lora:.2f} times as "
    "fast as PEFT's with LoRA, {qlora:.2f} times with QLoRA, and `hf.patch` makes PEFT's own model on bitsandbytes "
    "{patched:.2f} times as fast "
    "({step}).",
    {
        "layers": said("qlora_7b", "layers", way="pyfast-nf4", **SEVEN),
        "seq": said("qlora_7b", "seq", way="pyfast-nf4", **SEVEN),
        "gb": said("qlora_7b", "peak_bytes", 1e-9, way="pyfast-nf4", **SEVEN),
        "gb_bnb": said("qlora_7b", "peak_bytes", 1e-9, way="peft-bnb", **SEVEN),
        "mine": said("qlora_7b", "tokens_per_s", way="pyfast-nf4", **SEVEN),
        "theirs": said("qlora_7b", "tokens_per_s", way="peft-bnb", **SEVEN),
        "seven": file("qlora_7b", **SEVEN),
        "depth": said("training_step", "layers", way="pyfast", **STEP_1B),
        "lora": reached(FASTER.format("pyfast", "peft"), **STEP_1B),
        "qlora": reached(FASTER.format("pyfast-nf4", "peft-bnb"), **STEP_1B),
        "patched": reached(FASTER.format("peft-bnb+patch", "peft-bnb"), **STEP_1B),
        "step": file("training_step", **STEP_1B),
    },
)


def judged(results: Results) -> list[Goal]:
    return [goal for one in results.own for goal in one.goals]


def tally(machine: str) -> dict[str, Callable[[Results], int]]:
    return {
        "all": lambda results: len(judged(results.on(machine))),
        "met": lambda results: sum(goal.met is True for goal in judged(results.on(machine))),
    }


OTHER = Sentence(
    "A batch of 8 adapters takes {adapters:.2f} times the time of one. On a CPU without bf16 instructions torch's "
    "bf16 is slow and its fp32 the opponent: on Zen 3 NF4's forward takes {zen64:.2f} of its time at 64 rows and "
    "{zen512:.2f} at 512 ({record}); of {all} goals there {met} are met.",
    {
        "adapters": ratio("lora", "pyfast-plain", op="8 adapters dense fwd+bwd", **PLAIN),
        "zen64": ratio("nf4", "torch-fp32", OLDER, op="linear", m=64, **FULL),
        "zen512": ratio("nf4", "torch-fp32", OLDER, op="linear", m=512, **FULL),
        "record": lambda results: link(results.on(OLDER).of("nf4")),
        **tally(OLDER),
    },
)


STEP_512 = PLAIN | {"op": "lora dense fwd+bwd"}
ADAPTER = {"op": "adapter fwd+bwd", "shape": "4096x64", "m": 4096}

ON_GPU = Sentence(
    "On an {gpu} (torch {torch}, Triton {triton}, bitsandbytes {bitsandbytes}). Short calls are in CUDA graphs, as the "
    "records say of each, so that launching is not in their times. It takes longer than PEFT's: {launch:.1f} ms of the "
    "host for a forward and backward of LoRA where PEFT takes {launch_peft:.1f}, so that short steps without graphs "
    "wait for it. Adapters of 4096 x 64 take {adapter:.2f} of torch's time at 4096 rows ({record}). Of {all} goals "
    "there {met} are met; `python -m bench goals bench/results/cuda-nvidia-h200` lists all.",
    {
        "gpu": lambda results: GPU.removeprefix("NVIDIA "),
        **{
            key: lambda results, key=key: fact(key)(results.on(GPU))
            for key in ("torch", "triton", "bitsandbytes")
        },
        "launch": timed("lora", "launch_ms", GPU, impl="pyfast", **STEP_512),
        "launch_peft": timed("lora", "launch_ms", GPU, impl="peft", **STEP_512),
        "adapter": ratio("adapter", "torch", GPU, **ADAPTER),
        "record": lambda results: link(results.on(GPU).of("adapter")),
        **tally(GPU),
    },
)


STEP_8B, SEVENTY = {"shape": "8b", "layers": 32}, {"shape": "70b", "layers": 80}


def on_gpu(**values: Callable[[Results], Any]) -> dict[str, Callable[[Results], Any]]:
    return {
        name: lambda results, value=value: value(results.on(GPU)) for name, value in values.items()
    }


GPU_MODELS = Sentence(
    "There whole models wait for launches: a training step of Llama 3 8B's shape on {tokens} tokens makes {lora:.2f} "
    "of the tokens/s of PEFT's with LoRA and {qlora:.2f} of PEFT's with bitsandbytes with QLoRA, in {gb:.1f} GB to "
    "{gb_peft:.1f} and {gb_nf4:.1f} to {gb_bnb:.1f} ({step}); QLoRA of 70B's shape {seventy:.2f} of the tokens/s, in "
    "{gb_70:.1f} GB ({record_70}). A Reformer's forward and backward over a million tokens (width {width}, {heads} "
    "heads, feed-forward {hidden}, {depth} layers, bf16) takes {seconds:.1f} s and {gb_long:.1f} GB ({record_long}).",
    on_gpu(
        tokens=said("training_step", "seq", way="pyfast", **STEP_8B),
        lora=reached(FASTER.format("pyfast", "peft"), **STEP_8B),
        qlora=reached(FASTER.format("pyfast-nf4", "peft-bnb"), **STEP_8B),
        gb=said("training_step", "peak_bytes", 1e-9, way="pyfast", **STEP_8B),
        gb_peft=said("training_step", "peak_bytes", 1e-9, way="peft", **STEP_8B),
        gb_nf4=said("training_step", "peak_bytes", 1e-9, way="pyfast-nf4", **STEP_8B),
        gb_bnb=said("training_step", "peak_bytes", 1e-9, way="peft-bnb", **STEP_8B),
        step=file("training_step", **STEP_8B),
        seventy=reached(FASTER.format("pyfast-nf4", "peft-bnb"), "qlora_7b", **SEVENTY),
        gb_70=said("qlora_7b", "peak_bytes", 1e-9, way="pyfast-nf4", **SEVENTY),
        record_70=file("qlora_7b", **SEVENTY),
        **{key: setup("long_context", key, tokens=MILLION) for key in ("width", "heads", "hidden")},
        depth=said("long_context", "depth", tokens=MILLION, depth=12),
        seconds=said("long_context", "seconds", tokens=MILLION, depth=12),
        gb_long=said("long_context", "peak_bytes", 1e-9, tokens=MILLION, depth=12),
        record_long=file("long_context", tokens=MILLION),
    ),
)


def goals(results: Results) -> str:
    """How many are met, and by name those that are not."""
    found = judged(results)
    missed = [goal for goal in found if goal.met is False]
    unknown = sum(goal.met is None for goal in found)
    words = f"Of {len(found)} goals on this machine {len(found) - len(missed) - unknown} are met"
    words += f", {len(missed)} missed" + (f", {unknown} not measured" if unknown else "")
    if missed:
        words += ": " + "; ".join(f"{goal.sentence} (it is {goal.figure})" for goal in missed)
    return words + "."


BLOCKS: dict[str, Callable[[Results], str]] = {
    "conditions": CONDITIONS,
    "nf4": NF4,
    "lora": LORA,
    "models": MODELS,
    "lsh": LSH,
    "attention": ATTENTION,
    "duplication": DUPLICATION,
    "reformer": REFORMER,
    "reversible": REVERSIBLE,
    "other": OTHER,
    "gpu": ON_GPU,
    "gpu-models": GPU_MODELS,
    "gpu-nf4": GPU_NF4,
    "gpu-lora": GPU_LORA,
    "gpu-lsh": GPU_LSH,
    "goals": goals,
}

# The picture: a panel each, of (label, bench, rows); peers by the names that a reader knows.
BARS = {
    "4-bit layers and LoRA, bf16, 4096 x 4096": [
        ("NF4, forward, 1 row", "nf4", FULL | {"op": "linear", "m": 1}),
        ("NF4, forward, 512 rows", "nf4", FULL | {"op": "linear", "m": 512}),
        ("NF4, quantize", "nf4", FULL | {"op": "quantize"}),
        ("LoRA, 512 rows, dropout", "lora", DROPPED | {"op": "lora dense fwd+bwd"}),
        ("QLoRA, 512 rows, dropout", "lora", DROPPED | {"op": "lora nf4 fwd+bwd"}),
    ],
    "long contexts, fp32, forward + backward": [
        (
            "LSH attention, 1024 tokens, 1 round",
            "lsh_attention",
            STEP | {"m": 1024, "variant": "r=1"},
        ),
        (
            "LSH attention, 16384 tokens, 4 rounds",
            "lsh_attention",
            STEP | {"m": 16384, "variant": "r=4"},
        ),
        ("12 reversible blocks", "reversible", BLOCKS_12 | {"dtype": "fp32"}),
    ],
}
NAMES = {
    "nf4": {
        "torch": "torch, 16 bits",
        "bnb-train": "bitsandbytes",
        "bnb-eval": "bitsandbytes, eval",
    },
    "lora": {"frozen": "frozen layer alone", "peft": "PEFT", "peft-bnb": "PEFT, bitsandbytes"},
    "lsh_attention": {
        "sdpa": "exact, SDPA",
        "hf": "transformers",
        "lucidrains": "reformer-pytorch",
    },
    "reversible": {
        "torch": "stored activations",
        "checkpoint": "checkpointing",
        "revtorch": "revtorch",
    },
}
