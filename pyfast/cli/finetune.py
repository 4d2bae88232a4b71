"""The command `finetune`: its arguments, and the job that they describe."""

import argparse
from dataclasses import asdict, fields

from pyfast.adapters.bottleneck.config import STYLES
from pyfast.cli.errors import DONE, check_device, run_reporting
from pyfast.finetune import job, methods, runs
from pyfast.finetune.distributed import World
from pyfast.finetune.errors import JobError
from pyfast.finetune.learning_rate import SCHEDULES
from pyfast.finetune.settings import PRECISIONS, Settings
from pyfast.nn.linear_layers import ALL_LINEAR

SUMMARY = "fine-tune a transformers checkpoint on your texts"
REQUIRED = ("model", "data", "out", "task", "method")
LEARNING_RATE = 5e-4  # of methods that train new weights
LEARNING_RATES = {"full": 5e-5, "select": 5e-5}  # of methods that train pretrained weights
_FLAGS = {"evaluation": "--eval", "guard": "--no-guard"}  # where they differ from the field's name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `finetune` to its parser."""
    _add_files(parser.add_argument_group("files and task"))
    _add_method(parser.add_argument_group("options of the method"))
    _add_numbers(group := parser.add_argument_group("training"))
    _add_choices(group)


def _add_files(group) -> None:
    text = "directory of the transformers checkpoint to train (required)"
    group.add_argument("--model", metavar="DIR", help=text)
    text = (
        "training data: .jsonl or .csv with the fields text and label; for lm only text, or a .txt "
        "file (required)"
    )
    group.add_argument("--data", metavar="FILE", help=text)
    text = "evaluation data, in the format of --data (default: records of --data with split 'test')"
    group.add_argument("--eval", dest="evaluation", metavar="FILE", help=text)
    text = "directory for the result; it must be new or empty (required)"
    group.add_argument("--out", metavar="DIR", help=text)
    text = "continue the training in this output directory, with its settings; only --lr may change"
    group.add_argument("--resume", metavar="DIR", help=text)
    text = "classify trains a classifier of texts, lm a language model (required)"
    group.add_argument("--task", choices=job.TASKS, help=text)
    text = "what to train: all weights, some of them, or new weights beside them (required)"
    group.add_argument("--method", choices=methods.METHODS, help=text)
    text = "largest number of tokens of a text; for lm of a block of text (default: %(default)s)"
    group.add_argument("--max-length", type=int, default=256, metavar="N", help=text)
    text = "also read pickled weights, which can run code (default: only safetensors)"
    group.add_argument("--allow-pickle", action="store_true", help=text)


def _add_method(group) -> None:
    default = methods.Options()
    text = "lora, dora and qlora: rank of the update (default: %(default)s)"
    group.add_argument("--rank", type=int, default=default.rank, metavar="N", help=text)
    text = "lora, dora and qlora: the update is multiplied by alpha / rank (default: %(default)s)"
    group.add_argument("--alpha", type=float, default=default.alpha, metavar="X", help=text)
    text = "lora, dora, qlora and adapter: dropout probability (default: %(default)s)"
    group.add_argument("--dropout", type=float, default=default.dropout, metavar="P", help=text)
    text = (
        "lora, dora, qlora and adapter: last parts of the names of layers to adapt "
        "(default: all-linear, every linear layer but the head; for adapter: as --style says)"
    )
    group.add_argument("--targets", nargs="+", default=[ALL_LINEAR], metavar="NAME", help=text)
    text = "select: patterns of the names of parameters to train (required for that method)"
    group.add_argument("--select", nargs="+", default=[], metavar="PATTERN", help=text)
    text = "adapter: size of the bottleneck (default: %(default)s)"
    group.add_argument("--bottleneck", type=int, default=default.bottleneck, metavar="N", help=text)
    text = (
        "adapter: houlsby places one after attention and one after the feed-forward layer, "
        "pfeiffer only the latter (default: %(default)s)"
    )
    group.add_argument("--style", choices=STYLES, default=default.style, help=text)
    text = (
        "lora, dora and qlora: compute layers that have one input (q, k, v; gate, up) in one pass "
        "over it; on CUDA only, a CPU computes them separately (default: separately)"
    )
    group.add_argument("--share-inputs", action="store_true", help=text)


def _add_numbers(group) -> None:
    default = {field.name: field.default for field in fields(Settings)}
    for flag, number_type, text in (
        ("epochs", float, "passes over the training data"),
        ("steps", int, "optimizer steps in all (default: as many as --epochs takes)"),
        ("batch", int, "rows (texts or blocks) of a forward pass, over all processes"),
        ("accumulation", int, "forward passes of an optimizer step"),
        ("warmup", float, "steps in which the learning rate rises; below 1, a share of all steps"),
        ("weight-decay", float, "AdamW's weight decay of matrices; vectors have none"),
        ("clip", float, "largest norm of the gradient; a larger one is scaled down to it"),
        ("seed", int, "seed of the order of rows, of dropout and of new weights"),
        ("log-every", int, "steps between two lines of metrics.jsonl"),
        ("eval-every", int, "steps between two evaluations (default: an epoch)"),
        ("save-every", int, "steps between two checkpoints (default: an epoch)"),
        (
            "patience",
            int,
            "stop after so many evaluations without a lower loss, and take the weights of the "
            "best one (default: never stop early)",
        ),
    ):
        value = default[flag.replace("-", "_")]
        if value is not None:
            text += " (default: %(default)s)"
        metavar = "N" if number_type is int else "X"
        group.add_argument(f"--{flag}", type=number_type, default=value, metavar=metavar, help=text)


