"""Files are complete, or not there at all."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyfast.formats import file_io


def test_two_may_write_one_file_at_a_time(tmp_path):
    """Two threads write different texts; each is half done when the other begins."""
    path, half = tmp_path / "file", threading.Barrier(2, timeout=30)

    def write(text):
        def write_to(aside):
            with open(aside, "w") as file:
                file.write(text)
                file.flush()
                half.wait()
                file.write(text)
            half.wait()

        file_io.replace(path, write_to)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, "ab"))
    assert path.read_text() in ("aa", "bb") and list(tmp_path.iterdir()) == [path]


def test_what_was_there_stays_if_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(aside):
        aside.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        file_io.replace(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
