"""Tests of the package around the ops: instruction sets, commands, import, build and fallbacks."""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import warnings
from pathlib import Path

import pytest
import torch

import pyfast
from pyfast._support import extension, notices, registry
from pyfast.cli import main, selftest
from pyfast.ops.registered import nf4 as registered_nf4

ROOT = Path(__file__).parents[2]
ISAS = ["portable", "avx2", "avx512", "avx512_bf16"]
HERE = ISAS[: ISAS.index(extension.C.machine_isa()) + 1]


def python(*args: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=600,
    )


# --- instruction sets ---


@pytest.mark.long
@pytest.mark.parametrize("isa", HERE)
def test_every_instruction_set_passes(isa):
    if isa == extension.C.isa():  # this run tests it in full
        assert os.environ.get("PYFAST_CPU") or isa == HERE[-1]
        return
    tests = [
        *(
            f"tests/{name}.py"
            for name in (
                "ops/test_nf4",
                "formats/test_bitsandbytes",
                "ops/test_lora",
                "ops/test_adapter",
            )
        )
    ]
    tests += ["-k", "not 2_31 and not of_a_real_size and not sizes and not ranks"]
    run = python("-m", "pytest", "-x", *tests, PYFAST_CPU=isa)
    assert run.returncode == 0, run.stdout[-3000:]


def test_instruction_sets_are_chosen_by_name_and_agree_on_bytes():
    """One that this machine lacks is reported, and the best one runs instead."""
    code = """
import torch, pyfast, hashlib
from pyfast._support import extension
torch.manual_seed(5)
w = pyfast.nf4_quantize(torch.randn(301, 515))
out = [t.numpy().tobytes() for t in w.state]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    out.append(pyfast.nf4_dequantize(w, dtype).view(torch.uint8).numpy().tobytes())
print(extension.C.isa(), hashlib.sha256(b"".join(out)).hexdigest())
"""
    hashes = set()
    for isa in ISAS:
        run = python("-c", code, PYFAST_CPU=isa)
        assert run.returncode == 0 and (f"PYFAST_CPU={isa}, but no" in run.stderr) == (
            isa not in HERE
        ), run.stderr
        name, digest = run.stdout.split()
        assert name == (isa if isa in HERE else HERE[-1]) and len(digest) == 64
        hashes.add(digest)
    assert len(hashes) == 1


def test_an_unknown_instruction_set_is_refused():
    run = python("-c", "import pyfast", PYFAST_CPU="mmx")
    assert (
        run.returncode
        and "PYFAST_CPU=mmx: expected portable, avx2, avx512 or avx512_bf16" in run.stderr
    )


@pytest.mark.parametrize("off", ["ONEDNN_MAX_CPU_ISA=AVX2", "MKLDNN=0"])
def test_bf16_products_are_right_without_torch_s_brgemm(off):
    """Where oneDNN is capped or off, pyfast computes the products itself."""
    name, value = off.split("=")
    code = (
        "import torch; torch.backends.mkldnn.flags(enabled=False).__enter__()"
        if name == "MKLDNN"
        else "import torch"
    )
    code += """
import pyfast
x, w = torch.randn(64, 128).bfloat16(), torch.randn(96, 128).bfloat16()
y = pyfast.lora_linear(x, w, torch.randn(4, 128), torch.zeros(96, 4), scaling=1.0)
torch.testing.assert_close(y, (x.float() @ w.float().t()).bfloat16(), rtol=1e-2, atol=1e-2)
torch.testing.assert_close(pyfast.nf4_linear(x, pyfast.nf4_quantize(w)).float(), x.float() @ pyfast.nf4_dequantize(pyfast.nf4_quantize(w)).float().t(), rtol=1e-2, atol=0.2)
"""
    run = python("-c", code, **({} if name == "MKLDNN" else {name: value}))
    assert run.returncode == 0, run.stderr
    says = (
        name != "MKLDNN" and extension.C.isa() == "avx512_bf16"
    )  # a user who turns it off needs no notice
    assert run.stderr.count("no bf16 products here") == says


# --- shell ---


def test_info_shows_what_runs_here():
    run = python("-m", "pyfast", "info")
    assert run.returncode == 0, run.stderr
    for text in (pyfast.__version__, torch.__version__, extension.C.isa(), *registry.registered()):
        assert text in run.stdout
    assert "nf4_linear_backward 8192 rows: panel" in " ".join(run.stdout.split())


