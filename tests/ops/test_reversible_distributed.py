"""Reversible blocks under DDP and FSDP2, on two processes: gradients are one process's."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers.reversible_nets import Attention, Mlp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pyfast

DDP = {
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
}
FSDP = ("root", "halves", "inside")
STEPS = 2  # static_graph differs from the second on


class Model(nn.Module):
    def __init__(
        self, shared: bool = False, embeds: bool = True, chunk: int = 0, unused: bool = False
    ):
        super().__init__()
        torch.manual_seed(0)
        blocks = (
            [(Attention(8), Mlp(8))] * 3 if shared else [(Attention(8), Mlp(8)) for _ in range(3)]
        )
        if chunk:
            blocks = [(f, pyfast.ChunkedFeedForward(g, chunk)) for f, g in blocks]
        self.embed = nn.Linear(8, 8).requires_grad_(embeds)
        self.seq = pyfast.ReversibleSequence(blocks, exact=True)
        self.head = nn.Linear(8, 1)
        self.spare = nn.Linear(8, 8) if unused else None

    def forward(self, x):
        x = self.embed(x)
        return self.head(sum(self.seq(x, x))).square().mean()


class Language(nn.Module):
    """A Reformer that reads the numbers of x as tokens."""

    def __init__(self, unused: bool = False):
        super().__init__()
        torch.manual_seed(0)
        sizes = {
            "width": 8,
            "heads": 2,
            "layers": ("local", "lsh"),
            "lsh_chunk": 16,
            "local_chunk": 16,
        }
        self.model = pyfast.Reformer(
            pyfast.ReformerConfig(50, hash_seed=3, feed_forward_chunk=20, exact=True, **sizes)
        )
        self.seq = self.model.layers
        self.spare = nn.Linear(8, 8) if unused else None

    def forward(self, x):
        ids = x.flatten(1).mul(100).long() % 50
        return self.model(ids, labels=ids)


MODELS = {
    "plain": Model,
    "shared": partial(Model, shared=True),
    "frozen": partial(Model, embeds=False),
    "chunked": partial(Model, chunk=4),
}
CASES = [("ddp", name, how) for name in MODELS for how in DDP]
# Not "shared", which has one module twice.
CASES += [("fsdp", name, how) for name in MODELS for how in FSDP if name != "shared"]
MODELS["reformer"] = Language
CASES += [
    ("ddp", "reformer", "find_unused"),
    ("fsdp", "reformer", "root"),
    ("fsdp", "reformer", "halves"),
]


def batch():
    return torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))


def gradients(model, x):
    for _ in range(STEPS):
        model.zero_grad()
        model(x).backward()
    return {
        name.removeprefix("module."): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def sharded(model, how):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if how == "halves":
        for half in model.seq.children():
            fully_shard(half, mesh=mesh)
    if how == "inside":
        for half in model.seq.children():
            fully_shard(getattr(half, "ff", half).norm, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def on_a_rank(rank: int, init: str, results):
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2)
    x, found = batch()[rank * 2 : rank * 2 + 2], {}
    for kind, name, how in CASES:
        if kind == "ddp":
            model = DistributedDataParallel(MODELS[name](unused=how == "find_unused"), **DDP[how])
            found[kind, name, how] = gradients(model, x)
        else:
            grads = gradients(sharded(MODELS[name](), how), x)
            found[kind, name, how] = {
                parameter: grad.full_tensor() for parameter, grad in grads.items()
            }
    results[rank] = found
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    init = tmp_path_factory.mktemp("gloo") / "init"
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(on_a_rank, (str(init), results), nprocs=2)
        return [results[0], results[1]]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_gradients_are_one_process_s(ranks, case):
    model = MODELS[case[1]]()
    model.seq.store = True
    wanted = gradients(model, batch())
    for found in ranks:
        assert found[case].keys() == wanted.keys()
        for parameter, grad in found[case].items():
            torch.testing.assert_close(grad, wanted[parameter], atol=1e-4, rtol=1e-4)
