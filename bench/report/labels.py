"""Names of machines and formats of numbers, as readers see them. Needs no torch."""

from collections.abc import Mapping
from typing import Any


def device_of(machine: Mapping[str, Any]) -> str:
    """Return the device that a record's machine was measured on."""
    return "cuda" if "gpu" in machine else "cpu"


def machine_title(machine: Mapping[str, Any]) -> str:
    """Return what a machine is and, for a CPU, its cores and instruction sets."""
    if not machine:
        return "a machine not named"
    if "gpu" in machine:
        return str(machine["gpu"])
    cores = str(machine.get("cores", "")).partition(",")[0]
    isa = str(machine.get("isa", "")).replace("+", " + ")
    return ", ".join(part for part in (str(machine.get("cpu", "")), cores, isa) if part)


def format_rate(value: float) -> str:
    """Format a rate of FLOPs."""
    return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"


def format_number(value: float) -> str:
    """Format a measured number with the digits that mean something."""
    if value == 0:
        return "0"
    if abs(value) >= 99.5:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 9.95 else f"{value:#.2g}"