def test_selftest_passes_and_can_fail(monkeypatch, capsys):
    assert (
        main.main(["selftest", "--device", "cpu"]) == 0 and " 0 failed" in capsys.readouterr().out
    )
    right = registered_nf4.linear
    monkeypatch.setattr(registered_nf4, "linear", lambda *args: right(*args) * 1.01)
    assert main.main(["selftest", "--device", "cpu"]) == 1 and "WRONG" in capsys.readouterr().out


def test_selftest_notices_an_error_of_sixteen_epsilons(monkeypatch):
    """In float32 on the CPU: twice torch's error is two to five epsilons, by its number of threads."""
    right = registered_nf4.linear
    monkeypatch.setattr(registered_nf4, "linear", lambda *args: right(*args) * (1 + 2**-19))
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    cases = list(selftest._compare_nf4((200, 320), True, "nf4", cpu, generator))
    wrong = {case.name for case in cases if not case.error <= case.allowed}
    assert wrong >= {f"[200, 320] nf4 nested float32 {rows} rows" for rows in (1, 9)}


def test_selftest_allows_more_only_where_few_sums_decide(monkeypatch):
    monkeypatch.setattr(selftest, "_distance", lambda value, exact: 0.0)  # torch's error, too
    cases = selftest._compare_lora(torch.device("cpu"), torch.Generator().manual_seed(0))
    allowed = {case.name: case.allowed for case in cases if "float32" in case.name}
    loose = [name for name in allowed if allowed[name] > 2**-24]
    assert loose == [f"{base} float32 3 rows: d lora_b" for base in ("dense", "nf4")]


def test_no_command_is_an_error_that_lists_the_commands(capsys):
    assert main.main([]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines] == list(main.COMMANDS)
    assert all(len(line.split()) > 5 for line in lines)


@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_shows_a_text_for_every_argument(command, capsys):
    parser = argparse.ArgumentParser()
    main.COMMANDS[command].add_arguments(parser)
    for action in parser._actions:
        assert action.help and "likewise" not in action.help
    with pytest.raises(SystemExit, match="0"):
        main.main([command, "--help"])
    assert main.COMMANDS[command].SUMMARY in " ".join(capsys.readouterr().out.split())


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main.main(["fly"])
    assert "invalid choice: 'fly'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, words, advice",
    [
        ("demo", [], "; --quick takes less"),
        ("demo", ["--quick"], ""),
        ("predict", ["--adapter", "there", "a text"], ""),
        (
            "finetune",
            ["--resume", "there"],
            "; a smaller --batch or --max-length takes less",
        ),
    ],
)
def test_out_of_memory_is_reported_with_flags_that_the_command_has(
    command, words, advice, monkeypatch, capsys
):
    def exhaust(arguments):
        raise MemoryError

    monkeypatch.setattr(main.COMMANDS[command], f"_{command}", exhaust)
    assert main.main([command, *words]) == 2
    assert capsys.readouterr().err == f"pyfast {command}: out of memory{advice}\n"


# --- import ---


def test_another_torch_is_refused_with_its_version():
    code = "import torch; torch.__version__ = '2.99.0'; import pyfast"
    run = python("-c", code)
    assert (
        run.returncode
        and f"built for torch {extension.C.torch_version} and found 2.99.0; reinstall" in run.stderr
    )


def test_a_binary_that_does_not_load_says_what_to_do():
    code = "import sys; sys.modules['pyfast._C'] = None; import pyfast"
    run = python("-c", code)
    assert (
        run.returncode
        and "compiled part does not load" in run.stderr
        and "pip install" in run.stderr
    )


