"""Kernels in Triton's interpreter, which has to be chosen before triton is imported: in a process of its own."""

import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent


def assert_passes(file, chosen=""):
    """The tests of a file, or those that pytest's -k chooses."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # the tensors are too small for two
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, str(TESTS / file)]
    run = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