def _add_choices(group) -> None:
    default = Settings()
    text = (
        f"highest learning rate (default: {LEARNING_RATE:g}; "
        f"full and select: {LEARNING_RATES['full']:g})"
    )
    group.add_argument("--lr", type=float, metavar="X", help=text)
    text = "course of the learning rate after the warmup (default: %(default)s)"
    group.add_argument("--schedule", choices=SCHEDULES, default=default.schedule, help=text)
    text = (
        "fp32 computes in float32, bf16 in bfloat16 by autocast, with frozen weights stored in "
        "bfloat16 (default: %(default)s)"
    )
    group.add_argument("--precision", choices=PRECISIONS, default=default.precision, help=text)
    text = "do not train; test which learning rate is good, print it, and draw the curve"
    group.add_argument("--find-lr", action="store_true", help=text)
    text = "train on when the learning rate is too high (default: stop and say so)"
    group.add_argument("--no-guard", dest="guard", action="store_false", help=text)
    text = "shard parameters over the processes (FSDP2); start them with torchrun"
    group.add_argument("--shard", action="store_true", help=text)
    text = "device to train on, for example cpu or cuda (default: cuda if there is one, else cpu)"
    group.add_argument("--device", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Train, or test learning rates, and return the exit code."""
    return run_reporting(
        "finetune",
        lambda: _finetune(arguments),
        stopped="stopped; finetune --resume DIR continues",
        out_of_memory="a smaller --batch or --max-length takes less",
    )


def _finetune(arguments: argparse.Namespace) -> int:
    if arguments.resume:
        _check_resume(arguments)
    new_job = None if arguments.resume else _make_job(arguments)
    check_device(arguments.device)
    world = World.join(arguments.device)
    try:
        if arguments.find_lr:
            return _find_rate(new_job, world)
        if arguments.resume:
            record = runs.resume(arguments.resume, world, arguments.lr)
        else:
            record = runs.finetune(new_job, world)
    finally:
        world.leave()
    if world.is_first:
        _report(arguments.resume or arguments.out, record)
    return DONE


def _report(out: str, record: dict) -> None:
    """Print where the result is, and what the last evaluation gave."""
    results = []
    for key in ("eval_loss", "eval_accuracy"):
        if key in record:
            results.append(f"{key.removeprefix('eval_')} {record[key]:.4g}")
    evaluation = f"; evaluation: {', '.join(results)}" if results else ""
    print(f"written: {out}{evaluation}")


def _find_rate(new_job: job.Job, world: World) -> int:
    rate = runs.find_rate(new_job, world)
    if rate is None:
        raise JobError("no rate from 1e-07 to 1 lowers the loss; look at the data and the method")
    if world.is_first:
        print(f"learning rate: {rate:g}")
    return DONE


def _check_resume(arguments: argparse.Namespace) -> None:
    """Raise JobError for an argument that `--resume` does not take."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    allowed = vars(parser.parse_args(["--resume", arguments.resume]))
    allowed |= {"lr": arguments.lr, "device": arguments.device}
    refused = [_flag(name) for name in allowed if getattr(arguments, name) != allowed[name]]
    if refused:
        raise JobError(
            f"--resume has its settings from {arguments.resume}; leave out {', '.join(refused)}"
        )


def _flag(name: str) -> str:
    """Return the flag of a field of Job, Options or Settings."""
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def _make_job(arguments: argparse.Namespace) -> job.Job:
    """Return the job that the arguments describe, or raise JobError with the flag to change."""
    if missing := [f"--{name}" for name in REQUIRED if getattr(arguments, name) is None]:
        needed = ", ".join(f"--{name}" for name in REQUIRED)
        raise JobError(f"{', '.join(missing)} missing; a new training needs {needed}")
    options = _take_fields(arguments, methods.Options)
    if options["targets"] == [ALL_LINEAR]:
        options["targets"] = ALL_LINEAR
    _check_used(options, arguments.method)
    training = _take_fields(arguments, Settings)
    if arguments.lr is None:
        training["lr"] = LEARNING_RATES.get(arguments.method, LEARNING_RATE)
    try:
        parts = {"options": methods.Options(**options), "training": Settings(**training)}
        return job.Job(**_take_fields(arguments, job.Job) | parts)
    except (ValueError, TypeError) as error:
        name, rest = str(error).split(" ", 1)
        raise JobError(f"{_flag(name)} {rest}") from None


def _take_fields(arguments: argparse.Namespace, fields_of: type) -> dict[str, object]:
    """Return the arguments that are fields of a dataclass."""
    names = [field.name for field in fields(fields_of)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def _check_used(options: dict[str, object], method: str) -> None:
    """Raise JobError if an option is set that the method does not use."""
    default = asdict(methods.Options(select=[]))
    for name, users in methods.USED_BY.items():
        if options[name] != default[name] and method not in users:
            raise JobError(
                f"{_flag(name)} is {options[name]}, and the method is {method}; "
                f"it must be {' or '.join(users)}"
            )
