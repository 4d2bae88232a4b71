"""The training loop: averages, batches over passes and processes, exact resuming, patience, the guard."""

import copy
import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyfast
from pyfast.finetune.data import IGNORED, Dataset, RowOrder
from pyfast.finetune.learning_rate import RateTooHigh, schedule_factor
from pyfast.finetune.settings import Settings
from pyfast.finetune.trainer import Trainer

WIDTH = 8


class Net(nn.Module):
    """Takes tokens as transformers' models do."""

    def __init__(self, outputs: int, pooled: bool, dropout: float = 0.0):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout, self.out, self.pooled = nn.Dropout(dropout), nn.Linear(WIDTH, outputs), pooled

    def forward(self, input_ids, attention_mask):
        x = self.dropout(self.hidden(self.embed(input_ids)).tanh()) * attention_mask[..., None]
        return SimpleNamespace(logits=self.out(x.sum(1) if self.pooled else x))


def net(task="classify", dropout=0.0):
    torch.manual_seed(3)
    return Net(2, True, dropout) if task == "classify" else Net(20, False, dropout)


def texts(count=22, task="classify", seed=0):
    """Of different lengths; the class tells whether a 7 is in it."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator)
    tokens = [torch.randint(1, 12, (n,), generator=generator).tolist() for n in lengths]
    return Dataset(
        tokens, [int(7 in text) for text in tokens] if task == "classify" else None, pad=0
    )


SHORT = Settings(steps=6, batch=4, lr=1e-2, warmup=2, guard=False)


def trained(settings=SHORT, task="classify", model=None, **options):
    model = net(task) if model is None else model
    trainer, log = Trainer(model, texts(task=task), settings, **options), []
    trainer.run(log.append, lambda: None)
    return trainer, log


def losses(log):
    return [record["loss"] for record in log]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.trained.items()}


# --- data ---


def test_every_row_comes_once_an_epoch_in_another_order():
    order = RowOrder(22, 5, seed=1)
    epochs = [
        list(itertools.chain(*(order.rows_of_step(5 * e + i) for i in range(5)))) for e in range(3)
    ]
    assert (
        all(sorted(epoch) == list(range(22)) for epoch in epochs)
        and len({tuple(e) for e in epochs}) == 3
    )
    assert [len(order.rows_of_step(i)) for i in range(5)] == [5, 5, 5, 5, 2]
    assert (
        RowOrder(22, 5, seed=1).rows_of_step(7)
        == order.rows_of_step(7)
        != RowOrder(22, 5, seed=2).rows_of_step(7)
    )


def test_batches_are_padded_and_targets_are_the_next_tokens():
    data = Dataset([[5, 6, 7], [8, 9]], None, pad=1)
    inputs, targets = data.batch([1, 0], torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[8, 9, 1], [5, 6, 7]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert (
        targets.tolist() == [[9, IGNORED, IGNORED], [6, 7, IGNORED]]
        and data.count_targets([0, 1]) == 3
    )
    assert data.batch([], torch.device("cpu"))[1].unique().tolist() == [IGNORED]


# --- a step ---


@pytest.mark.parametrize("task", ["classify", "lm"])
def test_steps_are_those_of_plain_torch(task):
    trainer, log = trained(task=task)
    model, data = net(task), texts(task=task)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": matrices, "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.dim() == 1]},
    ]
    adam, order = torch.optim.AdamW(groups, weight_decay=0), RowOrder(22, 4, 0)
    for step, record in enumerate(log):
        inputs, targets = data.batch(order.rows_of_step(step), torch.device("cpu"))
        loss = F.cross_entropy(model(**inputs).logits.flatten(0, -2), targets.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = 1e-2 * schedule_factor("linear", step, 6, 2)
        adam.step()
        adam.zero_grad()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert record["lr"] == adam.param_groups[0]["lr"] and record["step"] == step + 1
    for name, p in model.named_parameters():
        torch.testing.assert_close(trainer.trained[name], p)


@pytest.mark.parametrize("task", ["classify", "lm"])
def test_passes_of_a_step_are_one_batch(task):
    """Also the last step of an epoch, whose passes differ in size."""
    whole, log = trained(replace(SHORT, batch=8), task)
    for batch, passes in ((4, 2), (2, 4), (1, 8)):
        parts, other = trained(replace(SHORT, batch=batch, accumulation=passes), task)
        assert losses(other) == pytest.approx(losses(log), rel=1e-5)
        for name, p in whole.trained.items():
            torch.testing.assert_close(parts.trained[name], p)


def test_only_what_requires_gradients_trains():
    model = pyfast.add_lora(net(), pyfast.LoRAConfig(r=2, targets=["hidden"]))
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained(model=model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_bf16_is_autocast():
    found, log = trained(replace(SHORT, precision="bf16"))
    exact = losses(trained()[1])
    assert all(p.dtype == torch.float32 for p in found.trained.values())
    assert losses(log) != exact and losses(log) == pytest.approx(exact, rel=0.02)


def test_dropout_follows_from_the_seed():
    first, again = (losses(trained(model=net(dropout=0.5))[1]) for _ in range(2))
    assert first == again != losses(trained(replace(SHORT, seed=1), model=net(dropout=0.5))[1])


def test_evaluation_is_the_mean_over_all_rows():
    data = texts(11, seed=5)
    trainer, log = trained(evaluation=data)
    inputs, targets = data.batch(range(11), torch.device("cpu"))
    logits = trainer.model.eval()(**inputs).logits
    assert log[-1]["eval_loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert log[-1]["eval_accuracy"] == pytest.approx(
        (logits.argmax(-1) == targets).float().mean().item()
    )


# --- stopping and going on ---


@pytest.mark.parametrize("guard", [True, False])
def test_a_training_goes_on_exactly(guard):
    settings = replace(SHORT, steps=14, accumulation=2, guard=guard, patience=9, eval_every=3)
    options = {"evaluation": texts(9, seed=5)}
    whole, log = trained(settings, model=net(dropout=0.3), **options)
    for stop in (1, 6, 13, 14):
        tensors, fields = state_at(
            stop, Trainer(net(dropout=0.3), texts(), replace(settings, save_every=1), **options)
        )
        rest, other = Trainer(net(dropout=0.3), texts(), settings, **options), []
        rest.load_state(tensors, json.loads(json.dumps(fields)))
        rest.run(other.append, lambda: None)
        assert losses(other) == losses(log)[stop:]
        assert all(torch.equal(p, whole.trained[name]) for name, p in rest.trained.items())
        assert rest.state()[1] == whole.state()[1]


def state_at(step, trainer):
    """The state that is saved then."""
    found = []
    trainer.run(
        lambda record: None,
        lambda: found.extend(copy.deepcopy(trainer.state()) if trainer.done == step else ()),
    )
    return found


def test_a_state_of_another_model_is_refused():
    trainer = trained()[0]
    tensors, fields = trainer.state()
    with pytest.raises(ValueError, match="model.embed.weight is missing"):
        trainer.load_state({}, fields)
    with pytest.raises(ValueError, match=r"model.out.bias is \[3\]; it must have shape \[2\]"):
        trainer.load_state(tensors | {"model.out.bias": torch.zeros(3)}, fields)


def test_patience_ends_and_takes_the_best_weights():
    """Labels by chance: what is learned of them does not hold elsewhere."""
    torch.manual_seed(0)
    data, other = texts(), texts(16, seed=9)
    data.classes, other.classes = (torch.randint(2, (n,)).tolist() for n in (22, 16))
    settings = replace(SHORT, steps=400, lr=3e-2, eval_every=5, patience=3)
    trainer, log = Trainer(net(), data, settings, evaluation=other), []
    trainer.run(log.append, lambda: None)
    judged = {r["step"]: r["eval_loss"] for r in log[:-1] if "eval_loss" in r}
    best = min(judged, key=judged.get)
    assert trainer.done == best + 15 < 400 and log[-1]["restored"] == best
    assert trainer.evaluate()["eval_loss"] == log[-1]["eval_loss"] == judged[best]


def test_patience_without_evaluation_is_refused():
    with pytest.raises(ValueError, match="patience is 2, and there is nothing to evaluate"):
        Trainer(net(), texts(), replace(SHORT, patience=2))


def test_a_model_that_trains_nothing_is_refused():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Trainer(net().requires_grad_(False), texts(), SHORT)


@pytest.mark.parametrize(
    "field, value",
    [("batch", 0), ("steps", 0), ("patience", 1.5), ("lr", 0), ("lr", math.nan), ("epochs", -1), ("schedule", "up"),
     ("precision", "fp16"), ("clip", 0), ("warmup", -1)],
)  # fmt: skip
def test_wrong_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}; it must be"):
        Settings(**{field: value})


# --- the rate ---


LONG = replace(SHORT, steps=200, guard=True, warmup=0, schedule="constant")


def test_the_guard_stops_a_rate_that_is_too_high_and_passes_a_good_one():
    good, log = trained(LONG)
    assert good.done == 200 and log[-1]["loss"] < 0.1
    with pytest.raises(
        RateTooHigh, match="the learning rate 3 is too high: at step .* try 0.3"
    ) as caught:
        trained(replace(LONG, lr=3.0))
    assert 0 < caught.value.step < 100 and caught.value.proposal == 0.3
    assert trained(replace(LONG, lr=3.0, guard=False))[0].done == 200


def test_a_gradient_that_is_not_finite_changes_no_weight():
    model = net()
    trainer = Trainer(model, texts(), LONG)
    before = weights(trainer)
    model.hidden.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(RateTooHigh, match="the gradient is no longer finite"):
        trainer.run(lambda record: None, lambda: None)
    assert (
        all(torch.equal(p, before[name]) for name, p in trainer.trained.items())
        and trainer.done == 0
    )


def test_what_is_saved_of_a_run_that_diverges_is_good():
    """The rate rises slowly past the good ones."""
    rising = replace(LONG, steps=400, lr=5.0, warmup=400, save_every=1)
    trainer, found = Trainer(net("lm"), texts(task="lm"), rising), []
    with pytest.raises(RateTooHigh) as caught:
        trainer.run(lambda record: None, lambda: found.append(copy.deepcopy(trainer.state())))
    tensors, fields = found[-1]
    assert 40 < fields["step"] < caught.value.step - 10
    good = replace(LONG, steps=fields["step"] + 60, lr=1e-2)
    again, log = Trainer(net("lm"), texts(task="lm"), good, evaluation=texts(task="lm")), []
    again.load_state(tensors, fields, new_rate=True)
    assert again.evaluate()["eval_loss"] < trainer.guard.level
    again.run(log.append, lambda: None)
    assert again.evaluate()["eval_loss"] < trainer.guard.level - 0.6


def test_the_range_test_leaves_everything_as_it_was():
    trainer = Trainer(net(), texts(), SHORT)
    before = weights(trainer)
    test = trainer.find_rate(steps=60)
    assert all(torch.equal(p, before[name]) for name, p in trainer.trained.items())
    assert all(p.grad is None for p in trainer.trained.values()) and not trainer.optimizer.state
    log = []
    trainer.run(log.append, lambda: None)
    assert losses(log) == losses(trained()[1])
    assert min(test.smoothed) < test.losses[0] and test.proposal > 1e-4
    assert trained(replace(LONG, lr=test.proposal))[1][-1]["loss"] < 0.2
