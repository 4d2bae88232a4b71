"""Tests of the guard on good and bad curves of losses, of schedules, and of the range test."""

import math
import random
import re

import pytest

from pyfast.finetune.learning_rate import Guard, range_test, schedule_factor


def find_alarm(curve, level, noise, seed=0):
    """Return the step at which the guard stops the curve, and why; None if it does not.

    The untrained model has losses around `level`, with the standard deviation `noise`.
    """
    rng = random.Random(seed)
    guard = Guard([level + rng.gauss(0, noise) for _ in range(8)])
    for step, loss in enumerate(curve):
        if reason := guard.observe(loss, 1.0):
            return step, reason
    return None


def noisy(rng, mean, spread):
    """Return a loss around `mean`, never below 0, with a lognormal spread."""
    return mean * math.exp(rng.gauss(0, spread) - spread**2 / 2)


def falling(rng, level, floor, speed, spread, steps=600):
    return [
        noisy(rng, floor + (level - floor) * math.exp(-speed * i), spread) for i in range(steps)
    ]


def classifier(rng, steps=600):
    """Return losses of two classes in small batches: equal at first, then many small, few large."""
    curve = []
    for i in range(steps):
        skill = 4 * (1 - math.exp(-i / 120))
        margins = [rng.gauss(skill, 1 + skill / 3) * (i > 5) for _ in range(4)]
        curve.append(sum(math.log1p(math.exp(-m)) for m in margins) / 4)
    return curve


def spiky(rng):
    return [
        loss * (15 if rng.random() < 0.05 else 1) for loss in falling(rng, 0.69, 0.1, 0.02, 0.3)
    ]


def plateau(rng):
    """Return losses that stay for long, then fall."""
    return [noisy(rng, 2.3, 0.1) for _ in range(200)] + falling(rng, 2.3, 0.2, 0.03, 0.1)


def overshoot(rng):
    """Return losses of first steps that go too far, then fall."""
    return [noisy(rng, 0.69 + 1.5 * math.exp(-i / 5), 0.1) for i in range(25)] + falling(
        rng, 0.69, 0.2, 0.01, 0.2
    )


