"""The demo: a model pretrained, fine-tuned in every way, switched between two tasks, caught learning too fast."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pyfast import __version__
from pyfast.demo import measurements, page, report, texts, training
from pyfast.finetune.distributed import World
from pyfast.finetune.errors import JobError
from pyfast.finetune.output_files import write_json
from pyfast.formats import file_io

NAMES = {
    "report.html",
    "table.md",
    "metrics.json",
    "charts",
    "model",
    "sentiment",
    "topic",
}  # all that it leaves
SENTENCES = (
    "The noodles were fresh and the cook was kind.",
    "The soup was cold and the bread was stale.",
    "The new phone is fast, and its screen is lovely.",
    "The update is a mess and the program crashes.",
    "The island is beautiful and the hotel was charming.",
    "Our train was dirty, slow and two hours late.",
)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    paragraphs: int = 1500
    repeats: tuple[int, int] = (
        4,
        15,
    )  # of the tasks' sentences and of the reviews, among the paragraphs
    vocabulary: int = 3000
    width: int = 96
    layers: int = 2
    steps: int = 500  # of pretraining
    labels: int = 330  # of sentences, to compare methods
    epochs: float = 12.0  # of fine-tuning
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    depths: tuple[int, ...] = (2, 6, 12)
    deep_length: int = 2048
    nf4_width: int = 4096


QUICK = Size(
    paragraphs=200,
    repeats=(1, 1),
    vocabulary=1024,
    width=32,
    steps=30,
    labels=40,
    epochs=1.0,
    lengths=(256, 512),
    depths=(2, 4),
    deep_length=256,
    nf4_width=256,
)


def run(out: Path, quick: bool = False) -> int:
    """The exit code. What goes wrong for a reason that its user can change is one line, and nothing is written."""
    try:
        _demo(out, QUICK if quick else Size())
    except KeyboardInterrupt:
        print("\npyfast demo: stopped; nothing was written", file=sys.stderr)
        return 130
    except JobError as error:
        print(f"pyfast demo: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"pyfast demo: --out {out} cannot be written: {error.strerror or error}",
            file=sys.stderr,
        )
        return 2
    return 0


def _demo(out: Path, size: Size) -> None:
    begin = time.perf_counter()
    _check(out)
    with _aside(out) as folder:
        machine = {"device": _device(), "torch": torch.__version__, "pyfast": __version__}
        print(f"pyfast {__version__} on {machine['device']}, torch {torch.__version__}")
        facts = {"machine": machine} | _trainings(size, folder, out) | _measurements(size)
        facts["seconds"] = time.perf_counter() - begin
        _write(facts, folder, out)
    print(f"\n{facts['seconds']:.0f} s in all. The report: {out / 'report.html'}")


# --- the directory ---


def _check(out: Path) -> None:
    """All that can be told before the work."""
    try:
        import transformers
    except ImportError:
        why = "transformers is not installed, and the demo's model is one of its"
        raise JobError(f"{why}; pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if out.exists() and not out.is_dir():
        raise JobError(f"--out {out} is a file; it must be a directory, or new")
    if out.exists() and (others := sorted(set(os.listdir(out)) - NAMES)):
        raise JobError(
            f"--out {out} holds {others[0]}, which is no demo's; it must be new, empty or an earlier demo's"
        )


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder that takes the place of `out` when all is in it; after an error or Ctrl-C `out` is as it was."""
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=parent) as aside:
        new, old = Path(aside) / "new", Path(aside) / "old"
        new.mkdir()
        yield new
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
        file_io.sync(parent)


def _write(facts: dict, folder: Path, out: Path) -> None:
    write_json(folder / "metrics.json", facts)
    (folder / "charts").mkdir()
    for name, chart in report.charts(facts).items():
        (folder / "charts" / f"{name}.svg").write_text(chart)
    (folder / "table.md").write_text(report.markdown(facts))
    (folder / "report.html").write_text(page.html(facts, str(out)))


# --- what it does, and says of it ---


