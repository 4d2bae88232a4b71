"""The demo's texts, a vocabulary learned from them, and a model that reads them.

Most of the texts are prose that comes with Python.
"""

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
_LETTERS = 0.72  # least share of letters in a paragraph; code and tables have fewer
_UNKNOWN, _PAD, _END, _MASK = _SPECIAL = ("<unk>", "<pad>", "</s>", "<mask>")
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}


# --- texts ---


def read_prose(count: int) -> list[str]:
    """Return at most `count` paragraphs of Python's documentation.

    First come those of the language reference (pydoc_data.topics), then docstrings of the library.
    """
    from pydoc_data.topics import topics  # large, and only the demo needs it

    paragraphs: dict[str, None] = {}  # a set that keeps its order
    for text in topics.values():
        paragraphs |= dict.fromkeys(_split_prose(text))
    modules = sorted(_library_modules())
    random.Random(0).shuffle(modules)
    with Progress("   read", len(modules)) as bar:
        for path in modules:
            if len(paragraphs) >= count:
                break
            for text in _docstrings(path):
                paragraphs |= dict.fromkeys(_split_prose(text))
            bar.step(f"{len(paragraphs):,} paragraphs")
    return list(paragraphs)[:count]


def _split_prose(text: str) -> Iterator[str]:
    """Yield the paragraphs of a text that are prose, not code or tables."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split()).strip(" *")
        words = re.findall(r"[A-Za-z']+", paragraph)
        if len(words) >= 8 and sum(map(len, words)) >= _LETTERS * len(paragraph):
            yield paragraph


def _library_modules() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        if not _SKIPPED & set(path.relative_to(root).parts):
            yield path


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # some modules are broken on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def hold_out(paragraphs: list[str]) -> tuple[list[str], list[str]]:
    """Return all paragraphs but every fortieth, and every fortieth."""
    training = [paragraph for i, paragraph in enumerate(paragraphs) if i % 40]
    return training, paragraphs[::40]


def read_task(name: str) -> list[dict]:
    """Return the records of "sentiment" or "topic", each with text, label and split."""
    lines = (DATA / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_reviews() -> list[str]:
    """Return texts of a few sentences that hold an opinion and have no label."""
    return (DATA / "reviews.txt").read_text().splitlines()


def limit_training(records: list[dict], count: int) -> list[dict]:
    """Return all test records and `count` training records, the same number of each label."""
    labels = sorted({record["label"] for record in records})
    chosen = []
    for label in labels:
        of_label = [r for r in records if r["split"] == "train" and r["label"] == label]
        chosen += of_label[: count // len(labels)]
    return [*chosen, *(record for record in records if record["split"] == "test")]


def shuffle(texts: list[str]) -> list[str]:
    """Return the texts in an order that is random, and always the same."""
    return random.Random(0).sample(texts, len(texts))


# --- the model and its input ---


def make_tokenizer(texts: Iterable[str], vocabulary: int):
    """Learn a tokenizer of lower-case word pieces from texts; it ends a text with the end token."""
    # optional packages
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    splits = [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(_SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = (_END, tokenizer.token_to_id(_END))
    tokenizer.post_processor = TemplateProcessing(single=f"$A {_END}", special_tokens=[end])
    names = {"unk_token": _UNKNOWN, "pad_token": _PAD, "eos_token": _END, "mask_token": _MASK}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_model(tokenizer, width: int, layers: int, labels: Sequence[str]):
    """Return an untrained ModernBERT with a head for masked language modeling."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM  # optional

    end = tokenizer.eos_token_id
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        layer_types=["full_attention"] * layers,
        classifier_pooling="mean",
        initializer_range=0.08,  # about 1 / sqrt(width); with less, learning begins late
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end,
        bos_token_id=end,
        cls_token_id=end,
        sep_token_id=end,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    return ModernBertForMaskedLM(config)


def write_checkpoint(model, tokenizer, folder: Path) -> None:
    """Write a model and its tokenizer as a transformers checkpoint."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class MaskedDataset(Dataset):
    """Rows of tokens with a share masked, other tokens each time; the masked ones are the targets.

    Args:
        tokens: the token ids of each row.
        pad: the token id that fills a batch's shorter rows.
        mask: the token id that stands for a masked token.
    """

    SHARE = 0.3

    def __init__(self, tokens: Sequence[list[int]], pad: int, mask: int) -> None:
        super().__init__(tokens, None, pad)
        self.mask = mask

    def _count_masked(self, row: int) -> int:
        return max(1, round(self.SHARE * len(self.tokens[row])))

    def count_targets(self, rows: Sequence[int]) -> int:
        return sum(map(self._count_masked, rows))

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Return the model's arguments and the targets; the trainer has seeded torch before."""
        inputs, _ = super().batch(rows, torch.device("cpu"))
        ids, targets = inputs["input_ids"], torch.full_like(inputs["input_ids"], IGNORED)
        for i, row in enumerate(rows):
            masked = torch.randperm(len(self.tokens[row]))[: self._count_masked(row)]
            targets[i, masked] = ids[i, masked]
            ids[i, masked] = self.mask
        return {name: value.to(device) for name, value in inputs.items()}, targets.to(device)
