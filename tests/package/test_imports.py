"""The rules of CONTRIBUTING.md about imports, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A folder imports itself and folders of lower levels.
LEVELS = {
    "_version": 0,
    "_support": 0,
    "formats": 1,
    "reference": 2,
    "kernels": 3,
    "ops": 4,
    "nn": 5,
    "adapters": 6,
    "models": 6,
    "hf": 6,
    "finetune": 7,
    "demo": 8,
    "cli": 9,
    "__main__": 10,
}
BENCH_LEVELS = {
    "measure": 0,
    "report": 1,
    "session": 2,
    "options": 2,
    "nf4": 2,
    "adapter": 2,
    "lora": 3,
    "lsh_attention": 3,
    "llama": 3,
    "reformer": 3,
    "reversible": 3,
    "__main__": 4,
}
PEERS = {"transformers", "peft", "bitsandbytes", "accelerate", "trl", "datasets"}
EXPORTING = {"pyfast/__init__.py", "pyfast/hf/__init__.py", "pyfast/reference/__init__.py"}

# Calls of import_module with a name that is no literal, and the table that the name is from.
COMPUTED = [
    # launchers, in `registry.register`
    ("pyfast._support.registry", "importlib.import_module(f'pyfast.kernels.{module}')"),
    # benches, in BENCHES
    ("bench.__main__", "importlib.import_module(BENCHES[name])"),
    # measurements that a bench runs in a process of its own
    ("bench.measure.own_process", "importlib.import_module(module)"),
    # implementations to compare with, which may be missing
    ("bench.measure.peer", "importlib.import_module(module)"),
]


def modules(top: str) -> dict[str, Path]:
    """Return the files below a folder by their dotted names."""
    paths = (path for path in sorted((ROOT / top).rglob("*.py")) if "results" not in path.parts)
    names = {}
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


PACKAGE = modules("pyfast") | {
    f"pyfast.kernels.{path.stem}": path for path in sorted((ROOT / "kernels").glob("*.py"))
}
BENCH = modules("bench")


def imported(path: Path, known: dict[str, Path], top_level_only: bool = False) -> set[str]:
    """Return what a file imports: known modules by their full names, others by their first."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # only kernels import relatively
                base = ".".join(["pyfast.kernels", *filter(None, [node.module])])
            for alias in node.names:
                if (base, alias.name) == ("pyfast", "_C"):
                    continue  # the binary
                full = f"{base}.{alias.name}"
                names.add(full if full in known else base)
    names.discard("pyfast._C")
    return {name if name in known else name.partition(".")[0] for name in names}


def level(name: str, levels: dict[str, int]) -> int:
    return levels[name.split(".")[1]]


@pytest.mark.parametrize(
    ("known", "levels"), [(PACKAGE, LEVELS), (BENCH, BENCH_LEVELS)], ids=["pyfast", "bench"]
)
def test_imports_point_down(known, levels):
    wrong = []
    for name, path in known.items():
        if name.count(".") == 0:
            continue
        for other in imported(path, known) & set(known):
            if other.count(".") == 0:
                # The face of the package imports everything; nothing imports it.
                wrong.append(f"{name} imports {other} itself")
            elif level(other, levels) > level(name, levels) or (
                level(other, levels) == level(name, levels)
                and name.split(".")[1] != other.split(".")[1]
            ):
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("known", [PACKAGE, BENCH], ids=["pyfast", "bench"])
def test_no_circle_of_files(known):
    graph = {name: imported(path, known) & set(known) - {name} for name, path in known.items()}
    done, trail = set(), []

    def visit(name):
        if name in trail:
            raise AssertionError(" -> ".join([*trail[trail.index(name) :], name]))
        if name not in done:
            trail.append(name)
            for other in sorted(graph[name]):
                visit(other)
            done.add(trail.pop())

    for name in sorted(graph):
        visit(name)


