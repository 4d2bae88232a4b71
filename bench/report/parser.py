"""Argument parser of the bench commands."""

import argparse
from typing import Any


class Parser(argparse.ArgumentParser):
    """A parser that reports what is wrong in one line, without the usage."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")
