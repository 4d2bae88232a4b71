"""A small folder of bench results."""

import json

MACHINE = {
    "cpu": "a <fast> CPU",
    "cores": "2 cores, 2 threads",
    "isa": "AVX512+AVX512-BF16",
    "torch": "2.13.0",
    "date": "2026-01-01 00:00 UTC",
    "commit": "abc",
}
GOALS = [
    {
        "text": "linear M=1: {:.2f}x as fast as torch",
        "sense": ">=",
        "target": 4,
        "value": 5.034,
        "why": "",
    },
    {
        "text": "linear M=64: {:.2f}x the time of torch",
        "sense": "<=",
        "target": 1.2,
        "value": 1.5,
        "why": "",
        "low": 1.4,
        "high": 1.6,
    },
    {
        "text": "linear M=1: {:.0f} % of copy bandwidth",
        "sense": ">=",
        "target": 80,
        "value": None,
        "why": "no GPU | none",
    },
]
TIMES = {"pyfast": 1.0, "torch": 2.0, "bnb-train": 0.5}


def make_row(impl: str, m: int, ms: float | None, **more) -> dict:
    """Return a row of a timing."""
    row = {
        "op": "linear",
        "shape": "64x64",
        "dtype": "bf16",
        "impl": impl,
        "m": m,
        "variant": "",
        "ms_p50": ms,
        "moved_bytes": 1e6,
        "flops": 2e6 * m,
        "gb_s": 1.0,
        "tflop_s": 0.1,
        "note": "",
    }
    if ms is not None:
        row |= {"ms_p20": 0.9 * ms, "ms_p80": 1.1 * ms, "peak_mb": 12.0 + m, "held_mb": 8.0}
    return row | more


def make_result(**more) -> dict:
    """Return a result of nf4 with three implementations at three sizes."""
    rows = [make_row(impl, m, ms * m) for m in (1, 16, 64) for impl, ms in TIMES.items()]
    rows.append(make_row("torchao", 1, None, note="out of memory"))
    rows.append(
        {
            "op": "all",
            "shape": "-",
            "m": None,
            "dtype": "-",
            "impl": "unsloth",
            "ms_p50": None,
            "note": "needs a GPU",
        }
    )
    return {
        "bench": "nf4",
        "machine": MACHINE,
        "ceilings": {"copy": 4e10, "gemm bf16": 4e11, "ceiling bf16": 4e11},
        "rows": rows,
        "goals": GOALS,
    } | more


def write_results(folder) -> None:
    """Write results of two machines below a folder."""
    machine_folder = folder / "cpu-a-machine"
    machine_folder.mkdir()
    (machine_folder / "nf4.json").write_text(json.dumps(make_result()))
    (machine_folder / "nf4.csv").write_text("op\nlinear\n")
    drift_row = {"dtype": "bf16", "impl": "pyfast", "blocks": 6}
    drift_row |= {"recovered input": 0.0, "gradients": 0.0}
    drift = {"inputs": "64x64", "rows": [drift_row]}
    (machine_folder / "nf4-drift.json").write_text(json.dumps(drift))
    gpu = {"bench": "lora", "machine": MACHINE | {"gpu": "NVIDIA H200"}}
    (folder / "lora.json").write_text(json.dumps(make_result(**gpu)))
