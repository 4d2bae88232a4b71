"""Tests that two processes, under DDP and FSDP2, get the losses and results of one."""

import contextlib
import json
import os
import shutil
import socket

import pytest
import torch
from helpers.finetune_runs import arguments, assert_same_weights, losses, metrics, run, write_files
from helpers.tiny_checkpoints import records, write_jsonl

from pyfast.cli.main import main

CASES = {
    "ddp-lora": {"method": "lora"},
    "ddp-adapter": {"method": "adapter", "task": "lm", "save_every": 2},
    "shard-full": {"method": "full"},
    "shard-qlora": {"method": "qlora", "task": "lm", "save_every": 2},
    "shard-dora": {"method": "dora", "patience": 1, "eval_every": 2},
}


def case_arguments(files, out, case):
    """Return a command with batches of 7, and of 5 and 1 at the end of an epoch.

    In the batch of 1, one of two processes has nothing to do.
    """
    data = {
        "data": files / "36.jsonl",
        "architecture": "llama",
        "batch": 7,
        "accumulation": 2,
        "steps": 7,
    }
    return arguments(files, out / case, **data | CASES[case])


def run_rank(rank, commands, ports, codes):
    """Run the commands in a process with the variables that torchrun sets."""
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
    """Run every case in two processes, and return the folder of their outputs."""
    out = tmp_path_factory.mktemp("two")
    write_jsonl(files / "36.jsonl", records(36))
    commands = [[*case_arguments(files, out, case), "--device", "cpu"] for case in CASES]
    commands = [
        [*words, "--shard"] if "shard" in case else words for case, words in zip(CASES, commands)
    ]
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        codes = manager.list()
        torch.multiprocessing.spawn(run_rank, (commands, free_ports(len(CASES)), codes), nprocs=2)
        assert [*codes] == [0] * 2 * len(CASES)
    return out


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(files, tmp_path, two_processes, case):
    assert main(case_arguments(files, tmp_path, case)) == 0
    one, two = losses(tmp_path / case), losses(two_processes / case)
    assert two == pytest.approx(one, rel=1e-4) and len(two) >= 4
    assert_same_weights(two_processes / case, tmp_path / case, exact=False)
    for record, expected in zip(metrics(two_processes / case), metrics(tmp_path / case)):
        loss = expected.get("eval_loss", 0)
        assert record.get("eval_loss", 0) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("case", ["ddp-adapter", "shard-qlora"])
def test_one_process_continues_a_training_of_two(files, tmp_path, two_processes, case):
    out = tmp_path / "out"
    shutil.copytree(two_processes / case, out)
    job = json.loads((out / "finetune.json").read_text())
    job["job"]["shard"] = False
    (out / "finetune.json").write_text(json.dumps(job))
    assert run("finetune", "--resume", out) == 0
    assert_same_weights(out, two_processes / case)
