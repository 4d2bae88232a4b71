"""csrc: includes point down, csrc/cpu knows no tensors, and the README names real tests."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CSRC = TESTS.parent / "csrc"
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


def test_the_readme_of_the_reversible_engine_names_real_tests():
    names = re.findall(r"`(?:(\w+)::)?(test_\w+)`", (CSRC / "reversible/README.md").read_text())
    assert len(names) > 20
    for suffix, name in names:
        module = "_".join(filter(None, ("test_reversible", suffix)))
        source = (TESTS / "ops" / f"{module}.py").read_text()
        assert f"def {name}(" in source, f"{module}.py has no {name}"
