"""README and docs: every code block runs as printed, every link leads somewhere, every number has a record."""

import io
import json
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

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
LANGUAGES = {"python", "sh", "json", "text"}
# What `make packaging` and CI run themselves, in environments of their own.
ELSEWHERE = ("pip install ", "git clone ", "uv pip install ")
# A figure that somebody measured, which may be another one tomorrow.
MEASURED = re.compile(r"\d\s?(ms|us|tokens/s|times as fast|GFLOP/s|GB/s)\b|\b\d+(\.\d+)?x\b")

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
        if block.language != "python":
            continue
        output = io.StringIO()
        with redirect_stdout(output):
            exec(compile(block.text, f"{page}:{block.line}", "exec"), namespace)
        printed = output.getvalue().splitlines()
        for line in block.text.splitlines():
            if match := re.match(r"\s*print\(.*\)  # (.*)$", line):
                assert match[1] in printed, f"{page}:{block.line}: {match[1]!r} is not in {printed}"


def run_shell(page: str, folder: Path) -> None:
    """Run a page's commands in order: `python -m pyfast` in this process, torchrun in its own."""
    from pyfast.cli.main import main

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
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
                assert words[1] in targets, where
            elif words[:3] == ["python", "-m", "pyfast"]:
                assert main(words[3:]) == 0, where
            elif words[:3] == ["python", "-m", "bench"] or words[0] == "python":
                run = subprocess.run(
                    [sys.executable, *words[1:], "--help"], cwd=ROOT, capture_output=True, text=True
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
    """The record is linked in the same paragraph or table."""
    for paragraph in prose(page):
        if MEASURED.search(paragraph):
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


@pytest.mark.parametrize("page", PAGES)
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
