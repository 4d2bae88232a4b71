"""Cases of the NF4 bench: what they compute, and the bytes and FLOPs of that."""

import functools
import math

import torch

from bench.measure.case import BACKWARD, BOTH, FORWARD, Case, Instance, largest_error
from bench.measure.peer import MissingOperation, count_bytes
from bench.nf4.layer import get_layer


class _WeightCase(Case):
    """Base class of the cases over one weight; its flops and bytes are those of a conversion."""

    flops = 0.0

    @property
    def layer(self):
        return get_layer(self.shape, self.dtype, self.device)

    def moved_bytes(self, instance):
        return count_bytes(self.layer.source, *self.layer.packed.state)


class Quantize(_WeightCase):
    """Case that quantizes a weight from 16 bits to 4."""

    op = "quantize"

    def make(self, peer):
        call, decode = peer.quantize(self.layer)
        weight = self.layer.source.clone()
        return Instance(lambda: [call(weight)], decode=lambda result: [decode(result[0])])

    def define(self, dtype):
        return [self.layer.source.double()], []

    @functools.cached_property
    def limit(self):
        """Return the error of the format itself, and 2 % more."""
        return 1.02 * largest_error([self.layer.exact], self.reference)


class Dequantize(_WeightCase):
    """Case that dequantizes a weight from 4 bits to 16."""

    op = "dequantize"

    def make(self, peer):
        function, weights = peer.dequantize(self.layer)
        return Instance(function, weights=weights)

    def define(self, dtype):
        return [self.layer.exact.to(dtype)], []


class Linear(_WeightCase):
    """Case of a linear layer: y = x W^T at M rows of x; dX = dY W; or both."""

    op = property(
        lambda self: {FORWARD: "linear", BACKWARD: "linear dX", BOTH: "linear fwd+bwd"}[self.step]
    )
    parts = property(lambda self: ("linear dX",) if self.step == BOTH else ())
    flops = property(lambda self: 2.0 * self.passes * self.m * math.prod(self.size))
    rounds_once = True

    def draw_tensors(self):
        """Return x and dY, each in a list."""
        rows, cols = self.size
        return [self.draw_normal(1, self.m, cols)], [self.draw_normal(2, self.m, rows)]

    def make(self, peer):
        if self.step != FORWARD and not peer.has_backward:
            raise MissingOperation
        function, weights = peer.linear(self.layer)
        return Instance(function, *self.draw_tensors(), weights)

    def define(self, dtype):
        (x,), (dy,) = self.draw_tensors()
        weight = (self.layer.exact if dtype == torch.float64 else self.layer.dense).to(dtype)
        return [x.to(dtype) @ weight.T], [dy.to(dtype) @ weight]

    def moved_bytes(self, instance):
        """Return the bytes that must move; the backward needs no x, and the forward no dX."""
        activations = count_bytes(*instance.inputs, *instance.output_grads)
        return self.passes * (instance.held_bytes + activations)