@pytest.fixture
def unbuilt_checkout(tmp_path):
    """A folder `pyfast` that holds a checkout, as `git clone` leaves it."""
    checkout = tmp_path / "pyfast"
    (checkout / "csrc").mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", checkout)
    shutil.copytree(
        ROOT / "pyfast", checkout / "pyfast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return checkout


def test_a_checkout_that_hides_an_install_says_so(unbuilt_checkout):
    code = """
import runpy, sys
# An editable install of another checkout would lend its compiled part.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.argv = ["pyfast", "info"]
runpy.run_module("pyfast", run_name="__main__")
"""
    run = python("-c", code, cwd=unbuilt_checkout, PYTHONPATH=str(ROOT))
    assert run.returncode and run.stderr.splitlines()[-1] == (
        f"ImportError: {unbuilt_checkout}/pyfast is a source checkout without its compiled part, "
        "and would hide an installed pyfast; build it in place (pip install -e .) or run from "
        "another folder"
    )


def test_an_installed_package_wins_over_a_folder_of_its_name(unbuilt_checkout):
    run = python("-m", "pyfast", "info", cwd=unbuilt_checkout.parent, PYTHONPATH=str(ROOT))
    assert run.returncode == 0 and pyfast.__version__ in run.stdout, run.stderr


def test_import_needs_no_triton_and_stays_light():
    code = """
import sys
sys.modules["triton"] = None
import pyfast, torch
heavy = {"transformers", "bitsandbytes", "matplotlib", "peft"} & set(sys.modules)
assert not heavy, heavy
print(pyfast.nf4_linear(torch.randn(2, 64), pyfast.nf4_quantize(torch.randn(8, 64))).shape)
"""
    run = python("-c", code)
    assert "[2, 8]" in run.stdout, run.stderr


@pytest.mark.parametrize(
    "context",
    ["torch.device('meta')", "default('bfloat16')", "default('float64')"],
)
def test_a_first_use_while_transformers_loads_spoils_nothing(context):
    """The contexts are those in which transformers builds a model."""
    code = f"""
import contextlib, torch, pyfast

@contextlib.contextmanager
def default(name):
    torch.set_default_dtype(getattr(torch, name))
    yield
    torch.set_default_dtype(torch.float32)

weight = torch.randn(8, 64)
with {context}:
    pyfast.NF4Linear(64, 8, dtype=torch.float32)
    if "meta" not in "{context}":
        pyfast.nf4_quantize(weight)
exact = pyfast.reference.nf4_quantize(weight)
assert all(map(torch.equal, pyfast.nf4_quantize(weight).state, exact.state))
"""
    run = python("-c", code)
    assert run.returncode == 0, run.stderr


def test_public_names_exist():
    assert all(hasattr(pyfast, name) for name in pyfast.__all__)


# --- build ---


def test_every_package_of_the_tree_is_built():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "pyfast").rglob("*.py")} | {ROOT / "pyfast/kernels"}
    assert set(listed) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_build_says_whether_cuda_sources_are_in(tmp_path):
    run = python("setup.py", "egg_info", "--egg-base", str(tmp_path), PYFAST_CUDA="0")
    assert "building CPU kernels" in run.stderr and "PYFAST_CUDA=0" in run.stderr, run.stderr
    metadata = next(tmp_path.glob("*.egg-info")) / "PKG-INFO"
    assert f"Version: {pyfast.__version__}" in metadata.read_text().splitlines()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_can_be_demanded(tmp_path):
    run = python("setup.py", "egg_info", "--egg-base", str(tmp_path), PYFAST_CUDA="1")
    assert (
        run.returncode
        and f"PYFAST_CUDA=1, but torch {torch.__version__} is a CPU build" in run.stderr
    )


def test_a_source_distribution_holds_all_sources(tmp_path):
    """Also those that are not built here: CUDA's, and the kernels behind their link."""
    run = python("setup.py", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    assert run.returncode == 0, run.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.split("/", 1)[-1] for name in files.getnames()}
    sources = {path for suffix in ("cpp", "h", "cu") for path in ROOT.glob(f"csrc/**/*.{suffix}")}
    sources |= set((ROOT / "pyfast" / "kernels").glob("*.py"))
    assert {str(path.relative_to(ROOT)) for path in sources} <= names


# --- fallbacks ---


def test_a_fallback_is_reported_once(monkeypatch):
    monkeypatch.setattr(notices, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            notices.warn_once("nf4_linear has no kernel for mps")
    assert [str(w.message) for w in caught] == ["pyfast: nf4_linear has no kernel for mps"]


def test_the_fallback_is_the_reference(monkeypatch):
    """The registration for devices without kernels is called here on the CPU."""
    monkeypatch.setattr(notices, "_warned", set())
    w = pyfast.nf4_quantize(torch.randn(8, 70))
    x, keys = (
        torch.randn(3, 70),
        torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd),
    )
    op = torch.ops.pyfast.nf4_linear.default
    with pytest.warns(
        UserWarning, match="nf4_linear has no kernel for cpu: plain torch runs instead"
    ):
        y = op.redispatch(keys, x, w.state, None, w.shape, 64)
    torch.testing.assert_close(y, pyfast.nf4_linear(x, w))
