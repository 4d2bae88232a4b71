"""The bench's folders: imports point down, modules are short, and make gpu's files exist."""

import ast
import re
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "bench").rglob("*.py"))
LEVELS = {
    "measure": 0,
    "report": 1,
    **dict.fromkeys(("session", "options", "nf4", "adapter"), 2),
    **dict.fromkeys(("lora", "lsh_attention", "reversible", "llama", "reformer"), 3),
    "__main__": 4,
}


def imported_modules(path: Path) -> set[Path]:
    """Return the files of the bench that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = {ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names}
    return files & set(MODULES)


def part_of(path: Path) -> str:
    """Return the folder or module below bench/ that a file belongs to."""
    return path.relative_to(ROOT / "bench").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    for imported in imported_modules(path):
        part, imported_part = part_of(path), part_of(imported)
        if imported_part != part:
            assert LEVELS[imported_part] < LEVELS[part], imported


def test_there_is_no_circle_of_imports():
    TopologicalSorter({path: imported_modules(path) for path in MODULES}).prepare()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_short_and_say_what_they_are(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text)), "a docstring"


def gpu_test_files() -> list[str]:
    """Return the test files that make gpu runs."""
    script = (ROOT / ".ci" / "gpu").read_text()
    listed = subprocess.run(
        ["bash", "-c", f"{files_part(script)}\nprintf '%s\\n' \"${{files[@]}}\""],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [*listed, *re.findall(r"tests/[\w/]+\.py", script)]


def test_every_test_that_make_gpu_runs_exists():
    paths = gpu_test_files()
    assert len(paths) > 15
    for path in paths:
        assert (ROOT / path).is_file(), path


def test_make_gpu_runs_every_test_of_an_op_on_a_device():
    """A test that takes a device runs on a GPU too, if there is one."""
    takes_device = re.compile(r"def test_\w+\([^)]*\bdevice\b")
    paths = (ROOT / "tests" / "ops").glob("test_*.py")
    by_device = [path for path in paths if takes_device.search(path.read_text())]
    missing = {str(path.relative_to(ROOT)) for path in by_device} - set(gpu_test_files())
    assert not missing


def files_part(script: str) -> str:
    """Return the lines of the script that fill the array of test files."""
    begin = script.index("files=(")
    return script[begin : script.index("\n\n", begin)]


@pytest.mark.parametrize("name", ["gpu", "gpu-check", "packaging", "run"])
def test_scripts_can_be_parsed(name):
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / name)], check=True)
