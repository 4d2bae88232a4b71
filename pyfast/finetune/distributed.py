"""The processes of a training, started by torchrun; each takes its part of every batch."""

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
    """The processes that train together, seen from one of them; rank 0 writes the files.

    Args:
        rank: number of this process.
        size: number of processes.
        device: device of this process.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)

    @classmethod
    def join(cls, device: str | None = None) -> "World":
        """Join the processes that torchrun's variables describe; without them, be the only one.

        Args:
            device: "cpu" or "cuda"; None for CUDA if there is a device, else the CPU.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if "WORLD_SIZE" not in os.environ:
            return cls(device=device)
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def leave(self) -> None:
        """Leave the process group, if this process joined one."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def local_rows(self, rows: Sequence[int]) -> Sequence[int]:
        """Return the rows that this process takes."""
        return rows[self.rank :: self.size]

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wrap(self, model: nn.Module, shard: bool) -> nn.Module:
        """Return the module to call instead of the model; it averages gradients over processes."""
        if shard:
            return self._shard(model)
        if self.size == 1:
            return model
        # Some models have parameters that their loss does not need, for example a pooler.
        return DistributedDataParallel(model, find_unused_parameters=True)

    def _shard(self, model: nn.Module) -> nn.Module:
        """Shard the model's parameters with FSDP2, one layer at a time.

        Every process keeps parameters that are single numbers, such as the offset of 4-bit scales.
        """
        if not dist.is_initialized():
            raise ValueError("shard is set, and there is one process; start several with torchrun")
        mesh = init_device_mesh(self.device.type, (self.size,))
        single = {parameter for parameter in model.parameters() if parameter.dim() == 0}
        for layer in _find_layers(model):
            fully_shard(layer, mesh=mesh, ignored_params=single)
        return fully_shard(model, mesh=mesh, ignored_params=single)


def _find_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost module lists."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else _find_layers(child)


def unsynchronized(model: nn.Module) -> AbstractContextManager:
    """Return a context in which DDP does not exchange gradients yet; for other models, none."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a detached tensor that has all parts of a sharded one, in every process."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def write_sharded(tensor: Tensor, value: Tensor) -> None:
    """Overwrite a tensor with a full value; each process writes its part if it is sharded."""
    value = value.to(tensor.device)
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


@contextmanager
def full_parameters(model: nn.Module, keep: bool) -> Iterator[None]:
    """Replace the model's sharded trained parameters by full ones within the context.

    Args:
        model: the model; every process has to enter the context.
        keep: whether this process gets the full parameters, on the CPU.
    """
    replaced = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a forward pass, the outermost module's parameters stay full until state_dict.
            module.reshard()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor) and parameter.requires_grad:
                full = full_tensor(parameter)
                replaced.append((module, name, parameter, full.cpu() if keep else None))
    for module, name, _, full in replaced:
        if keep:
            module._parameters[name] = nn.Parameter(full)
    try:
        yield
    finally:
        for module, name, parameter, _ in replaced:
            module._parameters[name] = parameter
