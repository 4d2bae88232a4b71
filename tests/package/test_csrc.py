"""The folders of csrc include only folders below them, and csrc/cpu knows no tensors."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
CPU = {"cpu/common", "cpu/nf4", "cpu/linear", "cpu/adapter", "cpu/lsh", "cpu/reversible"}
MAY_INCLUDE = {
    "cpu/common": set(),
    "cpu/nf4": {"cpu/common"},
    "cpu/linear": {"cpu/common", "cpu/nf4"},
    "cpu/adapter": {"cpu/common"},
    "cpu/lsh": {"cpu/common"},
    "cpu/reversible": {"cpu/common"},
    "cuda": {"cpu/reversible"},
    "ops": {*CPU, "cuda"},
    "reversible": set(),
    ".": {"cpu/common", "reversible"},
}


def sources(folder: str) -> list[Path]:
    return [path for path in (CSRC / folder).iterdir() if path.suffix in (".cpp", ".h", ".cu")]


def includes(path: Path) -> list[str]:
    return re.findall(r'#(?:include|define LOOPS) ["<](.+?)[">]', path.read_text())


def test_every_folder_has_a_rule():
    folders = {path.parent.relative_to(CSRC).as_posix() for path in CSRC.rglob("*.cpp")}
    assert folders | {"cuda"} == set(MAY_INCLUDE)


@pytest.mark.parametrize("folder", MAY_INCLUDE)
def test_includes_point_down(folder):
    for path in sources(folder):
        for name in includes(path):
            included = CSRC / name
            if included.exists():
                other = included.parent.relative_to(CSRC).as_posix()
                assert other == folder or other in MAY_INCLUDE[folder], f"{path} includes {name}"


@pytest.mark.parametrize("folder", sorted(CPU))
def test_cpu_knows_no_tensors(folder):
    """Of ATen it takes threads, settings and torch's own products of bf16."""
    allowed = {"ATen/Parallel.h", "ATen/Context.h", "ATen/native/CPUBlas.h"}
    for path in sources(folder):
        wrong = {name for name in includes(path) if name.startswith(("ATen/", "torch/"))} - allowed
        assert not wrong, f"{path} includes {wrong}"
