"""Errors of reversible blocks that recompute: of recovered inputs, and of gradients.

The input is the second stream as the first F gets it. What F gets in the forward is compared with
what it gets at last, when all other blocks have been undone. The gradients are compared with those
of the same network with stored activations.
"""

import itertools
from collections.abc import Iterable, Sequence

from torch import nn

from bench.measure.peer import MissingOperation, describe_error, silence
from bench.report import tables
from bench.reversible.peers import ReversiblePeer
from bench.reversible.problem import Reversible, Step, norm_errors

ERRORS = "recovered input", "gradients"


class InputRecorder(nn.Module):
    """A module that keeps its first and its last input."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.recorded = inner, []

    def forward(self, x):
        self.recorded[1:] = [x.detach().clone()]
        return self.inner(x)


def measure_drift(problem: Reversible, peer: ReversiblePeer) -> tuple[float, float]:
    """Return the error of the recovered input, and that of the gradients."""
    step = Step(problem)
    step.run(peer.stored(step.blocks))
    exact_grads = [grad.clone() for grad in step.grads]
    recorder = InputRecorder(step.blocks[0][0])
    step.run(peer.network([(recorder, step.blocks[0][1]), *step.blocks[1:]], problem.dtype))
    first, last = recorder.recorded
    return norm_errors([last], [first])[0], norm_errors(step.grads, exact_grads)[0]


def measure(
    shape: str,
    dtypes: Sequence[str],
    device: str,
    depths: Sequence[int],
    peers: Iterable[ReversiblePeer],
) -> list[dict]:
    """Return a row for each dtype, implementation and depth; an error is the row's note."""
    rows = []
    for dtype, peer, depth in itertools.product(dtypes, peers, depths):
        row = {"dtype": dtype, "impl": peer.name, "blocks": depth}
        try:
            with silence():
                values = measure_drift(Reversible(shape, dtype, device, depth), peer)
            rows.append(row | dict(zip(ERRORS, values)))
        except MissingOperation:
            continue
        except Exception as error:
            rows.append(row | {"note": describe_error(error)})
    return rows


def table(rows: list[dict]) -> str:
    """Return a table with a line for each dtype and implementation."""
    lines: dict[tuple, dict] = {}
    for row in rows:
        names = {"dtype": row["dtype"], "impl": row["impl"]}
        line = lines.setdefault(tuple(names.values()), names)
        errors = " / ".join(f"{row[key]:.1e}" if row[key] else "0" for key in ERRORS if key in row)
        line[f"{row['blocks']} blocks"] = errors or row["note"]
    columns = list(dict.fromkeys(itertools.chain(*lines.values())))
    return f"{' / '.join(ERRORS)}: error\n" + tables.table(list(lines.values()), columns)
