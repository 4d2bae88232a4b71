"""What other tests rest on, tested itself."""

import itertools
import signal
import subprocess
import sys

import pytest
from conftest import part
from helpers import triton_build

PYTEST = sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider"


@pytest.mark.parametrize("seed", [0, 7])
def test_parts_are_all_tests_once_whoever_asks(seed):
    tests = [f"test {i}" for i in range(101)]
    parts = [part(tests, f"{i}/4", seed) for i in range(1, 5)]
    assert sorted(itertools.chain(*parts)) == sorted(tests) and {len(one) for one in parts} == {
        25,
        26,
    }
    assert part(tests, "2/4", seed) == parts[1] != part(tests, "2/4", seed + 1)
    assert part(tests, "1/1", seed) != tests and part([], "1/4", seed) == []


def test_tests_stop_when_their_time_is_over(tmp_path):
    """The clock starts with the first of them; the second, which begins too late, is the last."""
    (tmp_path / "test_three.py").write_text(
        "import time, pytest\n@pytest.mark.parametrize('i', range(3))\ndef test_one(i):\n    time.sleep(0.3)\n"
    )
    words = [*PYTEST, "--within", "0.2", str(tmp_path)]
    done = subprocess.run(words, cwd=triton_build.HERE, capture_output=True, text=True)
    assert "2 passed" in done.stdout and "0.2 s are over, 1 tests are left" in done.stdout, (
        done.stdout + done.stderr
    )


def test_a_test_that_takes_too_long_is_interrupted(tmp_path):
    sleeps = 'def test_two():\n    print("begun", flush=True)\n    time.sleep(600)\n'
    (tmp_path / "test_two.py").write_text("import time\ndef test_one(): pass\n" + sleeps)
    words = ["timeout", "300", *PYTEST, "-s", "--within", "60", str(tmp_path)]
    running = subprocess.Popen(words, cwd=triton_build.HERE, stdout=subprocess.PIPE, text=True)
    while "begun" not in running.stdout.readline():
        assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=60)[0]
    assert "KeyboardInterrupt" in said and "1 passed" in said, said


def test_operands_wider_than_their_tile_are_found():
    """As Triton 3.6 laid out a product of 16 columns behind a mask of bytes, which 3.9 does not."""
    line = (
        "%acc = ttng.warp_group_dot %v, %p, %acc_0 {inputPrecision = 0 : i32} : tensor<64x16xbf16, #ttg.dot_op<{opIdx "
        "= 0, parent = #mma, kWidth = 8}>> * !ttg.memdesc<16x64xbf16, #shared, #smem> -> tensor<64x64xf32, #mma>"
    )
    assert triton_build.wide_operands(line) == [(16, 8)]
    assert triton_build.wide_operands(line.replace("ttng.warp_group_dot", "tt.dot")) == [(16, 8)]
    assert not triton_build.wide_operands(line.replace("kWidth = 8", "kWidth = 4"))
    assert not triton_build.wide_operands(line.replace("64x16xbf16", "64x32xbf16"))
