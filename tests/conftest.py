"""What the tests share: devices, dtypes, and the one rule by which a result is judged."""

import os
import random
import signal
import time

import pytest
import torch
import triton_interpreter

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
MEMORY_GB = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# An op may err, against float64, at most twice as much as plain torch does in the same dtype. The floor covers
# results that torch happens to get exactly right: a few units in the last place of the largest value, and on a GPU,
# which adds up in another order, twice as many of float32's.
ALLOWED_ERROR_RATIO = 2.0
FLOOR = {torch.float64: 1e-14, torch.float32: 2.0**-22, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}


# What `pytest.mark.needs` may name. A test that lacks it here is deselected, not skipped: another run is its place.
_kernels = torch.cuda.is_available() or triton_interpreter.CHOSEN
NEEDS = {
    "gpu": torch.cuda.is_available(),
    "kernels": _kernels,  # Triton kernels run in this process
    "no kernels": not _kernels,
    "compiler": not triton_interpreter.CHOSEN,  # Triton's: with the interpreter there is none
}


def pytest_addoption(parser):
    parser.addoption("--shard", metavar="I/N", help="of the tests, shuffled, every Nth from the Ith")
    parser.addoption("--shuffle", metavar="SEED", type=int, default=0, help="of the shards' order; default: 0")
    parser.addoption(
        "--within",
        metavar="SECONDS",
        type=float,
        default=float("inf"),
        help="what begins later than these after the first test is the last",
    )


def pytest_configure(config):
    if config.getoption("within") < float("inf"):  # of one that takes too long, `timeout` still has the summary
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if triton_interpreter.CHOSEN:
        triton_interpreter.patch_once_a_launch()
    config.addinivalue_line("markers", f"needs(what): deselected without {', '.join(NEEDS)}")
    config.addinivalue_line("markers", "long: begins first, so that none of several processes waits for it at the end")


def pytest_collection_modifyitems(config, items):
    lacking = [item for item in items if not all(NEEDS[mark.args[0]] for mark in item.iter_markers("needs"))]
    if lacking:
        config.hook.pytest_deselected(items=lacking)
        items[:] = [item for item in items if item not in set(lacking)]
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if shard := config.getoption("shard"):
        items[:] = part(items, shard, config.getoption("shuffle"))


def part(items: list, shard: str, seed: int) -> list:
    """The same items in the same order, whichever process asks: all parts together are all of them."""
    first, step = map(int, shard.split("/"))
    return random.Random(seed).sample(items, len(items))[first - 1 :: step]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    session, within = item.session, item.config.getoption("within")
    session.begun = getattr(session, "begun", None) or time.monotonic()
    if time.monotonic() - session.begun > within:
        left = len(session.items) - session.items.index(item) - 1
        session.shouldstop = f"{within:g} s are over, {left} tests are left"


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def fresh_inputs(request):
    """Other numbers for every test, the same ones for the same test."""
    torch.manual_seed(sum(request.node.name.encode()))


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """||value - exact|| / ||exact|| in float64; of nothing, 0."""
    if exact.numel() == 0:
        return 0.0
    exact = exact.double()
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def assert_as_exact_as_torch(ours: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor) -> None:
    """The tolerance rule."""
    assert ours.shape == exact.shape and ours.dtype == torchs.dtype and ours.device == torchs.device
    error, allowed = relative_error(ours, exact), ALLOWED_ERROR_RATIO * relative_error(torchs, exact)
    floor = FLOOR[ours.dtype] * (2 if ours.is_cuda and ours.dtype == torch.float32 else 1)
    assert error <= allowed + floor, f"error {error:.3g}; torch's is {allowed / 2:.3g}"
