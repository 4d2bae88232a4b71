"""The processes of a training, as torchrun starts them: each takes its share of every batch."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


class World:
    """One of `size` processes, the first of which has rank 0 and writes the files."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)

    @classmethod
    def join(cls, device: str | None = None) -> "World":
        """That of torchrun's variables; without them a world of one."""
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if "WORLD_SIZE" not in os.environ:
            return cls(device=kind)
        if kind == "cuda":
            kind = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(kind)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), kind)

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def share(self, rows: Sequence[int]) -> Sequence[int]:
        """This process's rows."""
        return rows[self.rank :: self.size]

    def sum(self, numbers: Tensor) -> Tensor:
        """Over all processes."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def wrap(self, model: nn.Module, shard: bool) -> nn.Module:
        """What is called in the model's place, so that gradients are means over the processes."""
        if shard:
            return self._sharded(model)
        if self.size == 1:
            return model
        # Some models have parameters that their loss does not need, a pooler for one.
        return DistributedDataParallel(model, find_unused_parameters=True)

    def _sharded(self, model: nn.Module) -> nn.Module:
        """A layer at a time; numbers that are no tensors (the offset of 4-bit scales) stay in every process."""
        if not dist.is_initialized():
            raise ValueError("shard is set, and there is one process; start several with torchrun")
        mesh = init_device_mesh(self.device.type, (self.size,))
        single = {parameter for parameter in model.parameters() if parameter.dim() == 0}
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh, ignored_params=single)
        return fully_shard(model, mesh=mesh, ignored_params=single)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def unsynchronized(model: nn.Module) -> AbstractContextManager:
    """Within it gradients are not yet exchanged, where that saves anything."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process has a part, on all of them."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> None:
    """Overwrites a tensor, each process its own part."""
    value = value.to(tensor.device)
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


@contextmanager
def whole_parameters(model: nn.Module, keep: bool) -> Iterator[None]:
    """Within it the model's trained parameters are plain tensors, in the processes that keep them."""
    taken = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the outermost one's are left whole after a forward pass, until state_dict comes
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor) and parameter.requires_grad:
                full = whole(parameter)
                taken.append((module, name, parameter, full.cpu() if keep else None))
    for module, name, _, full in taken:
        if keep:
            module._parameters[name] = nn.Parameter(full)
    try:
        yield
    finally:
        for module, name, parameter, _ in taken:
            module._parameters[name] = parameter
