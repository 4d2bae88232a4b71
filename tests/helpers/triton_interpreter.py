"""Tests of kernels in Triton's interpreter, in a process of its own.

The interpreter has to be chosen before triton is imported.
"""

import os
import pathlib
import subprocess
import sys

CHOSEN = os.environ.get("TRITON_INTERPRET") == "1"
TESTS = pathlib.Path(__file__).parents[1]


def assert_passes(file, chosen=""):
    """Assert that the tests of a file pass in the interpreter, or those that -k chooses."""
    # The tensors are too small for two threads.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, str(TESTS / file)]
    run = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def patch_once_a_launch():
    """Make the interpreter patch Triton's language once for each module of a launch.

    By default it does so at every call of a device function, which takes two fifths of its time.
    Once is as good, because nothing is patched back until the launch ends.
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
