"""A progress bar on stderr."""

import math
import shutil
import sys
import time

_WIDTH = 24  # characters
_PAUSE = 0.1  # seconds between two drawings


class Progress:
    """A progress bar: one line that is written over where stderr is a terminal.

    with Progress("quantize", 224) as bar:
        bar.step("the name of a layer")  # 224 times

    Args:
        name: What is done, before the bar.
        total: How many steps it takes.
        shown: Whether to draw at all.
        budget: Seconds that all steps may take. The bar then shows the time that is left, from the
            pace so far, instead of the time that is spent.
        line_every: Seconds between two lines where stderr is no terminal. Default: no lines.
    """

    def __init__(
        self,
        name: str,
        total: int,
        *,
        shown: bool = True,
        budget: float | None = None,
        line_every: float | None = None,
    ) -> None:
        self.name, self.total, self.done, self.budget = name, total, 0, budget
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._pause = _PAUSE if self._is_terminal else line_every
        self._shown = shown and sys.stderr is not None and self._pause is not None
        self._begin, self._drawn = time.monotonic(), -math.inf
        self._length = 0  # of the line on the terminal

    def step(self, text: str = "") -> None:
        """Count one more step, and show the text beside the bar."""
        self.show(self.done + 1, text)

    def show(self, done: int, text: str = "") -> None:
        """Set how many steps are done, and show the text beside the bar."""
        self.done = done
        if not self._shown:
            return
        now = time.monotonic()
        is_last = self._is_terminal and done == self.total
        if now - self._drawn >= self._pause or is_last:
            self._drawn = now
            self._draw(self._line(text, now - self._begin))

    def clear(self) -> None:
        """Wipe the bar off the terminal."""
        if self._length:
            sys.stderr.write(f"\r{'':<{self._length}}\r")
            sys.stderr.flush()
            self._length = 0

    def _line(self, text: str, spent: float) -> str:
        full = _WIDTH * self.done // max(self.total, 1)
        bar = f"{self.name} [{'#' * full}{'.' * (_WIDTH - full)}] {self.done}/{self.total}"
        if self.budget is None:
            return f"{bar} {spent:.0f} s {text}".rstrip()
        left = int(self._seconds_left(spent))
        return f"{bar}, {left // 60}:{left % 60:02d} left: {text}"

    def _seconds_left(self, spent: float) -> float:
        if self.done < 3:  # too few for a pace
            return max(0.0, self.budget - spent)
        return spent / self.done * (self.total - self.done)

    def _draw(self, line: str) -> None:
        if self._is_terminal:
            line = line[: shutil.get_terminal_size().columns - 1]  # what wraps cannot be undone
            sys.stderr.write(f"\r{line:<{self._length}}")
            self._length = len(line)
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self._length:
            sys.stderr.write("\n")
