"""The same commands by two processes, under DDP and FSDP2: losses and results are one process's."""

import contextlib
import json
import os
import shutil
import socket

import pytest
import torch
from helpers.finetune_runs import arguments, assert_same, losses, metrics, run, write_files
from helpers.tiny_checkpoints import records, write_jsonl

from pyfast.cli.main import main

CASES = {
    "ddp-lora": {"method": "lora"},
    "ddp-adapter": {"method": "adapter", "task": "lm", "save_every": 2},
    "shard-full": {"method": "full"},
    "shard-qlora": {"method": "qlora", "task": "lm", "save_every": 2},
    "shard-dora": {"method": "dora", "patience": 1, "eval_every": 2},
}


def words_of(files, out, case):
    """Batches of 7, and at an epoch's end of 5 and 1: one process has nothing to do."""
    data = {"data": files / "36.jsonl", "kind": "llama", "batch": 7, "accumulation": 2, "steps": 7}
    return arguments(files, out / case, **data | CASES[case])


def on_a_rank(rank, commands, ports, codes):
    """As torchrun has it."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
    }
    for words, port in zip(commands, ports):
        os.environ["MASTER_PORT"] = str(port)
        codes.append(main(words))


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("localhost", 0))
        return [s.getsockname()[1] for s in sockets]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def two_processes(files, tmp_path_factory):
    """Where two processes wrote what they made of every case."""
    out = tmp_path_factory.mktemp("two")
    write_jsonl(files / "36.jsonl", records(36))
    commands = [[*words_of(files, out, case), "--device", "cpu"] for case in CASES]
    commands = [
        [*words, "--shard"] if "shard" in case else words for case, words in zip(CASES, commands)
    ]
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        codes = manager.list()
        torch.multiprocessing.spawn(on_a_rank, (commands, free_ports(len(CASES)), codes), nprocs=2)
        assert [*codes] == [0] * 2 * len(CASES)
    return out


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(files, tmp_path, two_processes, case):
    assert main(words_of(files, tmp_path, case)) == 0
    one, two = losses(tmp_path / case), losses(two_processes / case)
    assert two == pytest.approx(one, rel=1e-4) and len(two) >= 4
    assert_same(two_processes / case, tmp_path / case, exact=False)
    for ours, theirs in zip(metrics(two_processes / case), metrics(tmp_path / case)):
        assert ours.get("eval_loss", 0) == pytest.approx(theirs.get("eval_loss", 0), rel=1e-4)


@pytest.mark.parametrize("case", ["ddp-adapter", "shard-qlora"])
def test_one_process_goes_on_with_what_two_began(files, tmp_path, two_processes, case):
    out = tmp_path / "out"
    shutil.copytree(two_processes / case, out)
    job = json.loads((out / "finetune.json").read_text())
    job["job"]["shard"] = False
    (out / "finetune.json").write_text(json.dumps(job))
    assert run("finetune", "--resume", out) == 0
    assert_same(out, two_processes / case)
