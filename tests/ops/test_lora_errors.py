"""LoRA called wrongly: an error that names the argument, what it was and what it must be, and nothing changed."""

import copy

import bitsandbytes
import pytest
import torch
from torch import nn

import pyfast
from pyfast.adapters.model_state import lora_layers

X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


def dense():
    return nn.Linear(70, 24)


def nf4():
    return pyfast.NF4Linear.from_linear(dense())


def layer_of(base, *, r=4, alpha=8, **options):
    layer = pyfast.LoRALinear(base)
    layer.add("a", r, alpha, **options)
    return layer


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.norm, self.out = (
            nn.Linear(12, 12),
            nn.LayerNorm(12),
            nn.Linear(12, 12, bias=False),
        )

    def forward(self, x):
        return x + self.out(self.norm(self.q(x)).tanh())


def net():
    return nn.Sequential(Block(), Block(), nn.Linear(12, 3))


def with_lora(**options):
    return pyfast.add_lora(net(), pyfast.LoRAConfig(r=2, **options))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# --- the module ---


def wrapped():
    return layer_of(dense())


MODULE = {
    "no layer": (
        lambda: pyfast.LoRALinear("x"),
        TypeError,
        "base is a str; it must be a plain nn.Linear",
    ),
    "a Conv1d": (lambda: pyfast.LoRALinear(nn.Conv1d(3, 3, 1)), TypeError, "base is a Conv1d"),
    "of attention": (
        lambda: pyfast.LoRALinear(nn.MultiheadAttention(8, 2).out_proj),
        TypeError,
        "base is a NonDyn",
    ),
    "twice": (
        lambda: wrapped().add("a", 1, 1),
        ValueError,
        "name is 'a', which this layer has already",
    ),
    "dots": (lambda: wrapped().add("a.b", 1, 1), ValueError, "name is 'a.b'; it must not"),
    "reserved": (lambda: wrapped().add("keys", 1, 1), ValueError, "name is 'keys'; it must not"),
    "no name": (lambda: wrapped().add(3, 1, 1), TypeError, "name must be a str, not int"),
    "rank 0": (
        lambda: wrapped().add("b", 0, 1),
        ValueError,
        "r is 0; it must be an integer, 1 or more",
    ),
    "rank a float": (
        lambda: wrapped().add("b", 4.0, 1),
        ValueError,
        "r is 4.0; it must be an integer",
    ),
    "alpha NaN": (
        lambda: wrapped().add("b", 4, float("nan")),
        ValueError,
        "alpha is nan; it must be a finite number",
    ),
    "dropout 1": (
        lambda: wrapped().add("b", 4, 1, dropout=1),
        ValueError,
        "dropout is 1; it must be a number from 0",
    ),
    "init": (
        lambda: wrapped().add("b", 4, 1, init="zeros"),
        ValueError,
        "init is 'zeros'; it must be 'kaiming'",
    ),
    "dtype": (
        lambda: wrapped().add("b", 4, 1, dtype=torch.int8),
        ValueError,
        "dtype is torch.int8; it must be torch.f",
    ),
    "orthogonal, odd": (
        lambda: wrapped().add("b", 3, 1, init="orthogonal"),
        ValueError,
        "r is 3; orthogonal",
    ),
    "pissa beside": (
        lambda: wrapped().add("b", 3, 1, init="pissa"),
        ValueError,
        r"\['a'\] were made for this one",
    ),
    "beside pissa": (
        lambda: layer_of(dense(), init="pissa").add("b", 3, 1),
        ValueError,
        "'a' has changed the base",
    ),
    "pissa, NF4": (lambda: layer_of(nf4(), init="pissa"), ValueError, "this one is NF4"),
    "pissa, rank": (
        lambda: layer_of(dense(), r=25, init="pissa"),
        ValueError,
        "r is 25; PiSSA takes at most 24",
    ),
    "pissa, alpha": (
        lambda: layer_of(dense(), alpha=-1, init="pissa"),
        ValueError,
        "alpha is -1; PiSSA's must be",
    ),
    "unknown": (
        lambda: wrapped().set_adapter("b"),
        ValueError,
        r"name is 'b'; this layer has \['a'\]",
    ),
    "remove unknown": (lambda: wrapped().remove("b"), ValueError, "name is 'b'; this layer has"),
    "no unmerge": (lambda: wrapped().unmerge(), RuntimeError, "nothing is merged"),
    "merge what": (
        lambda: wrapped().merge(into="8bit"),
        ValueError,
        "into is '8bit'; it must be '16bit' or 'nf4'",
    ),
    "merge into": (
        lambda: wrapped().merge(into="nf4"),
        ValueError,
        "the base is a Linear; it must be an NF4Linear",
    ),
    "merge none": (lambda: pyfast.LoRALinear(dense()).merge(), ValueError, "no adapter is active"),
    "too few ids": (
        lambda: wrapped()(torch.randn(3, 70), ["a"]),
        ValueError,
        "adapter_ids has 1 names; x, of shape",
    ),
    "unknown id": (
        lambda: wrapped()(torch.randn(1, 70), ["b"]),
        ValueError,
        "name is 'b'; this layer has",
    ),
    "mixed dropout": (
        lambda: layer_of(dense(), dropout=0.5)(torch.randn(1, 70), ["a"]),
        ValueError,
        "adapter 'a' has dropout",
    ),
}


