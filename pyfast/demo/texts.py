"""The demo's texts: prose that comes with Python, a vocabulary learned from it, and a model that reads it."""

import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyfast._support.progress import Progress
from pyfast.finetune.data import IGNORED, Dataset

DATA = Path(__file__).parent / "data"
_PROSE = 0.72  # the least share of letters in a paragraph that is not code or a table
_UNKNOWN, _PAD, _END, _MASK = _SPECIAL = ("<unk>", "<pad>", "</s>", "<mask>")
_TESTS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}


def read_prose(size: int) -> list[str]:
    """So many paragraphs at most: of Python's reference (pydoc_data.topics), then of the library's docstrings."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for text in topics.values():
        found |= dict.fromkeys(_paragraphs(text))
    modules = sorted(_modules())
    random.Random(0).shuffle(modules)
    with Progress("   read", len(modules)) as bar:
        for path in modules:
            if len(found) >= size:
                break
            for text in _docstrings(path):
                found |= dict.fromkeys(_paragraphs(text))
            bar.step(f"{len(found):,} paragraphs")
    return list(found)[:size]


def _paragraphs(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split()).strip(" *")
        words = re.findall(r"[A-Za-z']+", paragraph)
        if len(words) >= 8 and sum(map(len, words)) >= _PROSE * len(paragraph):
            yield paragraph


def _modules() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        if not _TESTS & set(path.relative_to(root).parts):
            yield path


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # some are there to be broken
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def split(paragraphs: list[str]) -> tuple[list[str], list[str]]:
    """All but every fortieth, and those."""
    held_out = paragraphs[::40]
    return [p for i, p in enumerate(paragraphs) if i % 40], held_out


def read_task(name: str) -> list[dict]:
    """The records of sentiment or topic: text, label, split."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def read_reviews() -> list[str]:
    """Texts of a few sentences with an opinion, and no label."""
    return (DATA / "reviews.txt").read_text().splitlines()


def labeled(records: list[dict], count: int) -> list[dict]:
    """All to judge by, and so many to learn from, as many of each label."""
    labels, found = {r["label"] for r in records}, []
    for label in sorted(labels):
        found += [r for r in records if r["split"] == "train" and r["label"] == label][
            : count // len(labels)
        ]
    return [*found, *(r for r in records if r["split"] == "test")]


def shuffled(texts: list[str]) -> list[str]:
    return random.Random(0).sample(texts, len(texts))


def make_tokenizer(texts: Iterable[str], vocabulary: int):
    """Pieces of words, in lower case, learned from the texts; a text ends in the end token."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    made.decoder = decoders.Metaspace()
    options = {"special_tokens": list(_SPECIAL), "show_progress": False}
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, **options))
    end = made.token_to_id(_END)
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, end)]
    )
    names = {"unk_token": _UNKNOWN, "pad_token": _PAD, "eos_token": _END, "mask_token": _MASK}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def make_model(tokenizer, width: int, layers: int, labels: Sequence[str]):
    """A ModernBERT that has learned nothing."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    end = tokenizer.eos_token_id
    return ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            layer_types=["full_attention"] * layers,
            classifier_pooling="mean",
            initializer_range=0.08,  # about 1 / sqrt(width); with less, it takes long to begin
            pad_token_id=tokenizer.pad_token_id,
            **dict.fromkeys(("eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), end),
            id2label=dict(enumerate(labels)),
            label2id={name: i for i, name in enumerate(labels)},
        )
    )


class Masked(Dataset):
    """Token lists of which a share is hidden, other tokens each time, and to be guessed from those around them."""

    SHARE = 0.3

    def __init__(self, tokens: Sequence[list[int]], pad: int, mask: int) -> None:
        super().__init__(tokens, None, pad)
        self.mask = mask

    def _hidden(self, row: int) -> int:
        return max(1, round(self.SHARE * len(self.tokens[row])))

    def targets(self, rows: Sequence[int]) -> int:
        return sum(map(self._hidden, rows))

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """The trainer has seeded what is drawn here."""
        inputs, _ = super().batch(rows, torch.device("cpu"))
        ids, targets = inputs["input_ids"], torch.full_like(inputs["input_ids"], IGNORED)
        for i, row in enumerate(rows):
            at = torch.randperm(len(self.tokens[row]))[: self._hidden(row)]
            targets[i, at] = ids[i, at]
            ids[i, at] = self.mask
        return {name: value.to(device) for name, value in inputs.items()}, targets.to(device)


def write_checkpoint(model, tokenizer, folder: Path) -> None:
    """As transformers reads it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
