"""README and docs: every code block runs as printed, every link leads somewhere, every number has a record."""

import importlib
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from helpers.tiny_checkpoints import records, write_jsonl, write_model

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.md")]
    + [*ROOT.glob("csrc/**/*.md")]
)
# From the records and the docstrings.
GENERATED = {"docs/benchmarks.md", "docs/api.md"}
# It names what is gone, too.
HISTORY = "CHANGELOG.md"
LANGUAGES = {"python", "sh", "json", "text"}
# What `make packaging` and CI run themselves, in environments of their own.
ELSEWHERE = ("pip install ", "git clone ", "uv pip install ")
# A figure that somebody measured, which may be another one tomorrow.
MEASURED = re.compile(
    r"\d\s?(ms|us|tokens/s|tokens a second|times as fast|GFLOP/s|GB/s|GB|MB|percent)\b|\d\s?%"
    r"|\b\d+(\.\d+)?x\b|\d\.\d+ bits|\de-\d"
)
# Phrases with such a figure that nobody measured, or that a test measures each time.
NOT_MEASURED = {
    # tests/formats/test_nf4_rounding.py computes both
    "docs/precision.md": ["errs by 1.3e-3 (root mean square)", "errs by 1.7e-3"],
}

# What a path of this repository begins or ends with.
FOLDERS = ("pyfast/", "kernels/", "csrc/", "tests/", "bench/", "docs/")
SUFFIXES = (".py", ".md", ".cpp", ".h", ".cu", ".json", ".toml", ".yml")
# Files that pages name and users have.
USERS_FILES = ("path/to/",)


class Block(NamedTuple):
    language: str
    line: int
    text: str


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found, opened = [], None
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        if line.startswith("```"):
            if opened is None:
                opened = (line[3:].strip(), number, [])
            else:
                found.append(Block(opened[0], opened[1], "\n".join(opened[2])))
                opened = None
        elif opened is not None:
            opened[2].append(line)
    assert opened is None, f"{page}: a block is not closed"
    return found


def prose(page: str) -> list[str]:
    """Return the paragraphs of a page, without its blocks."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def pages_with(*languages: str) -> list[str]:
    return [page for page in PAGES if any(b.language in languages for b in blocks(page))]


@pytest.fixture
def workplace(tmp_path) -> Path:
    """Make the files that the pages speak of: two small models and some texts."""
    root = tmp_path
    write_model(root / "path/to/llama", "llama")
    write_model(root / "path/to/bert", "bert")
    write_jsonl(root / "train.jsonl", records(24))
    return root


def run_python(page: str) -> None:
    """Run a page's Python blocks in order, in one namespace, and compare what they print."""
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            run_block(block.text, namespace, f"{page}:{block.line}")


def run_block(code: str, namespace: dict, where: str) -> None:
    """Run a block; each `print(...)  # text` of it must print this text once, in their order.

    Only the block's own calls of print count, since libraries print, too.
    """
    printed = []

    def record(*values, sep=" "):
        printed.append((sys._getframe(1).f_lineno, sep.join(map(str, values))))

    namespace["print"] = record
    exec(compile(code, where, "exec"), namespace)
    expected = []
    for number, line in enumerate(code.splitlines(), 1):
        if match := re.match(r"\s*print\(.*\)  # (.*)$", line):
            expected.append((number, match[1]))
    lines = {number for number, _ in expected}
    assert [entry for entry in printed if entry[0] in lines] == expected, where


def test_what_is_printed_is_compared_in_order():
    run_block("print(0)\nprint(1)  # 1\nprint(2, 3)  # 2 3", {}, "here")
    swapped = "print(2)  # 1\nprint(1)  # 2"
    twice = "for i in 1, 1:\n    print(i)  # 1"
    never = "if False:\n    print(1)  # 1"
    for code in (swapped, twice, never):
        with pytest.raises(AssertionError):
            run_block(code, {}, "here")


def run_shell(page: str, folder: Path) -> None:
    """Run a page's commands in order: `python -m pyfast` in this process, torchrun in its own."""
    from pyfast.cli.main import main

    for block in blocks(page):
        if block.language != "sh":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            command = line.split("  #")[0].strip()
            words = shlex.split(command, comments=True)
            where = f"{page}:{block.line}: {command}"
            if not words or command.startswith(ELSEWHERE):
                continue
            if words[0] == "make":
                assert words[1] in make_targets(), where
            elif words[:3] == ["python", "-m", "pyfast"]:
                assert main(words[3:]) == 0, where
            elif words[:3] == ["python", "-m", "bench"]:
                check_bench(words[3:], folder)
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file(), where
                option = "--check" if words[1] == "docs/make_api.py" else "--help"
                run = subprocess.run(
                    [sys.executable, *words[1:], option], cwd=ROOT, capture_output=True, text=True
                )
                assert run.returncode == 0, f"{where}\n{run.stderr}"
            elif words[0] == "torchrun":
                launcher = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
                path = f"{ROOT}"
                run = subprocess.run(
                    launcher, cwd=folder, capture_output=True, text=True, env=environment(path)
                )
                assert run.returncode == 0, f"{where}\n{run.stderr[-2000:]}"
            else:
                raise AssertionError(f"{where}: a test can not run this")


