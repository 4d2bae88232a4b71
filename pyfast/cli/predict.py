"""The command `predict`."""

import argparse

import torch

from pyfast.cli.errors import _check_device, _one_line
from pyfast.finetune import predict


def add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="directory of the model that was trained; default: where it was"
    )
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="output directory of finetune"
    )
    parser.add_argument("--tokens", type=int, default=40, help="lm: how many to add (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("texts", nargs="+", metavar="TEXT")


def run_predict(args: argparse.Namespace) -> int:
    return _one_line("predict", lambda: _predict(args))


def _predict(args: argparse.Namespace) -> int:
    _check_device(args.device)
    trained = predict.load(args.adapter, args.model, args.device)
    if trained.labels is None:
        for text in predict.continue_texts(trained, args.texts, args.tokens):
            print(text)
    else:
        for text, (label, probability) in zip(args.texts, predict.classify(trained, args.texts)):
            print(f"{label}\t{probability:.3f}\t{text}")
    return 0
