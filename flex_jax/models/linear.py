"""Frozen linear maps, whose matrices may be quantised, and the SwiGLU MLP made of them."""

import flax.linen as nn
import jax

from flex_jax.models.config import LoraConfig
from flex_jax.models.lora import lora_delta, lora_experts_delta
from flex_jax.ops.experts import swiglu
from flex_jax.ops.quantised import Quantised, dequantise
from flex_jax.ops.saved import saved


def frozen_matrix(module: nn.Module, name: str, shape: tuple[int, ...]) -> jax.Array | Quantised:
    """The parameter `name` of a module as it is held; plain and random where the module is being initialised.

    shape: [D, F], or [E, D, F] for a stack of matrices.
    """
    if module.has_variable("params", name):  # not `param`, which expects the shape of a plain array
        return module.get_variable("params", name)
    return module.param(name, nn.initializers.lecun_normal(batch_axis=tuple(range(len(shape) - 2))), shape)


class Projection(nn.Module):
    """A frozen linear map: [..., D] -> [..., features]. Beside it, where the adapters tree has them, a LoRA, and a
    `delta` [D, features]: what clients have merged, the same for all, as a sum of A B that is scaled as a LoRA is."""

    features: int
    use_bias: bool
    lora: LoraConfig

    @nn.compact
    def __call__(self, x):
        kernel = dequantise(frozen_matrix(self, "kernel", (x.shape[-1], self.features)), x.dtype)
        y = x @ kernel
        if self.has_variable("adapters", "delta"):  # not added to the kernel, of whose bfloat16 it may be no last digit
            delta = self.get_variable("adapters", "delta") * (self.lora.alpha / self.lora.rank)
            y = y + x @ delta.astype(x.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,))
        if self.has_variable("adapters", "lora_a"):
            y = y + lora_delta(self, self.lora, x)
        if self.has_variable("adapters", "experts_a"):
            y = y + lora_experts_delta(self, self.lora, x)
        return saved(y)


class MLP(nn.Module):
    """A SwiGLU expert that sees every token, [..., D] -> [..., D]; `gated`: behind a sigmoid gate of its own."""

    hidden: int
    gated: bool = False

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        gate_up = dequantise(frozen_matrix(self, "gate_up", (width, 2 * self.hidden)), x.dtype)
        y = swiglu(saved(x @ gate_up)) @ dequantise(frozen_matrix(self, "down", (self.hidden, width)), x.dtype)
        y = saved(y)
        if self.gated:
            y = jax.nn.sigmoid(x @ self.param("gate", nn.initializers.lecun_normal(), (width, 1))) * y
        return y
