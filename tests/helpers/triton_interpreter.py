"""Kernels in Triton's interpreter, which has to be chosen before triton is imported: in a process of its own."""

import os
import pathlib
import subprocess
import sys

CHOSEN = os.environ.get("TRITON_INTERPRET") == "1"
TESTS = pathlib.Path(__file__).parents[1]


def assert_passes(file, chosen=""):
    """The tests of a file, or those that pytest's -k chooses."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }  # the tensors are too small for two
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, str(TESTS / file)]
    run = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def patch_once_a_launch():
    """The interpreter patches Triton's language at every call of a device function, for two fifths
    of its time.

    Once for each module that a launch comes through is as good: until the launch ends nothing is
    patched back.
    """
    from triton.runtime import interpreter

    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        if fn.__module__ not in patched:
            patched.add(fn.__module__)
            return patch(fn)

    def begin(*args, **kwargs):
        patched.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, begin
