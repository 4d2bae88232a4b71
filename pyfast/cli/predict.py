"""The command `predict`: label texts, or continue them, with a fine-tuned model."""

import argparse

from pyfast.cli.errors import DONE, check_device, default_device, run_reporting
from pyfast.finetune import predict

SUMMARY = "label texts, or continue them, with a model that finetune trained"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `predict` to its parser."""
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="output directory of finetune (required)"
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="directory of the model that was fine-tuned (default: where finetune found it)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=40,
        metavar="N",
        help="number of tokens that a language model adds to a text (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default=default_device(),
        help="device to run on, for example cpu or cuda:0 (default here: %(default)s)",
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="text to label or to continue")


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each text and return the exit code."""
    return run_reporting("predict", lambda: _predict(arguments))


def _predict(arguments: argparse.Namespace) -> int:
    check_device(arguments.device)
    texts = arguments.texts
    trained = predict.load(arguments.adapter, arguments.model, arguments.device)
    if trained.labels is None:
        for text in predict.continue_texts(trained, texts, arguments.tokens):
            print(text)
    else:
        for text, (label, probability) in zip(texts, predict.classify(trained, texts)):
            print(f"{label}\t{probability:.3f}\t{text}")
    return DONE
