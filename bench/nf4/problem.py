"""What the NF4 bench computes, and the bytes and FLOPs of that."""

import functools
import math

import torch

from bench.measure.case import BACKWARD, BOTH, FORWARD, Case, Made, largest_error
from bench.measure.peer import Lacks, nbytes
from bench.nf4.peers import layer


class _Weight(Case):
    """One way between 16 bits and 4."""

    flops = 0.0

    @property
    def layer(self):
        return layer(self.shape, self.dtype, self.device)

    def moved(self, made):
        return nbytes(self.layer.source, *self.layer.packed.state)


class Quantize(_Weight):
    op = "quantize"

    def make(self, peer):
        call, decode = peer.quantize(self.layer)
        weight = self.layer.source.clone()
        return Made(lambda: [call(weight)], read=lambda result: [decode(result[0])])

    def define(self, dtype):
        return [self.layer.source.double()], []

    @functools.cached_property
    def limit(self):
        """The error is that of the format."""
        return 1.02 * largest_error([self.layer.exact], self.reference)


class Dequantize(_Weight):
    op = "dequantize"

    def make(self, peer):
        function, weights = peer.dequantize(self.layer)
        return Made(function, weights=weights)

    def define(self, dtype):
        return [self.layer.exact.to(dtype)], []


class Linear(_Weight):
    """y = x W^T at M rows of x; dX = dY W; or both."""

    op = property(
        lambda self: {FORWARD: "linear", BACKWARD: "linear dX", BOTH: "linear fwd+bwd"}[self.step]
    )
    parts = property(lambda self: ("linear dX",) if self.step == BOTH else ())
    flops = property(lambda self: 2.0 * self.passes * self.m * math.prod(self.size))
    rounds_once = True

    def inputs(self):
        rows, cols = self.size
        return [self.normal(1, self.m, cols)], [self.normal(2, self.m, rows)]

    def make(self, peer):
        if self.step != FORWARD and not peer.trains:
            raise Lacks
        function, weights = peer.linear(self.layer)
        return Made(function, *self.inputs(), weights)

    def define(self, dtype):
        (x,), (dy,) = self.inputs()
        weight = (self.layer.exact if dtype == torch.float64 else self.layer.dense).to(dtype)
        return [x.to(dtype) @ weight.T], [dy.to(dtype) @ weight]

    def moved(self, made):
        """The backward does not need x, nor the forward dX."""
        return self.passes * (made.held + nbytes(*made.inputs, *made.slopes))
