"""A line on stderr for work that takes long; none where stderr is not a terminal."""

import shutil
import sys
import time

_WIDTH, _PAUSE = 24, 0.1  # characters; seconds between two drawings


class Progress:
    """`with Progress("quantize", 224) as bar:` and `bar.step("what is done")` at each of the 224."""

    def __init__(self, what: str, total: int, *, shown: bool = True) -> None:
        self.what, self.total, self.done = what, total, 0
        self._begin = self._drawn = time.monotonic()
        self._length = 0
        self._shown = shown and sys.stderr is not None and sys.stderr.isatty()

    def step(self, text: str = "") -> None:
        """One more is done; `text` stands beside the bar."""
        self.at(self.done + 1, text)

    def at(self, done: int, text: str = "") -> None:
        """So many are done."""
        self.done = done
        now = time.monotonic()
        if self._shown and (now - self._drawn >= _PAUSE or self.done == self.total):
            self._drawn = now
            self._draw(text, now - self._begin)

    def _draw(self, text: str, seconds: float) -> None:
        full = _WIDTH * self.done // max(self.total, 1)
        bar = "#" * full + "." * (_WIDTH - full)
        line = f"{self.what} [{bar}] {self.done}/{self.total} {seconds:.0f} s {text}".rstrip()
        line = line[: shutil.get_terminal_size().columns - 1]  # what wraps cannot be drawn over
        sys.stderr.write(f"\r{line:<{self._length}}")
        sys.stderr.flush()
        self._length = len(line)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self._length:
            sys.stderr.write("\n")