def memorized(rng):
    """Return losses of epochs over the same rows: they fall in steps, at last to almost nothing."""
    return [noisy(rng, 0.7 * 0.3 ** (i // 60) + 0.001, 0.4) for i in range(600)]


GOOD = {
    "fast": (lambda rng: falling(rng, 0.69, 0.05, 0.05, 0.2), 0.69, 0.03),
    "slow and noisy": (lambda rng: falling(rng, 0.69, 0.3, 0.002, 0.4), 0.69, 0.15),
    "a language model from nothing": (lambda rng: falling(rng, 10.8, 3.5, 0.01, 0.03), 10.8, 0.05),
    "a trained language model, one row a batch": (
        lambda rng: falling(rng, 3.4, 3.1, 0.01, 0.2),
        3.4,
        0.7,
    ),
    "a classifier": (classifier, 0.69, 0.02),
    "single spikes": (spiky, 0.69, 0.1),
    "a plateau": (plateau, 2.3, 0.23),
    "an overshoot": (overshoot, 0.69, 0.03),
    "memorized": (memorized, 0.7, 0.28),
    "a rate too low": (lambda rng: [noisy(rng, 0.69, 0.1) for _ in range(600)], 0.69, 0.07),
    "learned before": (lambda rng: [noisy(rng, 0.01, 1.0) for _ in range(600)], 0.01, 0.01),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", GOOD)
def test_good_curves_pass(name, seed):
    make, level, noise = GOOD[name]
    assert find_alarm(make(random.Random(seed)), level, noise, seed) is None


def explodes(rng):
    return [noisy(rng, 0.69 * math.exp(max(0, i - 30) / 20), 0.2) for i in range(120)]


def climbs_back(rng):
    """Return losses that fall, then rise, but never above the start."""
    return falling(rng, 10.8, 5, 0.05, 0.03, 100) + [
        noisy(rng, min(9.5, 5 + i / 10), 0.03) for i in range(100)
    ]


def bounces(rng):
    return [abs(noisy(rng, 0.9, 0.1) + rng.choice([-0.4, 0.0, 0.6])) for _ in range(120)]


def one_class(rng):
    """Return losses of a model that predicts one class for every batch, but not always the same."""
    return [noisy(rng, 0.82, 0.25) for _ in range(250)]


BAD = {
    "explodes": (explodes, 0.69, 0.14, "risen"),
    "climbs back": (climbs_back, 10.8, 0.05, "risen"),
    "stays above": (
        lambda rng: [noisy(rng, 1.4, 0.3) for _ in range(100)],
        0.69,
        0.03,
        "risen|jumps",
    ),
    "bounces": (bounces, 0.69, 0.03, "jumps|risen"),
    "one class": (one_class, 0.69, 0.015, "jumps|risen"),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", BAD)
def test_curves_of_too_high_a_rate_are_stopped(name, seed):
    make, level, noise, word = BAD[name]
    alarm = find_alarm(make(random.Random(seed)), level, noise, seed)
    assert alarm and re.search(word, alarm[1])


@pytest.mark.parametrize(
    "loss, norm, word",
    [(math.nan, 1.0, "loss"), (math.inf, 1.0, "loss"), (1.0, math.nan, "gradient")],
)
def test_a_value_that_is_not_finite_stops_at_once(loss, norm, word):
    guard = Guard([1.0] * 8)
    assert guard.observe(1.0, 1.0) is None and word in guard.observe(loss, norm)


def test_a_rising_loss_is_not_worth_saving_before_the_alarm():
    guard, calm = Guard([0.55, 0.83] * 4), []
    for loss in explodes(random.Random(0)):
        if guard.observe(loss, 1.0):
            break
        calm.append(guard.is_calm())
    assert calm[:20] == [True] * 20 and not any(calm[-3:])


def test_a_guard_continues_from_its_state():
    curve = climbs_back(random.Random(1))
    guard, stops = Guard([10.8, 10.9]), []
    for step, loss in enumerate(curve):
        guard = Guard.from_state(guard.state())
        if guard.observe(loss, 1.0):
            stops.append(step)
            break
    uninterrupted = Guard([10.8, 10.9])
    assert stops == [
        next(step for step, loss in enumerate(curve) if uninterrupted.observe(loss, 1.0))
    ]


# --- schedules ---


def test_schedules_rise_to_one_and_fall_to_zero():
    assert [schedule_factor("constant", i, 6, 2) for i in range(6)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 1, 1, 1]
    )
    assert [schedule_factor("linear", i, 6, 2) for i in range(6)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]
    )
    half = math.cos(math.pi / 4) / 2
    assert [schedule_factor("cosine", i, 6, 2) for i in range(2, 6)] == pytest.approx(
        [1, 0.5 + half, 0.5, 0.5 - half]
    )
    assert schedule_factor("linear", 0, 1, 0) == 1


# --- the range test ---


def descent(curvature, rng=None, spread=0.0):
    """Return a step of gradient descent on a parabola, which diverges above 2 / curvature."""
    x = [1.0]

    def step(rate):
        loss = 0.1 + curvature * x[0] ** 2 / 2
        x[0] -= rate * curvature * x[0]
        return noisy(rng, loss, spread) if rng else loss

    return step


@pytest.mark.parametrize("curvature", [1000.0, 30.0])
@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_the_proposed_rate_trains_and_a_hundred_times_it_does_not(curvature, spread):
    test = range_test(descent(curvature, random.Random(0), spread))
    assert 0.01 / curvature < test.proposal < 2 / curvature

    def final_loss(rate, steps=20):
        step = descent(curvature)
        return [step(rate) for _ in range(steps)][-1]

    assert (
        final_loss(test.proposal, 200) < 0.2 * descent(curvature)(0)
        and final_loss(100 * test.proposal) > 1e3
    )
    assert len(test.rates) == len(test.losses) == len(test.smoothed) < 100


def test_nothing_is_proposed_where_nothing_is_learned():
    rng = random.Random(0)
    assert range_test(lambda rate: noisy(rng, 1.0, 0.1)).proposal is None
    assert range_test(lambda rate: math.nan).proposal is None
