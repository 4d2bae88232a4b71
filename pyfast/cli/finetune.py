"""The arguments of `finetune` and `predict`, and what comes of them: exit codes and single lines on stderr."""

import argparse
from dataclasses import asdict, fields

from pyfast.adapters.bottleneck.config import STYLES
from pyfast.cli.errors import _check_device, _one_line
from pyfast.finetune import job, methods
from pyfast.finetune.distributed import World
from pyfast.finetune.errors import JobError
from pyfast.finetune.learning_rate import SCHEDULES
from pyfast.finetune.settings import PRECISIONS, Settings

NEEDED = ("model", "data", "out", "task", "method")
RATES = {"full": 5e-5, "select": 5e-5}  # the others train new weights
RATE = 5e-4


def add_finetune(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("what")
    files.add_argument("--model", help="directory of a transformers checkpoint")
    files.add_argument(
        "--data", help=".jsonl or .csv with text and label (lm: text); lm: .txt, too"
    )
    files.add_argument(
        "--eval",
        dest="evaluation",
        help="likewise; default: the data's records of the split 'test'",
    )
    files.add_argument("--out", help="new directory for the result")
    files.add_argument(
        "--resume", metavar="DIR", help="go on with the training of this output directory"
    )
    files.add_argument("--task", choices=job.TASKS)
    files.add_argument("--method", choices=methods.METHODS)
    files.add_argument(
        "--max-length",
        type=int,
        default=256,
        help="tokens of a text, or of lm's blocks (%(default)s)",
    )
    files.add_argument("--allow-pickle", action="store_true", help="read weights that can run code")
    own = parser.add_argument_group("of the method")
    own.add_argument("--rank", type=int, default=16, help="lora, dora, qlora (%(default)s)")
    own.add_argument("--alpha", type=float, default=32.0, help="likewise (%(default)s)")
    own.add_argument(
        "--dropout", type=float, default=0.0, help="likewise, and adapter (%(default)s)"
    )
    names = "likewise: ends of layers' names (all-linear; adapter: where the style has them)"
    own.add_argument("--targets", nargs="+", default=[methods.ALL_LINEAR], help=names)
    own.add_argument(
        "--select", nargs="+", default=[], metavar="PATTERN", help="select: names of what trains"
    )
    own.add_argument("--bottleneck", type=int, default=64, help="adapter (%(default)s)")
    own.add_argument("--style", choices=STYLES, default="houlsby", help="adapter (%(default)s)")
    _add_training(parser.add_argument_group("training"))


def _add_training(group) -> None:
    default = {f.name: f.default for f in fields(Settings)}
    for flag, kind, text in (
        ("epochs", float, "over the data"),
        ("steps", int, "instead of epochs"),
        ("batch", int, "rows of a forward pass, over all processes"),
        ("accumulation", int, "passes a step"),
        ("warmup", float, "steps, or below 1 their share of all"),
        ("weight-decay", float, "of matrices"),
        ("clip", float, "the most that the gradient's norm may be"),
        ("seed", int, "of order, dropout and new weights"),
        ("log-every", int, "steps"),
        ("eval-every", int, "steps; default: an epoch"),
        ("save-every", int, "steps; default: an epoch"),
        (
            "patience",
            int,
            "evaluations without a lower loss before it stops and takes the best weights",
        ),
    ):
        value = default[flag.replace("-", "_")]
        group.add_argument(
            f"--{flag}", type=kind, default=value, help=text + f" ({value})" * (value is not None)
        )
    group.add_argument(
        "--lr", type=float, help=f"highest rate ({RATE:g}; full and select: {RATES['full']:g})"
    )
    group.add_argument(
        "--schedule", choices=SCHEDULES, default=default["schedule"], help="(%(default)s)"
    )
    group.add_argument(
        "--precision", choices=PRECISIONS, default=default["precision"], help="(%(default)s)"
    )
    group.add_argument(
        "--find-lr", action="store_true", help="only test which rate is good; draws the curve"
    )
    group.add_argument(
        "--no-guard", dest="guard", action="store_false", help="go on whatever the loss does"
    )
    group.add_argument(
        "--shard", action="store_true", help="under torchrun: parameters shared out (FSDP2)"
    )
    group.add_argument("--device", help="cpu or cuda; default: what there is")


def run_finetune(args: argparse.Namespace) -> int:
    return _one_line("finetune", lambda: _finetune(args))


def _finetune(args: argparse.Namespace) -> int:
    if args.resume:
        _check_resume(args)
    wanted = None if args.resume else _job(args)
    _check_device(args.device)
    world = World.join(args.device)
    try:
        if args.resume:
            last = job.resume(args.resume, world, args.lr)
        elif args.find_lr:
            return _find_rate(wanted, world)
        else:
            last = job.finetune(wanted, world)
    finally:
        world.leave()
    if world.first:
        figures = [
            f"{key.replace('eval_', '')} {last[key]:.4g}"
            for key in ("eval_loss", "eval_accuracy")
            if key in last
        ]
        print(
            f"written: {args.resume or args.out}"
            + (f"; evaluation: {', '.join(figures)}" if figures else "")
        )
    return 0


def _find_rate(wanted: job.Job, world: World) -> int:
    rate = job.find_rate(wanted, world)
    if rate is None:
        raise JobError("no rate from 1e-07 to 1 lowers the loss; look at the data and the method")
    if world.first:
        print(f"learning rate: {rate:g}")
    return 0


def _check_resume(args: argparse.Namespace) -> None:
    parser = argparse.ArgumentParser()
    add_finetune(parser)
    default = vars(parser.parse_args(["--resume", args.resume])) | {
        "lr": args.lr,
        "device": args.device,
    }
    given = [_flag(name) for name, value in default.items() if getattr(args, name) != value]
    if given:
        raise JobError(
            f"--resume has its settings from {args.resume}; leave out {', '.join(given)}"
        )


def _flag(name: str) -> str:
    return {"evaluation": "--eval", "guard": "--no-guard"}.get(name, f"--{name.replace('_', '-')}")


def _job(args: argparse.Namespace) -> job.Job:
    if missing := [f"--{name}" for name in NEEDED if getattr(args, name) is None]:
        raise JobError(
            f"{', '.join(missing)} missing; a new training needs {', '.join(f'--{n}' for n in NEEDED)}"
        )
    targets = args.targets[0] if args.targets == [methods.ALL_LINEAR] else args.targets
    training = {f.name: getattr(args, f.name) for f in fields(Settings)}
    training["lr"] = RATES.get(args.method, RATE) if args.lr is None else args.lr
    options = {f.name: getattr(args, f.name) for f in fields(methods.Options)} | {
        "targets": targets
    }
    default = asdict(methods.Options(select=[]))
    for name, used in methods.USED_BY.items():
        if options[name] != default[name] and args.method not in used:
            is_given = f"{_flag(name)} is {options[name]}, and the method is {args.method}"
            raise JobError(f"{is_given}; it must be {' or '.join(used)}")
    names = (
        "model",
        "data",
        "out",
        "task",
        "method",
        "evaluation",
        "max_length",
        "shard",
        "allow_pickle",
    )
    given = {name: getattr(args, name) for name in names}
    try:
        return job.Job(**given, options=methods.Options(**options), training=Settings(**training))
    except (ValueError, TypeError) as error:
        option, rest = str(error).split(" ", 1)
        raise JobError(f"{_flag(option)} {rest}") from None
