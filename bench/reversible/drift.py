"""What reversible blocks get wrong as they recompute: the inputs that a backward recovers, and the
gradients by them.

The second stream as the first F was given it in the forward is compared with what F is given at
last, when all other blocks have been undone; the gradients with those of the same network with
stored activations.
"""

import itertools
from collections.abc import Iterable, Sequence

from torch import nn

from bench.measure.peer import Lacks, quiet, reason
from bench.report import tables
from bench.reversible.peers import ReversiblePeer
from bench.reversible.problem import Reversible, Step, errors

ERRORS = "recovered input", "gradients"


class Watched(nn.Module):
    """Keeps what it was first and last given."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.given = inner, []

    def forward(self, x):
        self.given[1:] = [x.detach().clone()]
        return self.inner(x)


def drift(problem: Reversible, peer: ReversiblePeer) -> tuple[float, float]:
    """Of the input, and of the gradients."""
    step = Step(problem)
    step.run(peer.stored(step.blocks))
    right = [grad.clone() for grad in step.grads]
    watched = Watched(step.blocks[0][0])
    step.run(peer.network([(watched, step.blocks[0][1]), *step.blocks[1:]], problem.dtype))
    first, last = watched.given
    return errors([last], [first])[0], errors(step.grads, right)[0]


def measure(
    shape: str,
    dtypes: Sequence[str],
    device: str,
    depths: Sequence[int],
    peers: Iterable[ReversiblePeer],
):
    """A line for each dtype, implementation and depth; whatever goes wrong is its note."""
    found = []
    for dtype, peer, depth in itertools.product(dtypes, peers, depths):
        line = {"dtype": dtype, "impl": peer.name, "blocks": depth}
        try:
            with quiet():
                values = drift(Reversible(shape, dtype, device, depth), peer)
            found.append(line | dict(zip(ERRORS, values)))
        except Lacks:
            continue
        except Exception as error:
            found.append(line | {"note": reason(error)})
    return found


def table(found: list[dict]) -> str:
    lines: dict[tuple, dict] = {}
    for one in found:
        line = lines.setdefault(
            (one["dtype"], one["impl"]), {"dtype": one["dtype"], "impl": one["impl"]}
        )
        errors = " / ".join(f"{one[key]:.1e}" if one[key] else "0" for key in ERRORS if key in one)
        line[f"{one['blocks']} blocks"] = errors or one["note"]
    columns = list(dict.fromkeys(itertools.chain(*lines.values())))
    return f"{' / '.join(ERRORS)}: error\n" + tables.table(list(lines.values()), columns)
