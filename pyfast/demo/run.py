"""The demo, from texts to report.

A model is pretrained, fine-tuned by every method, switched between two tasks, and stopped when its
learning rate is too high. Then attention, depth and 4-bit weights are measured.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pyfast._version import __version__
from pyfast.demo import measurements, output, report, switching, texts, training
from pyfast.finetune.distributed import World
from pyfast.finetune.errors import JobError

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
    """Sizes of all that the demo trains and measures.

    Args:
        paragraphs: paragraphs of prose to pretrain on.
        repeats: how often the tasks' sentences and the reviews stand among the paragraphs.
        vocabulary: tokens of the tokenizer.
        width: width of the model.
        layers: layers of the model.
        steps: steps of pretraining.
        labels: labeled sentences for the comparison of methods.
        epochs: epochs of fine-tuning.
        lengths: tokens for which attention is measured.
        depths: layers for which the Reformer is measured.
        deep_length: tokens of the Reformer.
        nf4_width: in_features and out_features of the layer in 4 bits.
    """

    paragraphs: int = 1500
    repeats: tuple[int, int] = (4, 15)
    vocabulary: int = 3000
    width: int = 96
    layers: int = 2
    steps: int = 500
    labels: int = 330
    epochs: float = 12.0
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


def run_demo(out: Path, size: Size) -> None:
    """Run the demo and write its report to `out`; after an error `out` is as it was.

    Raises:
        JobError: `out` cannot be written, or transformers is missing.
    """
    begin = time.perf_counter()
    _check_transformers()
    try:
        output.check(out)
        with output.replace_directory(out) as folder:
            machine = {"device": _describe_device(), "torch": torch.__version__}
            machine["pyfast"] = __version__
            print(f"pyfast {__version__} on {machine['device']}, torch {torch.__version__}")
            facts = {"machine": machine} | _train(size, folder, out) | _measure(size)
            facts["seconds"] = time.perf_counter() - begin
            output.write(facts, folder, out)
    except OSError as error:
        raise JobError(f"--out {out} cannot be written: {error.strerror or error}") from None
    print(f"\n{facts['seconds']:.0f} s in all. The report: {out / 'report.html'}")


def _check_transformers() -> None:
    """Raise JobError without transformers, and let it print errors only."""
    try:
        import transformers  # optional
    except ImportError:
        raise JobError(
            "transformers is not installed, and the demo's model is one of its models; "
            "pip install transformers"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# --- trainings ---


def _train(size: Size, folder: Path, out: Path) -> dict:
    """Run all trainings, and return the facts on them."""
    sentiment, topic = texts.read_task("sentiment"), texts.read_task("topic")
    sentiment_labels = sorted({record["label"] for record in sentiment})
    # Each adapter has a head of its own; the heads must be of one size.
    labels = sentiment_labels + sorted({record["label"] for record in topic})
    tasks = {}
    for name, records in (("sentiment", sentiment), ("topic", topic)):
        file = str(texts.DATA / f"{name}.jsonl")
        tasks[name] = training.Task(records, labels, size.epochs, file=file)
    labeled_sentiment = texts.limit_training(sentiment, size.labels)
    task = training.Task(labeled_sentiment, sentiment_labels, size.epochs)
    variants, model = training.make_variants(size.layers), folder / "model"
    lora = next(variant for variant in variants if variant.name == "LoRA")
    with tempfile.TemporaryDirectory() as scratch:
        seen = [r["text"] for r in [*sentiment, *topic] if r["split"] == "train"]
        facts = {"pretraining": _pretrain(size, seen, labels, Path(scratch), model)}
        facts["task"] = task.describe()
        facts["methods"] = _compare(facts["task"], model, Path(scratch), task, variants)
    facts["switching"] = _switch(model, tasks, lora, folder, out)
    facts["learning_rate"] = _try_high_rate(model, task, variants[0])
    return facts


def _pretrain(size: Size, seen: list[str], labels: list[str], scratch: Path, model: Path) -> dict:
    """Pretrain a model; write it untrained to `scratch`, and trained to `model`."""
    _print_title("Pretraining: a small BERT reads Python's documentation, and unlabeled reviews")
    prose, held_out = texts.hold_out(texts.read_prose(size.paragraphs))
    prose += seen * size.repeats[0] + texts.read_reviews() * size.repeats[1]
    tokenizer = texts.make_tokenizer(prose, size.vocabulary)
    torch.manual_seed(training.SEED)
    bert = texts.make_model(tokenizer, size.width, size.layers, labels)
    texts.write_checkpoint(bert, tokenizer, scratch)
    facts = training.pretrain(bert, tokenizer, texts.shuffle(prose), held_out, size.steps)
    texts.write_checkpoint(bert, tokenizer, model)
    _print_line(
        f"{facts['parameters']:,} parameters, {facts['tokens']:,} tokens, "
        f"{facts['tokens_per_second']:,.0f} tokens/s"
    )
    _print_line(
        f"held-out loss {facts['untrained_loss']:.2f} -> {facts['held_out_loss']:.2f} "
        f"in {facts['seconds']:.0f} s"
    )
    return facts


def _compare(
    description: dict,
    model: Path,
    scratch: Path,
    task: training.Task,
    variants: list[training.Variant],
) -> list[dict]:
    _print_title(
        f"Fine-tuning: praise or complaint? {description['train']} sentences to learn from, "
        f"{description['test']} to judge"
    )
    _print_row(report.COLUMNS)
    rows = []
    for row in training.compare_methods(model, scratch, task, variants):
        rows.append(row)
        _print_row(report.make_cells(row))
    _print_line(f"Guessing gets {report.percent(description['chance'])}.")
    _print_line(report.describe_gain(rows))
    return rows


def _switch(
    model: Path,
    tasks: dict[str, training.Task],
    variant: training.Variant,
    folder: Path,
    out: Path,
) -> dict:
    _print_title("Two adapters on one model: is it praise, and what is it about?")
    model_path = str(out.absolute() / "model")
    facts = switching.train_and_switch(model, tasks, variant, folder, model_path, SENTENCES)
    for sentence in facts["sentences"]:
        labels = "".join(f"{sentence[name][0]:12}" for name in tasks)
        _print_line(f"{sentence['text']:54}{labels}")
    accuracies = []
    for name, result in facts["tasks"].items():
        accuracies.append(f"{name} {report.percent(result['accuracy'])}")
    _print_line(
        f"a switch takes {1e3 * facts['switch_seconds']:.2f} ms; "
        f"accuracy on held-out sentences: {', '.join(accuracies)}"
    )
    return facts


def _try_high_rate(model: Path, task: training.Task, variant: training.Variant) -> dict:
    _print_title("A learning rate that is too high")
    facts = training.try_high_rate(model, task, variant, training.RATE_TOO_HIGH)
    _print_line(facts["message"] or f"{facts['rate']:g}: training coped with it")
    if facts["message"]:
        accuracy = report.percent(facts["good_accuracy"])
        _print_line(f"with {facts['good_rate']:g}: accuracy {accuracy}")
    return facts


# --- measurements ---


def _measure(size: Size) -> dict:
    """Measure attention, depth and 4-bit weights, and return the facts on them."""
    device = World.join().device
    facts = {"heads": measurements.HEADS, "attention": [], "depth": []}
    _print_title("Long texts: attention, forward and backward")
    facts["attention"] += measurements.measure_attention(size.lengths, device)
    for line in report.describe_attention(facts["attention"]):
        _print_line(line)
    _print_title("Deep models: activations stored, or recomputed")
    for row in measurements.measure_depth(size.depths, size.deep_length, device):
        facts["depth"].append(row)
        _print_line(report.describe_depth(row))
    _print_title("Large weights: 4 bits")
    facts["four_bits"] = measurements.measure_four_bits(size.nf4_width, (1, 64), device)
    _print_line(report.describe_four_bits(facts["four_bits"]))
    return facts


# --- output ---


def _print_title(text: str) -> None:
    print(f"\n{text}", flush=True)


def _print_line(text: str) -> None:
    print(f"   {text}", flush=True)


def _print_row(cells: tuple[str, ...]) -> None:
    numbers = "".join(f"{cell:>{max(10, len(cell) + 2)}}" for cell in cells[1:])
    _print_line(f"{cells[0]:18}{numbers}")


def _describe_device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"
