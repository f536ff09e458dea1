"""Frozen linear maps, whose matrices may be quantised, and the SwiGLU MLP made of them."""

import flax.linen as nn
import jax

from flex_jax.models.adapters import AdapterConfig
from flex_jax.models.lora import dropout_of
from flex_jax.ops.experts import swiglu
from flex_jax.ops.quantised import Quantised, dequantise
from flex_jax.ops.remat import checkpoint_product


def frozen_matrix(module: nn.Module, name: str, shape: tuple[int, ...]) -> jax.Array | Quantised:
    """Returns a parameter [D, F] or [E, D, F] of a module, plain or quantised; a new one during initialisation."""
    if module.has_variable("params", name):  # not `param`, which expects the shape of a plain array
        return module.get_variable("params", name)
    return module.param(name, nn.initializers.lecun_normal(batch_axis=tuple(range(len(shape) - 2))), shape)


class Projection(nn.Module):
    """A frozen linear map [..., D] -> [..., features], with an adapter if the adapters tree has leaves for it."""

    features: int
    use_bias: bool
    adapters: AdapterConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ dequantise(frozen_matrix(self, "kernel", (x.shape[-1], self.features)), x.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,))
        lora = self.adapters.lora
        if leaves := self.variables.get("adapters"):
            y = self.adapters.projection.apply(leaves, lora, x, y, dropout_of(self, lora))
        return checkpoint_product(y)


class MLP(nn.Module):
    """A SwiGLU expert that sees every token, [..., D] -> [..., D]. If `gated`, a sigmoid gate multiplies its output."""

    hidden: int
    gated: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        gate_up = dequantise(frozen_matrix(self, "gate_up", (width, 2 * self.hidden)), x.dtype)
        down = dequantise(frozen_matrix(self, "down", (self.hidden, width)), x.dtype)
        y = checkpoint_product(swiglu(checkpoint_product(x @ gate_up)) @ down)
        if self.gated:
            y = jax.nn.sigmoid(x @ self.param("gate", nn.initializers.lecun_normal(), (width, 1))) * y
        return y