def check_bench(words: list[str], folder: Path) -> None:
    """Parse the words of `python -m bench` with its own parsers; no bench runs, no page is written.

    An unknown bench, command or option raises SystemExit. DIR, OLD and NEW stand for results.
    """
    import bench.__main__ as command
    from bench import options
    from bench.report import page, readme

    results, output = f"{ROOT}/bench/results/cuda-nvidia-h200", f"{folder}/out.md"
    sample = {"DIR": results, "OLD": results, "NEW": results, "FILE.md": output}
    words = [sample.get(word.strip("[]"), word.strip("[]")) for word in words]
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    if not words:
        return
    if names and names[0] in command.COMMANDS:
        with (
            mock.patch.object(page, "write_page", return_value=output),
            mock.patch.object(readme, "write_atomically"),
            redirect_stdout(io.StringIO()),
        ):
            if status := command.run_command(names[0], words[1:]):
                raise SystemExit(status)
        return
    if unknown := set(names) - set(command.BENCHES):
        raise SystemExit(f"unknown benches: {unknown}")
    modules = {
        name: importlib.import_module(command.BENCHES[name]) for name in names or command.OPS
    }
    peers = {peer: None for module in modules.values() for peer in getattr(module, "PEERS", ())}
    with mock.patch("torch.cuda.is_available", return_value=True):
        for name, module in modules.items():
            options.parse(name, module, [*words[len(names) :], "--out", output], list(peers))


@pytest.mark.parametrize(
    "words", ["nothing", "nf4 --fast", "page DIR --fast", "readme --m", "goals"]
)
def test_wrong_commands_of_the_bench_are_noticed(words, tmp_path):
    with pytest.raises(SystemExit):
        check_bench(words.split(), tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY])
def test_commands_in_backticks_exist(page, tmp_path):
    for code in re.findall(r"`([^`\n]+)`", "\n".join(prose(page))):
        words = code.split()
        if words[:3] == ["python", "-m", "bench"] and "<" not in code:
            check_bench(words[3:], tmp_path)
        elif words[0] == "make" and len(words) > 1:
            assert words[1] in make_targets(), f"{page}: `{code}`"
        elif words[0] == "python" and len(words) > 1 and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), f"{page}: `{code}`"


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def environment(path: str) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.long
@pytest.mark.parametrize("page", pages_with("python", "sh"))
@pytest.mark.filterwarnings("ignore")
def test_code_runs_as_printed(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    run_python(page)
    run_shell(page, workplace)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_a_language_that_is_tested(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}: {block.language!r}"
        if block.language == "json":
            for line in block.text.splitlines():
                json.loads(line)


@pytest.mark.parametrize("page", pages_with("python"))
def test_a_number_in_a_comment_is_printed(page):
    """A comment that tells a result stands behind the print that shows it, where it is compared."""
    for block in blocks(page):
        for line in block.text.splitlines() if block.language == "python" else ():
            code, mark, comment = line.partition("  # ")
            told = re.search(r"\d", comment.replace("4-bit", "").replace("16 bits", ""))
            assert not (mark and told) or code.strip().startswith("print("), f"{page}: {line}"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED])
def test_a_measured_number_has_a_record(page):
    """The record is linked in the same paragraph or table; NOT_MEASURED has the exceptions."""
    text = (ROOT / page).read_text()
    phrases = NOT_MEASURED.get(page, [])
    assert all(phrase in text for phrase in phrases), f"{page}: a phrase of NOT_MEASURED is gone"
    for paragraph in prose(page):
        rest = paragraph
        for phrase in phrases:
            rest = rest.replace(phrase, "")
        if MEASURED.search(rest):
            assert "bench/results/" in paragraph, f"{page}: {paragraph}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", "\n".join(prose(page))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = [
                re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles
            ]
            assert anchor in anchors, f"{page}: {target}"


def is_path(word: str) -> bool:
    """Return whether a word in backticks reads as a file or folder of this repository."""
    return word.startswith(FOLDERS) or ("/" in word and word.endswith(SUFFIXES))


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY])
def test_paths_in_backticks_exist(page):
    """A page names files from the root of the repository, or from its own folder."""
    known = (ROOT, (ROOT / page).parent)
    for code in re.findall(r"`([^`\n]+)`", "\n".join(prose(page))):
        for word in filter(is_path, code.split()):
            path = word.partition("::")[0]
            if "my_op" in path or "<" in path or any(start in path for start in USERS_FILES):
                continue
            assert any(list(folder.glob(path)) for folder in known), f"{page}: `{word}`"


def test_private_names_of_torch_are_in_the_design():
    """The table of docs/design.md has each name, and the files that use it."""
    used = re.compile(
        r"torch\._C\.(?:_autograd\.)?_\w+|forward_ad\._\w+|\b_is_replica\b|\._version\b"
    )
    rows = [
        line for line in (ROOT / "docs/design.md").read_text().splitlines() if "torch, " in line
    ]
    for path in sorted((ROOT / "pyfast").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        code = re.sub(r"(from|import) pyfast\._version.*", "", path.read_text())
        for private in set(used.findall(code)):
            row = [row for row in rows if private.removeprefix("torch.") in row]
            assert any(f"`{name}`" in line for line in row), f"{name}: {private}"


def test_readme_is_one_that_a_newcomer_reads():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
