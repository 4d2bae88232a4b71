"""Tests of the training loop: averages, batches, exact resuming, patience and the guard."""

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
    """A model that takes tokens as transformers' models do."""

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
    """Return a dataset of texts of different lengths; the class tells whether a text has a 7."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator)
    tokens = [torch.randint(1, 12, (n,), generator=generator).tolist() for n in lengths]
    return Dataset(
        tokens, [int(7 in text) for text in tokens] if task == "classify" else None, pad=0
    )


SHORT = Settings(steps=6, batch=4, lr=1e-2, warmup=2, guard=False)


def train(settings=SHORT, task="classify", model=None, **options):
    model = net(task) if model is None else model
    trainer, log = Trainer(model, texts(task=task), settings, **options), []
    trainer.run(log.append, lambda: None)
    return trainer, log


def losses(log):
    return [record["loss"] for record in log]


def copy_weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.trained.items()}


# --- data ---


def test_every_row_comes_once_an_epoch_in_a_new_order():
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
def test_steps_are_the_same_as_in_plain_torch(task):
    trainer, log = train(task=task)
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
def test_forward_passes_of_a_step_add_up_to_one_batch(task):
    """The last step of an epoch is included; its passes differ in size."""
    single, log = train(replace(SHORT, batch=8), task)
    for batch, passes in ((4, 2), (2, 4), (1, 8)):
        parts, other = train(replace(SHORT, batch=batch, accumulation=passes), task)
        assert losses(other) == pytest.approx(losses(log), rel=1e-5)
        for name, p in single.trained.items():
            torch.testing.assert_close(parts.trained[name], p)


def test_only_parameters_that_require_gradients_train():
    model = pyfast.add_lora(net(), pyfast.LoRAConfig(r=2, targets=["hidden"]))
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model=model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_bf16_is_autocast():
    trainer, log = train(replace(SHORT, precision="bf16"))
    exact = losses(train()[1])
    assert all(p.dtype == torch.float32 for p in trainer.trained.values())
    assert losses(log) != exact and losses(log) == pytest.approx(exact, rel=0.02)


def test_dropout_follows_from_the_seed():
    first, again = (losses(train(model=net(dropout=0.5))[1]) for _ in range(2))
    assert first == again != losses(train(replace(SHORT, seed=1), model=net(dropout=0.5))[1])


def test_evaluation_is_the_mean_over_all_rows():
    data = texts(11, seed=5)
    trainer, log = train(evaluation=data)
    inputs, targets = data.batch(range(11), torch.device("cpu"))
    logits = trainer.model.eval()(**inputs).logits
    assert log[-1]["eval_loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert log[-1]["eval_accuracy"] == pytest.approx(
        (logits.argmax(-1) == targets).float().mean().item()
    )


# --- stopping and going on ---


@pytest.mark.parametrize("guard", [True, False])
def test_a_stopped_training_continues_exactly(guard):
    settings = replace(SHORT, steps=14, accumulation=2, guard=guard, patience=9, eval_every=3)
    options = {"evaluation": texts(9, seed=5)}
    uninterrupted, log = train(settings, model=net(dropout=0.3), **options)
    for stop in (1, 6, 13, 14):
        tensors, fields = state_at(
            stop, Trainer(net(dropout=0.3), texts(), replace(settings, save_every=1), **options)
        )
        rest, other = Trainer(net(dropout=0.3), texts(), settings, **options), []
        rest.load_state(tensors, json.loads(json.dumps(fields)))
        rest.run(other.append, lambda: None)
        assert losses(other) == losses(log)[stop:]
        assert all(torch.equal(p, uninterrupted.trained[name]) for name, p in rest.trained.items())
        assert rest.state()[1] == uninterrupted.state()[1]


def state_at(step, trainer):
    """Train, and return the state that is saved at the step."""
    state = []
    trainer.run(
        lambda record: None,
        lambda: state.extend(copy.deepcopy(trainer.state()) if trainer.done == step else ()),
    )
    return state


def test_a_state_of_another_model_is_refused():
    trainer = train()[0]
    tensors, fields = trainer.state()
    with pytest.raises(ValueError, match="model.embed.weight is missing"):
        trainer.load_state({}, fields)
    with pytest.raises(ValueError, match=r"model.out.bias is \[3\]; it must have shape \[2\]"):
        trainer.load_state(tensors | {"model.out.bias": torch.zeros(3)}, fields)


def test_patience_ends_and_takes_the_best_weights():
    """Labels are random, so that what is learned from them does not hold for other texts."""
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
def test_a_wrong_setting_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}; it must be"):
        Settings(**{field: value})


# --- the rate ---


LONG = replace(SHORT, steps=200, guard=True, warmup=0, schedule="constant")


def test_the_guard_stops_a_rate_that_is_too_high_and_passes_a_good_one():
    good, log = train(LONG)
    assert good.done == 200 and log[-1]["loss"] < 0.1
    with pytest.raises(
        RateTooHigh, match="the learning rate 3 is too high: at step .* try 0.3"
    ) as caught:
        train(replace(LONG, lr=3.0))
    assert 0 < caught.value.step < 100 and caught.value.proposal == 0.3
    assert train(replace(LONG, lr=3.0, guard=False))[0].done == 200


def test_a_gradient_that_is_not_finite_changes_no_weight():
    model = net()
    trainer = Trainer(model, texts(), LONG)
    before = copy_weights(trainer)
    model.hidden.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(RateTooHigh, match="the gradient is no longer finite"):
        trainer.run(lambda record: None, lambda: None)
    assert (
        all(torch.equal(p, before[name]) for name, p in trainer.trained.items())
        and trainer.done == 0
    )


def test_the_saved_state_of_a_diverging_run_is_good():
    """The rate rises slowly past the good rates."""
    rising = replace(LONG, steps=400, lr=5.0, warmup=400, save_every=1)
    trainer, states = Trainer(net("lm"), texts(task="lm"), rising), []
    with pytest.raises(RateTooHigh) as caught:
        trainer.run(lambda record: None, lambda: states.append(copy.deepcopy(trainer.state())))
    tensors, fields = states[-1]
    assert 40 < fields["step"] < caught.value.step - 10
    good = replace(LONG, steps=fields["step"] + 60, lr=1e-2)
    again, log = Trainer(net("lm"), texts(task="lm"), good, evaluation=texts(task="lm")), []
    again.load_state(tensors, fields, new_rate=True)
    assert again.evaluate()["eval_loss"] < trainer.guard.level
    again.run(log.append, lambda: None)
    assert again.evaluate()["eval_loss"] < trainer.guard.level - 0.6


def test_the_range_test_changes_nothing():
    trainer = Trainer(net(), texts(), SHORT)
    before = copy_weights(trainer)
    test = trainer.find_rate(steps=60)
    assert all(torch.equal(p, before[name]) for name, p in trainer.trained.items())
    assert all(p.grad is None for p in trainer.trained.values()) and not trainer.optimizer.state
    log = []
    trainer.run(log.append, lambda: None)
    assert losses(log) == losses(train()[1])
    assert min(test.smoothed) < test.losses[0] and test.proposal > 1e-4
    assert train(replace(LONG, lr=test.proposal))[1][-1]["loss"] < 0.2
