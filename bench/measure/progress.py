"""A bar on stderr: one line that is written over, or, where that is no terminal, a line from time to time."""

import shutil
import sys
import time

WIDTH = 20
EVERY = 30.0  # seconds, between lines


class Progress:
    def __init__(self, name: str, total: int, budget: float):
        self.name, self.total, self.budget = name, total, budget
        self.terminal = sys.stderr.isatty()
        self.begun, self.said = time.monotonic(), -EVERY

    def show(self, done: int, what: str) -> None:
        now = time.monotonic()
        if not self.terminal and now - self.said < EVERY:
            return
        self.said, full = now, WIDTH * done // self.total
        bar = "#" * full + "." * (WIDTH - full)
        line = f"{self.name} [{bar}] {done}/{self.total}, {self._left(done, now)} left: {what}"
        if self.terminal:
            columns = shutil.get_terminal_size().columns
            line = f"\r\033[K{line[: columns - 1]}"
        print(line, end="" if self.terminal else "\n", file=sys.stderr, flush=True)

    def _left(self, done: int, now: float) -> str:
        """At the pace so far, once there is one."""
        spent = now - self.begun
        left = spent / done * (self.total - done) if done >= 3 else max(0.0, self.budget - spent)
        return f"{int(left) // 60}:{int(left) % 60:02d}"

    def clear(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
