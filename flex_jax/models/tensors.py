"""One table row per parameter: which tensors on disk it is made of. Reading and writing are both this table."""

import itertools
from typing import NamedTuple

import numpy as np

from flex_jax.models.config import ModelConfig


class Tensor(NamedTuple):
    """A parameter of ours and its parts on disk.

    `names` are templates over {layer} and {expert}; the parameter stacks their values on leading axes [L, E] and joins
    several names on the last axis. `shape` is that of one tensor on disk; `transpose` turns [out, in] into [in, out].
    """

    path: str
    names: list[str]
    shape: tuple[int, ...]
    transpose: bool = False

    def stack(self, config: ModelConfig) -> tuple[int, ...]:
        """Leading axes: () or [L] or [L, E]."""
        sizes = {"{layer}": config.layers, "{expert}": config.experts}
        return tuple(size for placeholder, size in sizes.items() if placeholder in self.names[0])

    def parameter_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of the stacked and joined parameter."""
        part = self.shape[::-1] if self.transpose else self.shape
        return (*self.stack(config), *part[:-1], part[-1] * len(self.names))

    def parts(self, config: ModelConfig):
        """(name on disk, index into the parameter) of every part."""
        width = (self.shape[::-1] if self.transpose else self.shape)[-1]
        for position in itertools.product(*map(range, self.stack(config))):
            numbers = dict(zip(("layer", "expert"), position, strict=False))
            for i, name in enumerate(self.names):
                yield name.format(**numbers), (*position, ..., slice(i * width, (i + 1) * width))

    def assemble(self, config: ModelConfig, read, dtype) -> np.ndarray:
        """The parameter, from `read(name) -> array`, one part in memory at a time."""
        out = np.empty(self.parameter_shape(config), dtype)
        for name, index in self.parts(config):
            part = read(name)
            out[index] = part.T if self.transpose else part
        return out

    def disassemble(self, config: ModelConfig, parameter: np.ndarray):
        """(name on disk, contiguous array) of every part: `assemble`'s inverse."""
        for name, index in self.parts(config):
            part = parameter[index]
            yield name, np.ascontiguousarray(part.T if self.transpose else part)