@pytest.mark.parametrize("call, kind, message", MODULE.values(), ids=MODULE)
def test_wrong_calls_of_the_module(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_refused_adapter_leaves_the_layer_alone():
    layer = pyfast.LoRALinear(dense())
    with pytest.raises(ValueError):
        layer.add("a", 3, 1, init="orthogonal")
    assert layer.base.weight.requires_grad and not layer.adapters and layer.active is None


# --- a model ---


def config(**options):
    return lambda: pyfast.LoRAConfig(**options)


def add(*, to=net, name="default", **options):
    return lambda: pyfast.add_lora(to(), pyfast.LoRAConfig(**options), name)


def merged():
    model = with_lora()
    pyfast.merge(model)
    return model


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_bitsandbytes():
    return nn.Sequential(nn.Linear(64, 64), *[bitsandbytes.nn.Linear4bit(64, 64) for _ in range(6)])


def emptied():
    model = with_lora()
    for layer in lora_layers(model).values():
        layer.remove("default")
    return model


MODEL = {
    "a subclass": (
        add(to=lambda: nn.Sequential(nn.Linear(12, 12), Doubling(12, 12))),
        TypeError,
        r"targets is 'all-linear', but 1 \(Doubling\) cannot be adapted; each must be .* or in exclude$",
    ),
    "bitsandbytes": (
        add(to=with_bitsandbytes),
        TypeError,
        r"but 1, 2, 3, 4, ... \(Linear4bit\) cannot be adapted; .* read by NF4Linear, so convert them first",
    ),
    "r": (config(r=0), ValueError, "r is 0; it must be an integer, 1 or more"),
    "alpha": (config(alpha="1"), ValueError, "alpha is '1'; it must be a finite number"),
    "targets": (
        config(targets=[]),
        ValueError,
        r"targets is \[\]; it must be .all-linear., a regex or a list",
    ),
    "regex": (
        config(targets="("),
        ValueError,
        "targets holds '.'; it must be a regular expression",
    ),
    "dropout": (config(dropout=1.0), ValueError, "dropout is 1.0; it must be a number from 0"),
    "dora": (config(dora=1), ValueError, "dora is 1; it must be True or False"),
    "bias": (
        config(bias="some"),
        ValueError,
        "bias is 'some'; it must be 'none', 'all' or 'lora_only'",
    ),
    "init": (config(init="eva"), ValueError, "init is 'eva'; it must be 'kaiming'"),
    "rank pattern": (
        config(rank_pattern={"q": 0}),
        ValueError,
        "rank_pattern is {'q': 0}; it must be a dict",
    ),
    "pattern": (
        config(alpha_pattern={"(": 1}),
        ValueError,
        "alpha_pattern holds '.'; it must be a regular",
    ),
    "layers of a regex": (
        config(layers_to_transform=1),
        ValueError,
        "layers_to_transform is set, and targets is a st",
    ),
    "layers": (
        config(targets=["q"], layers_to_transform=-1),
        ValueError,
        "layers_to_transform is -1; it must be",
    ),
    "pattern alone": (
        config(targets=["q"], layers_pattern="h"),
        ValueError,
        "layers_to_transform is not",
    ),
    "dora and lora_bias": (
        config(dora=True, lora_bias=True),
        ValueError,
        "lora_bias is True, and so is dora",
    ),
    "dtype": (
        config(dtype=torch.int8),
        ValueError,
        "dtype is torch.int8; it must be a floating dtype",
    ),
    "no match": (
        add(targets=["k"]),
        ValueError,
        r"targets \['k'\] match no layer.*called \['2', 'out', 'q'\]",
    ),
    "not linear": (
        add(targets=["norm"]),
        TypeError,
        "target '0.norm' is a LayerNorm; it must be a linear layer",
    ),
    "name": (add(name="a.b"), ValueError, "name is 'a.b'; it must not"),
    "name again": (add(to=with_lora), ValueError, "name is 'default', which the model has already"),
    "one refuses": (add(init="pissa", r=8), ValueError, "2: r is 8; PiSSA takes at most 3"),
    "model": (lambda: pyfast.add_lora("x"), TypeError, "model must be a Module, not str"),
    "a pattern for none": (
        add(rank_pattern={"q": 2, "k": 2}),
        ValueError,
        "rank_pattern holds 'k', which matches no",
    ),
    "an alpha for none": (
        add(alpha_pattern={"k": 2}),
        ValueError,
        "alpha_pattern holds 'k', which matches no target",
    ),
    "nothing to save": (
        add(modules_to_save=["heed"]),
        ValueError,
        "modules_to_save holds 'heed', which matches no",
    ),
    "config": (
        lambda: pyfast.add_lora(net(), {}),
        TypeError,
        "config must be a LoRAConfig, not dict",
    ),
    "merged": (
        add(to=merged, name="b"),
        RuntimeError,
        "a new adapter: adapter 'default' is merged",
    ),
    "saved and adapted": (
        add(to=with_lora, name="b", targets=["q"], modules_to_save=["2"]),
        ValueError,
        "modules_to_save takes in 2, which has adapters",
    ),
    "adapted and saved": (
        add(to=lambda: with_lora(modules_to_save=["2"]), name="b"),
        TypeError,
        "target '2' is a TrainedCopies; it must be a linear layer",
    ),
    "a pattern of saved ones": (
        add(targets=["out"], modules_to_save=["ut"]),
        ValueError,
        "modules_to_save takes in 0.out, which is a target, too",
    ),
    "bias of another's": (
        add(to=lambda: with_lora(targets=["q"]), name="b", targets=["out"], bias="all"),
        ValueError,
        "bias is 'all', but 0.q is another adapter's",
    ),
    "unknown": (
        lambda: pyfast.set_adapter(with_lora(), "b"),
        ValueError,
        r"adapter 'b' is unknown; .* \['default'\]",
    ),
    "switch, merged": (
        lambda: pyfast.set_adapter(merged(), None),
        RuntimeError,
        "set_adapter: adapter 'default' is m",
    ),
    "merge none": (lambda: pyfast.merge(net()), ValueError, "model has no active adapter"),
    "merge twice": (
        lambda: pyfast.merge(merged()),
        RuntimeError,
        "merge: adapter 'default' is merged",
    ),
    "merge what": (
        lambda: pyfast.merge(with_lora(), into="8bit"),
        ValueError,
        "into is '8bit'; it must be '16bit'",
    ),
    "merge into": (
        lambda: pyfast.merge(with_lora(), into="nf4"),
        ValueError,
        "no adapted layer is an NF4Linear",
    ),
    "unmerge": (lambda: pyfast.unmerge(with_lora()), ValueError, "nothing is merged into model"),
    "save none": (
        lambda: pyfast.save_adapter(net(), "/nowhere"),
        ValueError,
        "model has no active adapter",
    ),
    "save emptied": (
        lambda: pyfast.save_adapter(emptied(), "/nowhere"),
        ValueError,
        "'default' has no tensors",
    ),
    "remove unknown": (
        lambda: pyfast.remove_adapter(net(), "b"),
        ValueError,
        "adapter 'b' is unknown",
    ),
    "remove, merged": (
        lambda: pyfast.remove_adapter(merged(), "default"),
        RuntimeError,
        "remove_adapter: adapter 'de",
    ),
    "save unknown": (
        lambda: pyfast.save_adapter(net(), "/nowhere", "b"),
        ValueError,
        "adapter 'b' is unknown",
    ),
    "mixed, unknown": (
        lambda: enter(pyfast.mixed_batch(net(), ["a"])),
        ValueError,
        "adapter 'a' is unknown",
    ),
    "mixed, biases": (
        lambda: enter(pyfast.mixed_batch(with_lora(bias="all"), ["default"])),
        ValueError,
        "adapter 'default' has its own biases all over the model",
    ),
}


def enter(context):
    with context:
        pass


@pytest.mark.parametrize("call, kind, message", MODEL.values(), ids=MODEL)
def test_wrong_calls_on_a_model(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_data_parallel_model_takes_no_new_parameters(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(with_lora())
        with pytest.raises(
            ValueError, match="model is a DistributedDataParallel, which takes no new parameters"
        ):
            pyfast.add_lora(parallel, name="b")
        pyfast.set_adapter(parallel, "default")  # the others reach the model inside
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("r, value", [(8, 0.0), (2, float("nan"))])
def test_a_refused_adapter_leaves_the_model_alone(r, value):
    model = net()
    with torch.no_grad():
        model[1].out.weight[0, 0] = value
    before = copy.deepcopy(model)
    with pytest.raises(ValueError):
        pyfast.add_lora(model, pyfast.LoRAConfig(init="pissa", r=r))
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert trainable(model) == trainable(before) and torch.allclose(
        model(X), before(X), equal_nan=True
    )