def _trainings(size: Size, folder: Path, out: Path) -> dict:
    sentiment, topic = texts.read_task("sentiment"), texts.read_task("topic")
    labels = [sorted({r["label"] for r in records}) for records in (sentiment, topic)]
    both = [*labels[0], *labels[1]]  # each adapter has a head of its own, which must be of one size
    ways, model = training.ways(size.layers), folder / "model"
    lora = next(way for way in ways if way.name == "LoRA")
    task = training.Task(texts.labeled(sentiment, size.labels), labels[0], size.epochs)
    tasks = {
        "sentiment": training.Task(sentiment, both, size.epochs),
        "topic": training.Task(topic, both, size.epochs),
    }
    with tempfile.TemporaryDirectory() as scratch:
        known = [r["text"] for r in [*sentiment, *topic] if r["split"] == "train"]
        facts = {
            "pretraining": _pretrain(size, known, both, Path(scratch), model),
            "task": task.described(),
        }
        facts["methods"] = _compare(facts["task"], model, Path(scratch), task, ways)
    facts["switching"] = _switch(model, tasks, lora, folder, out)
    facts["learning_rate"] = _too_high(model, task, ways[0])
    return facts


def _pretrain(size: Size, known: list[str], labels: list[str], scratch: Path, model: Path) -> dict:
    _title("Pretraining: a small BERT reads Python's documentation, and reviews without labels")
    prose, held_out = texts.split(texts.read_prose(size.paragraphs))
    own = [*known * size.repeats[0], *texts.read_reviews() * size.repeats[1]]
    tokenizer = texts.make_tokenizer([*prose, *own], size.vocabulary)
    torch.manual_seed(training.SEED)
    bert = texts.make_model(tokenizer, size.width, size.layers, labels)
    texts.write_checkpoint(bert, tokenizer, scratch)
    found = training.pretrain(bert, tokenizer, texts.shuffled([*prose, *own]), held_out, size.steps)
    texts.write_checkpoint(bert, tokenizer, model)
    _say(
        f"{found['parameters']:,} parameters, {found['tokens']:,} tokens, {found['tokens_per_second']:,.0f} tokens/s"
    )
    _say(
        f"held-out loss {found['untrained_loss']:.2f} -> {found['held_out_loss']:.2f} in {found['seconds']:.0f} s"
    )
    return found


def _compare(
    described: dict, model: Path, scratch: Path, task: training.Task, ways: list[training.Way]
) -> list[dict]:
    _title(
        f"Fine-tuning: praise or complaint? {described['train']} sentences to learn, {described['test']} to judge"
    )
    _row(report.COLUMNS)
    rows = []
    for row in training.compare(model, scratch, task, ways):
        rows.append(row)
        _row(report.cells(row))
    _say(f"Guessing: {report.percent(described['chance'])}.")
    _say(report.gain({"methods": rows}))
    return rows


def _row(cells: tuple[str, ...]) -> None:
    _say(f"{cells[0]:18}" + "".join(f"{cell:>{max(10, len(cell) + 2)}}" for cell in cells[1:]))


def _switch(
    model: Path, tasks: dict[str, training.Task], way: training.Way, folder: Path, out: Path
) -> dict:
    _title("Two adapters on one model: how is it meant, and what is it about?")
    found = training.switch(model, tasks, way, folder, str(out.absolute() / "model"), SENTENCES)
    for sentence in found["sentences"]:
        _say(f"{sentence['text']:54}" + "".join(f"{sentence[name][0]:12}" for name in tasks))
    right = ", ".join(
        f"{name} {report.percent(t['accuracy'])}" for name, t in found["tasks"].items()
    )
    _say(
        f"a switch takes {1e3 * found['switch_seconds']:.2f} ms; right on held-out sentences: {right}"
    )
    return found


def _too_high(model: Path, task: training.Task, way: training.Way) -> dict:
    _title("A learning rate too high")
    found = training.too_high(model, task, way, training.TOO_HIGH)
    _say(found["message"] or f"{found['rate']:g}: training coped")
    if found["message"]:
        _say(f"with {found['good_rate']:g}: accuracy {report.percent(found['good_accuracy'])}")
    return found


def _measurements(size: Size) -> dict:
    device = World.join().device
    facts = {"heads": measurements.HEADS, "attention": [], "depth": []}
    _title("Long texts: attention, forward and backward")
    for row in measurements.attention(size.lengths, device):
        facts["attention"].append(row)
    for text in report.attention_lines(facts["attention"]):
        _say(text)
    _title("Deep models: activations stored, or computed again")
    for row in measurements.depth(size.depths, size.deep_length, device):
        facts["depth"].append(row)
        _say(report.depth_line(row))
    _title("Large weights: 4 bits")
    facts["four_bits"] = measurements.four_bits(size.nf4_width, (1, 64), device)
    _say(report.four_bits_line(facts["four_bits"]))
    return facts


def _title(text: str) -> None:
    print(f"\n{text}", flush=True)


def _say(text: str) -> None:
    print(f"   {text}", flush=True)


def _device() -> str:
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads"
    )
