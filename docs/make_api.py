"""Write docs/api.md from the docstrings of the public names.

Run `python docs/make_api.py`; with `--check` it only exits with 1 where the page would change.
"""

import doctest
import inspect
import re
import sys
from pathlib import Path

import pyfast
import pyfast.hf

PAGE = Path(__file__).with_name("api.md")
GROUPS = {
    "4-bit weights": "nf4_quantize nf4_dequantize nf4_linear NF4Weight NF4Linear quantize",
    "LoRA": "LoRAConfig add_lora LoRALinear lora_linear lora_linears multi_lora_linear Projection "
    "row_squares",
    "Bottleneck adapters": "AdapterConfig add_adapters Adapter adapter",
    "Models with adapters": "set_adapter remove_adapter mixed_batch merge unmerge save_adapter "
    "load_adapter select summary CheckpointError",
    "Attention over long texts": "lsh_attention lsh_buckets LSH_PRESETS LSHSelfAttention LSHCache "
    "local_attention LocalSelfAttention LocalCache",
    "Reversible blocks and chunks": "reversible ReversibleSequence chunked_feed_forward "
    "ChunkedFeedForward chunked_cross_entropy",
    "Reformer": "Reformer ReformerConfig ReformerCache",
    "Hugging Face": "hf.load_quantized hf.NF4Config hf.patch hf.unpatch hf.Patched",
    "Definitions": "reference",
}
HEAD = """# API

<!-- Written by docs/make_api.py from the docstrings. Change those, not this page. -->

Every example on this page begins with these imports:

```python
import torch
from torch import nn

import pyfast
import pyfast.hf
```
"""
NOTES = {
    "LSH_PRESETS": "A dict of the presets of `lsh_attention`, by name: `trax`, `hf`, `lucidrains` "
    "and `paper`. Each holds the choices in which these implementations of the Reformer differ.",
    "reference": "Every op once more in plain torch, as `pyfast.reference.<op>` with the same "
    "arguments. This is the specification: read it to know what an op computes. It runs in any "
    "dtype, float64 included.",
}


def public(name: str):
    """Return the object of a public name; `hf.patch` is of `pyfast.hf`."""
    value = pyfast
    for part in name.split("."):
        value = getattr(value, part)
    return value


def signature(name: str, value) -> str:
    """Return the call as one reads it: annotations shortened, an argument a line if it is long."""
    parameters = list(inspect.signature(value).parameters.values())
    words, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            starred = True
            words.append("*")
        text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        starred |= text == "*"
        text += parameter.name
        if parameter.default is not parameter.empty:
            text += f"={parameter.default!r}"
        words.append(text)
    line = f"pyfast.{name}({', '.join(words)})"
    return line if len(line) <= 100 else f"pyfast.{name}(\n    " + ",\n    ".join(words) + ",\n)"


def sections(value) -> dict[str, str]:
    """Split a docstring: the text before any section is "", then Args, Returns, Raises, Example."""
    text = inspect.cleandoc(value.__doc__ or "")
    parts = re.split(
        r"^(Args|Returns|Raises|Example|Attributes|Yields|Note):\n", text, flags=re.MULTILINE
    )
    result = {"": parts[0].strip()}
    for title, body in zip(parts[1::2], parts[2::2]):
        result[title] = inspect.cleandoc("\n" + body).strip("\n")
    return result


def items(body: str) -> list[str]:
    """Turn `name: text` entries, whose further lines are indented, into list items."""
    lines = []
    for line in body.splitlines():
        if line[:1].strip():
            name, colon, rest = line.partition(":")
            lines.append(f"- `{name}`:{rest}" if colon else f"- {line}")
        elif line.strip():
            lines.append(f"  {line.strip()}")
    return lines


def code(body: str) -> str:
    """Turn a doctest into plain code; what it shows becomes a comment behind a print."""
    lines = []
    for example in doctest.DocTestParser().get_examples(body):
        source, shown = example.source.rstrip("\n"), example.want.strip()
        if shown and "\n" not in shown:
            if not source.splitlines()[-1].strip().startswith("print("):
                # A string prints without its quotes, and `a, b` as two arguments.
                shape = {"'": "print(repr({}))", '"': "print(repr({}))", "(": "print(({}))"}
                source = shape.get(shown[0], "print({})").format(source)
            source += f"  # {shown}"
        lines.append(source)
    return "\n".join(lines)


def entry(name: str) -> str:
    """Return the section of one name."""
    value = public(name)
    if name in NOTES:
        return f"### {name}\n\n{NOTES[name]}\n"
    parts = sections(value)
    text = [f"### {name}", ""]
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        text += ["```text", signature(name, value), "```", ""]
    text += [parts[""], ""]
    for title in ("Args", "Attributes"):
        if title in parts:
            text += [
                "Arguments:" if title == "Args" else "Attributes:",
                "",
                *items(parts[title]),
                "",
            ]
    if "Returns" in parts:
        text += [f"Returns: {' '.join(parts['Returns'].split())}", ""]
    if "Yields" in parts:
        text += [f"Yields: {' '.join(parts['Yields'].split())}", ""]
    if "Raises" in parts:
        text += ["Raises:", "", *items(parts["Raises"]), ""]
    if "Example" in parts:
        text += ["```python", code(parts["Example"]), "```", ""]
    return "\n".join(text)


def page() -> str:
    groups = []
    for title, names in GROUPS.items():
        entries = "\n".join(entry(name) for name in names.split())
        groups.append(f"## {title}\n\n{entries}")
    return HEAD + "\n" + "\n".join(groups)


def main(words: list[str]) -> int:
    if words == ["--check"]:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
