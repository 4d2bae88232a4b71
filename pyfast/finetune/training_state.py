"""The optimizer, and the tensors from which a training continues.

Names of tensors are "model.<parameter>", "best.<parameter>" and "optimizer.<key>.<parameter>".
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyfast.finetune.distributed import full_tensor, write_sharded
from pyfast.finetune.settings import Settings

_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of the parameter's shape
_STEP = "step"  # AdamW's count of steps, a number


def make_optimizer(trained: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """Return a new AdamW; only matrices have weight decay."""
    matrices = [parameter for parameter in trained.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in trained.values() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.0)


def collect_tensors(
    trained: Mapping[str, nn.Parameter],
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    """Return all tensors by name, each in full; every process has to call it."""
    tensors = {f"model.{name}": full_tensor(parameter) for name, parameter in trained.items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = full_tensor(value)
    return tensors


def restore_tensors(
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Write the tensors to the parameters and the optimizer; return the best weights.

    Raises:
        ValueError: a tensor is missing or has another shape than its parameter.
    """
    _check_tensors(trained, tensors)
    write_weights(trained, {name: tensors[f"model.{name}"] for name in trained})
    for name, parameter in trained.items():
        state = {_STEP: tensors[f"optimizer.{_STEP}.{name}"].clone()}
        for key in _MOMENTS:
            state[key] = torch.zeros_like(parameter)
            write_sharded(state[key], tensors[f"optimizer.{key}.{name}"])
        optimizer.state[parameter] = state
    return {name: tensors[f"best.{name}"] for name in trained if f"best.{name}" in tensors}


def write_weights(trained: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    """Overwrite the trained parameters."""
    for name, value in weights.items():
        write_sharded(trained[name], value)


def _check_tensors(trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in trained.items():
        shape = tuple(parameter.shape)
        shapes = {f"model.{name}": shape, f"optimizer.{_STEP}.{name}": ()}
        shapes |= {f"optimizer.{key}.{name}": shape for key in _MOMENTS}
        for key, expected in shapes.items():
            if key not in tensors or tuple(tensors[key].shape) != expected:
                actual = list(tensors[key].shape) if key in tensors else "missing"
                raise ValueError(
                    f"checkpoint: {key} is {actual}; it must have shape {list(expected)}"
                )
