"""One table row per parameter: which tensors on disk it is made of. Reading and writing are both this table."""

import itertools
from typing import NamedTuple

import numpy as np


class Tensor(NamedTuple):
    """A parameter of ours and its parts on disk.

    `names` are templates over {layer} and {expert}; the parameter stacks their values on leading axes [L] or [L, E]
    and joins several names on the last axis. `shape` is that of one tensor on disk; `transposed` there, the last two
    axes are [out, in], and [in, out] in the parameter.
    """

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    layers: range = range(0)  # the layer numbers that are stacked; none: not stacked
    experts: int = 0  # 0: the experts have no tensors of their own
    quantisable: bool = False  # a matrix of a layer, which a quantised backbone holds as integers

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes: () or [L] or [L, E]."""
        return tuple(size for size in (len(self.layers), self.experts) if size)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of one part in the parameter."""
        return (*self.shape[:-2], *self.shape[:-3:-1]) if self.transposed else self.shape

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the stacked and joined parameter."""
        *leading, last = self.part_shape
        return (*self.stack, *leading, last * len(self.names))

    def parts(self):
        """(name on disk, where it starts in the parameter) of every part."""
        inner = len(self.part_shape) - 1
        for position in itertools.product(*map(range, self.stack)):
            numbers = {"layer": self.layers[position[0]]} if position else {}
            numbers |= {"expert": position[1]} if self.experts else {}
            for i, name in enumerate(self.names):
                yield name.format(**numbers), (*position, *[0] * inner, i * self.part_shape[-1])

    def disassemble(self, parameter: np.ndarray):
        """(name on disk, contiguous array) of every part of the parameter."""
        for name, start in self.parts():
            stacked = len(self.stack)
            part = parameter[(*start[:stacked], ..., slice(start[-1], start[-1] + self.part_shape[-1]))]
            yield name, np.ascontiguousarray(part.swapaxes(-1, -2) if self.transposed else part)
