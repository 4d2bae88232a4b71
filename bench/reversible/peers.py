"""Ways to run a stack of reversible blocks: each makes a network out of the same modules.

Those that split one tensor into the two streams get one made of both, and its making is part of
their step: it is what their users have at hand, and memcnn empties what it was given.
"""

import functools

import torch
from torch.utils.checkpoint import checkpoint

import pyfast
from bench.measure.peer import Lacks, Peer, by_name, load
from bench.reversible.problem import Network, Pairs, plain


def rounded(blocks: Pairs) -> Network:
    """Plain torch with streams on a grid, as pyfast's exact ones are."""
    return functools.partial(pyfast.reference._reversible, blocks, exact=True)


class ReversiblePeer(Peer):
    plain = staticmethod(plain)  # the same arithmetic in plain torch
    recovers = True  # inputs from outputs

    def network(self, blocks: Pairs, dtype: str) -> Network:
        raise NotImplementedError

    def stored(self, blocks: Pairs) -> Network:
        """The same with stored activations."""
        return self.plain(blocks)


class PyFast(ReversiblePeer):
    """As it comes: exact in 16 bits."""

    name = "pyfast"
    exact: bool | str = "auto"

    def network(self, blocks, dtype):
        if self.exact == (dtype != "fp32"):
            raise Lacks  # that is what "auto" means
        return pyfast.ReversibleSequence(blocks, exact=self.exact)

    def stored(self, blocks):
        return pyfast.ReversibleSequence(blocks, exact=self.exact, store=True)


class Exact(PyFast):
    name = "pyfast-exact"
    plain = staticmethod(rounded)
    exact = True


class Inexact(PyFast):
    name = "pyfast-inexact"
    exact = False


class Int32(PyFast):
    name = "pyfast-int32"
    plain = staticmethod(rounded)
    exact = "int32"


class Torch(ReversiblePeer):
    """Stored activations."""

    name = "torch"
    recovers = False

    def network(self, blocks, dtype):
        return plain(blocks)


class Checkpoint(ReversiblePeer):
    """torch.utils.checkpoint around each block: the streams between blocks are stored."""

    name = "checkpoint"
    recovers = False

    def network(self, blocks, dtype):
        def network(x1, x2):
            for pair in blocks:
                x1, x2 = checkpoint(plain([pair]), x1, x2, use_reentrant=False)
            return x1, x2

        return network


class OneTensor(ReversiblePeer):
    """A network of one tensor that is both streams."""

    def joint(self, blocks: Pairs):
        raise NotImplementedError

    def network(self, blocks, dtype):
        joint = self.joint(blocks)
        return lambda x1, x2: joint(torch.cat([x1, x2], dim=-1)).chunk(2, dim=-1)


class RevTorch(OneTensor):
    name = module = "revtorch"

    def joint(self, blocks):
        library = load(self.module)
        made = [library.ReversibleBlock(f, g, split_along_dim=2) for f, g in blocks]
        return library.ReversibleSequence(torch.nn.ModuleList(made))


class Lucidrains(OneTensor):
    """reformer-pytorch's."""

    name = "lucidrains"
    module = "reformer_pytorch.reversible"

    def joint(self, blocks):
        return load(self.module).ReversibleSequence(
            torch.nn.ModuleList(map(torch.nn.ModuleList, blocks))
        )


class RevLib(OneTensor):
    name = module = "revlib"

    def joint(self, blocks):
        return load(self.module).ReversibleSequential(
            *(half for pair in blocks for half in pair), split_dim=-1
        )


class MemCNN(OneTensor):
    name = module = "memcnn"

    def joint(self, blocks):
        library = load(self.module)
        couplings = [library.AdditiveCoupling(f, g, split_dim=-1) for f, g in blocks]
        return torch.nn.Sequential(*map(library.InvertibleModuleWrapper, couplings))


PEERS = by_name(
    *(PyFast(), Exact(), Int32(), Inexact(), Torch(), Checkpoint()),
    *(RevTorch(), Lucidrains(), RevLib(), MemCNN()),
)
