"""Implementations of reversible blocks that are compared: each makes a network of the same modules.

Libraries that split one tensor into the two streams get one made of both. Making it is part of
their step: it is what their users have, and memcnn empties the tensor that it is given.
"""

import functools

import torch
from torch.utils.checkpoint import checkpoint

import pyfast
from bench.measure.peer import MissingOperation, Peer, index_by_name, load_module
from bench.reversible.problem import Network, Pairs, store_activations


def store_rounded_activations(blocks: Pairs) -> Network:
    """Return the network of plain torch with streams on a grid, as pyfast's exact ones are."""
    return functools.partial(pyfast.reference._reversible, blocks, exact=True)


class ReversiblePeer(Peer):
    """Base class of the implementations of reversible blocks."""

    plain = staticmethod(store_activations)  # the same arithmetic in plain torch
    recovers_inputs = True

    def network(self, blocks: Pairs, dtype: str) -> Network:
        """Return the network that is measured."""
        raise NotImplementedError

    def stored(self, blocks: Pairs) -> Network:
        """Return the same network with stored activations."""
        return self.plain(blocks)


class PyFast(ReversiblePeer):
    """pyfast's default, which is exact in 16 bits."""

    name = "pyfast"
    exact: bool | str = "auto"

    def network(self, blocks, dtype):
        if self.exact == (dtype != "fp32"):
            raise MissingOperation  # the same as "auto"
        return pyfast.ReversibleSequence(blocks, exact=self.exact)

    def stored(self, blocks):
        return pyfast.ReversibleSequence(blocks, exact=self.exact, store=True)


class Exact(PyFast):
    name = "pyfast-exact"
    plain = staticmethod(store_rounded_activations)
    exact = True


class Inexact(PyFast):
    name = "pyfast-inexact"
    exact = False


class Int32(PyFast):
    name = "pyfast-int32"
    plain = staticmethod(store_rounded_activations)
    exact = "int32"


class Torch(ReversiblePeer):
    """Stored activations."""

    name = "torch"
    recovers_inputs = False

    def network(self, blocks, dtype):
        return store_activations(blocks)


class Checkpoint(ReversiblePeer):
    """torch.utils.checkpoint around each block, which stores the streams between blocks."""

    name = "checkpoint"
    recovers_inputs = False

    def network(self, blocks, dtype):
        def network(x1, x2):
            for pair in blocks:
                x1, x2 = checkpoint(store_activations([pair]), x1, x2, use_reentrant=False)
            return x1, x2

        return network


class OneTensorPeer(ReversiblePeer):
    """Base class of networks whose one tensor is both streams."""

    def joint_network(self, blocks: Pairs):
        raise NotImplementedError

    def network(self, blocks, dtype):
        joint = self.joint_network(blocks)
        return lambda x1, x2: joint(torch.cat([x1, x2], dim=-1)).chunk(2, dim=-1)


class RevTorch(OneTensorPeer):
    name = module = "revtorch"

    def joint_network(self, blocks):
        library = load_module(self.module)
        layers = [library.ReversibleBlock(f, g, split_along_dim=2) for f, g in blocks]
        return library.ReversibleSequence(torch.nn.ModuleList(layers))


class Lucidrains(OneTensorPeer):
    """reformer-pytorch's."""

    name = "lucidrains"
    module = "reformer_pytorch.reversible"

    def joint_network(self, blocks):
        layers = torch.nn.ModuleList(map(torch.nn.ModuleList, blocks))
        return load_module(self.module).ReversibleSequence(layers)


class RevLib(OneTensorPeer):
    name = module = "revlib"

    def joint_network(self, blocks):
        layers = [module for pair in blocks for module in pair]
        return load_module(self.module).ReversibleSequential(*layers, split_dim=-1)


class MemCNN(OneTensorPeer):
    name = module = "memcnn"

    def joint_network(self, blocks):
        library = load_module(self.module)
        couplings = [library.AdditiveCoupling(f, g, split_dim=-1) for f, g in blocks]
        return torch.nn.Sequential(*map(library.InvertibleModuleWrapper, couplings))


PEERS = index_by_name(
    *(PyFast(), Exact(), Int32(), Inexact(), Torch(), Checkpoint()),
    *(RevTorch(), Lucidrains(), RevLib(), MemCNN()),
)
