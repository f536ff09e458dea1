"""The weight map: which arrays on disk each parameter is made of. Reading and writing both follow it."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class WeightMapping(NamedTuple):
    """A parameter and its parts on disk.

    The parameter stacks its parts on leading axes [L] or [L, E], and concatenates several names on the last axis.
    """

    path: str  # of the parameter, "a/b/c"
    names: tuple[str, ...]  # templates of names on disk, with {layer} and {expert}
    shape: tuple[int, ...]  # of one part on disk
    transposed: bool = False  # the last two axes are [out, in] on disk and [in, out] in the parameter
    layers: range = range(0)  # numbers of the stacked layers; empty: not stacked
    num_experts: int = 0  # stacked experts; 0: the experts have no separate parts
    quantisable: bool = False  # a matrix of a layer, which a quantised backbone stores as integers

    @property
    def stack(self) -> tuple[int, ...]:  # leading axes: (), [L] or [L, E]
        return tuple(size for size in (len(self.layers), self.num_experts) if size)

    @property
    def part_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-2], *self.shape[:-3:-1]) if self.transposed else self.shape

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        *leading, last = self.part_shape
        return (*self.stack, *leading, last * len(self.names))

    def parts(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yields (name on disk, start index in the parameter) for each part."""
        inner = len(self.part_shape) - 1
        for position in itertools.product(*map(range, self.stack)):
            indices = {"layer": self.layers[position[0]]} if position else {}
            indices |= {"expert": position[1]} if self.num_experts else {}
            for i, name in enumerate(self.names):
                yield name.format(**indices), (*position, *[0] * inner, i * self.part_shape[-1])

    def disassemble(self, parameter: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name on disk, contiguous array) for each part of the parameter."""
        for name, start in self.parts():
            stacked = len(self.stack)
            part = parameter[(*start[:stacked], ..., slice(start[-1], start[-1] + self.part_shape[-1]))]
            yield name, np.ascontiguousarray(part.swapaxes(-1, -2) if self.transposed else part)
