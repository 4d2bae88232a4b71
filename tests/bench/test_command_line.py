"""The command line of the benches."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import options

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m", "bench"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["nf5"], "unknown bench 'nf5'; there are adapter,"),
        (["nf4", "lora", "nf5"], "unknown bench 'nf5'"),
        (["nf4", "--sizes", "3"], "python -m bench nf4: unrecognized arguments: --sizes 3"),
        (["nf4", "--dtype", "int8"], "--dtype: unknown 'int8'; there are bf16, fp32, fp16"),
        (["nf4", "--peers", "bits"], "--peers: unknown 'bits'; there are pyfast, torch,"),
        (
            ["adapter", "lora", "--peers", "peft"],
            "bench adapter: --peers: none of these; there are pyfast, torch",
        ),
        (["nf4", "--shapes", "64x64,64"], "--shapes: '64' must be 2 numbers, such as 4096x4096"),
        (["nf4", "--shapes", "64xK"], "--shapes: '64xK' must be 2 numbers, such as 4096x4096"),
        (["nf4", "--m", "1,two"], "'two' must be a number such as 512, 16K or 1M"),
        (
            ["long_context", "--tokens", "4K,x"],
            "argument --tokens: 'x' must be a number such as 512, 16K or 1M",
        ),
        (["long_context", "--depth", "two"], "argument --depth: 'two' must be a number such as"),
        (
            ["long_context", "--depth", "6,3"],
            "argument --depth: 3: layers come in pairs, local and LSH",
        ),
        (["nf4", "--budget", "0"], "--budget: 0 must be more than 0"),
        (["nf4", "--quick", "--full"], "not allowed with argument --quick"),
        (["nf4", "--compare", "no/such"], "no/such: there is no such file or folder"),
        (
            ["long_context", "--budget", "3"],
            "bench long_context: unrecognized arguments: --budget 3",
        ),
        (
            ["nf4", "learning", "--compare", "tests"],
            "bench learning: unrecognized arguments: --compare tests",
        ),
        (["training_step", "--compare", "no/such"], "no/such: there is no such file or folder"),
        (["goals", "no/such"], "no/such: there is no such file or folder"),
        (["compare", "tests"], "the following arguments are required: NEW"),
    ],
)
def test_wrong_words_are_told_in_one_line(words, said, capsys):
    try:
        code = bench.main(words)
    except SystemExit as error:
        code = error.code
    out, line = capsys.readouterr()
    assert code == 2 and not out and said in line and line.count("\n") == 1, line


def test_a_device_that_is_not_there_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["nf4", "--device", "cuda"])
    assert "--device cuda: this machine shows no CUDA device" in capsys.readouterr().err


def test_without_words_everything_is_listed(capsys):
    assert bench.main([]) == 0
    listed = capsys.readouterr().out
    assert all(
        f"python -m bench {name} " in listed for name in (*bench.OPS, "learning", *bench.COMMANDS)
    )


@pytest.mark.parametrize("words", [[], ["goals", "bench/results"]])
def test_a_reader_that_leaves_early_sees_no_traceback(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*PYTHON, *words], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_flags_of_a_record_leave_out_where_it_went():
    assert options._flags(["--quick", "--out", "/tmp/x", "--m", "1"]) == "--quick --m 1"
    assert (
        options._flags(["--out=here", "--full"]) == "--full"
        and options._flags(["--out", "a"]) == ""
    )
