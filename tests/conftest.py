"""What the tests share: devices, dtypes, and the one rule by which a result is judged."""

import random
import signal
import time

import pytest
import torch
from helpers import triton_interpreter
from helpers.tolerance import DEVICES

# What `pytest.mark.needs` may name. A test that lacks it here is deselected, not skipped: another
# run is its place.
_kernels = torch.cuda.is_available() or triton_interpreter.CHOSEN
NEEDS = {
    "gpu": torch.cuda.is_available(),
    "kernels": _kernels,  # Triton kernels run in this process
    "no kernels": not _kernels,
    "compiler": not triton_interpreter.CHOSEN,  # Triton's: with the interpreter there is none
}


def pytest_addoption(parser):
    parser.addoption(
        "--shard", metavar="I/N", help="of the tests, shuffled, every Nth from the Ith"
    )
    parser.addoption(
        "--shuffle", metavar="SEED", type=int, default=0, help="of the shards' order; default: 0"
    )
    parser.addoption(
        "--within",
        metavar="SECONDS",
        type=float,
        default=float("inf"),
        help="what begins later than these after the first test is the last",
    )


def pytest_configure(config):
    if config.getoption("within") < float(
        "inf"
    ):  # of one that takes too long, `timeout` still has the summary
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if triton_interpreter.CHOSEN:
        triton_interpreter.patch_once_a_launch()
    config.addinivalue_line("markers", f"needs(what): deselected without {', '.join(NEEDS)}")
    config.addinivalue_line(
        "markers", "long: begins first, so that none of several processes waits for it at the end"
    )


def pytest_collection_modifyitems(config, items):
    lacking = [
        item
        for item in items
        if not all(NEEDS[mark.args[0]] for mark in item.iter_markers("needs"))
    ]
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