def test_registered_ops_do_not_import_ops():
    for name, path in PACKAGE.items():
        if name.startswith("pyfast.ops.registered"):
            others = {
                other
                for other in imported(path, PACKAGE)
                if other.startswith("pyfast.ops") and not other.startswith("pyfast.ops.registered")
            }
            assert not others, f"{name} imports {others}"


def test_only_registration_and_info_reach_kernels():
    """Launchers are named as strings; results' layout, which needs no triton, is imported."""
    for name, path in PACKAGE.items():
        reached = {
            other
            for other in imported(path, PACKAGE)
            if other.startswith("pyfast.kernels") and other != "pyfast.kernels._layout"
        }
        allowed = name.startswith(("pyfast.kernels", "pyfast.cli.info", "pyfast._support.registry"))
        assert allowed or not reached, f"{name} imports {reached}"


def test_kernels_import_torch_triton_and_each_other():
    allowed = {"torch", "triton", "pyfast"} | sys.stdlib_module_names
    for path in (ROOT / "kernels").glob("*.py"):
        imports = imported(path, PACKAGE)
        others = {name.split(".")[0] for name in imports} - allowed
        assert not others, f"{path.name} imports {others}"
        package = {name for name in imports if name.split(".")[0] == "pyfast"}
        kernels = {name for name in package if name.startswith("pyfast.kernels")}
        assert package == kernels, f"{path.name} imports {package - kernels}"
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and "pyfast" in (node.module or "")), path
    assert not (ROOT / "kernels" / "__init__.py").exists()  # Hugging Face has a package `kernels`


def test_only_hf_imports_hugging_face_at_import_time():
    for name, path in PACKAGE.items():
        if not name.startswith("pyfast.hf"):
            peers = imported(path, PACKAGE, top_level_only=True) & PEERS
            assert not peers, f"{name} imports {peers}"


def test_only_three_files_export_for_others():
    for path in (ROOT / "pyfast").rglob("__init__.py"):
        name = path.relative_to(ROOT).as_posix()
        if name not in EXPORTING:
            nodes = ast.parse(path.read_text()).body
            assert all(isinstance(node, ast.Expr) for node in nodes), (
                f"{name} is to hold a docstring"
            )


def test_no_module_has_the_name_of_what_its_package_exports():
    import pyfast
    import pyfast.hf

    for package in (pyfast, pyfast.hf, pyfast.reference):
        folder = Path(package.__file__).parent
        taken = {path.stem for path in folder.glob("*.py")} | {
            path.name
            for path in folder.iterdir()
            if path.is_dir() and (path / "__init__.py").exists()
        }
        modules_exported = {"hf", "reference"}
        clash = taken & set(package.__all__) - modules_exported
        assert not clash, f"{package.__name__}: {clash}"


def test_no_module_is_imported_by_a_computed_name():
    """COMPUTED lists the calls that may, each of which reads a table of names."""
    computed = []
    for name, path in (PACKAGE | BENCH).items():
        for node in ast.walk(ast.parse(path.read_text())):
            is_call = isinstance(node, ast.Call)
            if not is_call or not ast.unparse(node.func).endswith("import_module"):
                continue
            if not isinstance(node.args[0], ast.Constant):
                computed.append((name, ast.unparse(node)))
    assert sorted(computed) == sorted(COMPUTED)


def test_folders_are_small():
    for folder in {path.parent for path in (ROOT / "pyfast").rglob("*.py")}:
        count = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        assert count <= 20, f"{folder.relative_to(ROOT)} has {count} modules; 20 at most"


def test_no_test_imports_a_test():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            assert not module.rpartition(".")[2].startswith("test_"), f"{path} imports {module}"


def test_every_package_is_installed():
    """pyproject.toml lists packages by hand; one that is missing there is missing once installed."""
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "pyfast").rglob("__init__.py")
    }
    assert set(listed) == there | {"pyfast.kernels"}
