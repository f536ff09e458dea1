"""The decoder: embedding, layers of attention and mixture-of-experts under a scan, final norm, head."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flex_jax.models.attention import Attention, Cache, LatentAttention
from flex_jax.models.config import AdapterConfig, ModelConfig
from flex_jax.models.linear import MLP
from flex_jax.models.lora import DROPOUT
from flex_jax.models.moe import MoE, Probe
from flex_jax.models.norm import RMSNorm
from flex_jax.models.rotary import rotary
from flex_jax.ops.experts import Experts, ExpertWeights
from flex_jax.ops.saved import SAVED

SHALLOW = 4  # layers of a stack that is written out
Caches = dict[str, Cache]  # by stack of layers


class Output(NamedTuple):
    logits: jax.Array  # [B, S, V] float32
    router_logits: jax.Array | None  # [MoE layers, B, S, E] float32, when asked for
    cache: Caches | None  # when one was given


class Features(NamedTuple):
    """Everything before the head."""

    hidden: jax.Array  # [B, S, D] after the final norm
    router_logits: jax.Array  # [MoE layers, B, S, E] float32
    cache: Caches | None
    probed: Any  # what the probe returned, stacked over MoE layers


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); shaped as the body of a scan over layers.

    The feed-forward part is the mixture of experts, or in a `dense` layer one MLP.
    """

    config: ModelConfig
    adapters: AdapterConfig
    experts: Experts
    probe: Probe | None
    dense: bool

    @nn.compact
    def __call__(self, x, scanned, stacks, rope, positions, mask):
        """x [B, S, D]; scanned: (cache, layer), this layer's; stacks: (gate_up, down) of the experts of all layers, or
        None where they are among this layer's parameters; the rest as in `attend`."""
        (cache, layer), c = scanned, self.config
        normed = RMSNorm(c.norm_epsilon, name="attention_norm")(x)
        kind = LatentAttention if c.latent_rank else Attention
        y, cache = kind(c, self.adapters.lora, name="attention")(normed, cache, rope, positions, mask)
        x = x + y
        normed = RMSNorm(c.norm_epsilon, name="feed_forward_norm")(x)
        if self.dense:
            return x + MLP(c.dense_width, name="mlp")(normed), (cache, None, None)
        y, router_logits, probed = MoE(c, self.adapters.slot, self.experts, self.probe, name="moe")(
            normed, None if stacks is None else ExpertWeights(*stacks, layer)
        )
        return x + y, (cache, router_logits, probed)


def layer_stacks(config: ModelConfig) -> dict[str, int]:
    """Name and number of layers of each scanned stack, in their order: the dense ones, if any, come first."""
    stacks = {"dense_layers": config.dense_layers, "layers": config.moe_layers}
    return {name: layers for name, layers in stacks.items() if layers}


class Decoder(nn.Module):
    """A mixture-of-experts language model, a pure function of its collections:

    `params` the frozen backbone; `adapters` what is trained (LoRA, personal slots), absent or empty for the pretrained
    model; `grafts` the int32 indices of the experts that the slots came from. LoRA dropout is active where the random
    stream "dropout" is given. With `remat` a backward pass computes each layer again from its input; without, the
    products of its matrices are kept and only what is cheap is computed again.
    """

    config: ModelConfig
    adapters: AdapterConfig = AdapterConfig()
    experts: Experts = Experts()
    probe: Probe | None = None
    remat: bool = True
    stacked: bool = True  # experts are read in the stack of all layers; not where devices divide it among them
    gather: Callable[[str, dict], dict] | None = None  # (stack, what a device holds of a layer) -> its parameters

    def setup(self):
        c = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab_size, c.width))
        if not c.tied_head:
            self.head = self.param("head", nn.initializers.normal(0.02), (c.vocab_size, c.width))
        stacks = layer_stacks(c)
        if c.dense_layers:
            self.dense_layers = self._stack("dense_layers", stacks["dense_layers"])
        self.layers = self._stack("layers", stacks["layers"])
        self.norm = RMSNorm(c.norm_epsilon)

    def _stack(self, name: str, layers: int):
        layer = Layer
        if self.gather:  # inside of what is computed again, so that nothing gathered outlives its layer
            layer = nn.map_variables(Layer, "params", lambda held: {"params": self.gather(name, held["params"])})
        return nn.scan(
            nn.remat(layer, prevent_cse=False, policy=None if self.remat else SAVED),
            variable_axes={"params": 0, "adapters": 0, "grafts": 0},
            split_rngs={"params": True, DROPOUT: True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=layers,
            # Written out it is a tenth faster on CPU and holds more memory, which with remat would be to no purpose.
            unroll=layers if layers <= SHALLOW and not self.remat else 1,
        )(self.config, self.adapters, self.experts, self.probe, name == "dense_layers")

    def _experts(self):
        """(gate_up, down) of all MoE layers, which a scan would copy layer by layer; None where it has to, as a divided
        stack would be put together whole, and where there are none yet."""
        if not self.stacked or self.is_initializing():
            return None
        moe = self.get_variable("params", "layers")["moe"]
        return moe["gate_up"], moe["down"]

    def features(self, tokens, attention_mask=None, *, positions=None, cache=None) -> Features:
        """Hidden states of tokens [B, S] int32, whose attention_mask [B, S] is 0 at padding or None.

        With a `cache` (see `init_cache`) the tokens stand at `positions` [B, S] and attend to all cached positions up
        to their own.
        """
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = None
        if cache is not None:
            mask = (jnp.arange(cache["layers"].key.shape[2]) <= positions[..., None])[:, None]
        elif attention_mask is not None:
            causal = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
            mask = (attention_mask != 0)[:, None, None, :] & causal
        length = positions.max(1) + 1 if attention_mask is None else attention_mask.sum(1)
        rope = rotary(c.rope, c.rope_dim or c.head_dim, positions, length)
        x, caches = self.embedding[tokens], {}
        for name, layers in layer_stacks(c).items():
            scanned = None if cache is None else cache[name], jnp.arange(layers)
            stack = getattr(self, name)
            x, (caches[name], router_logits, probed) = stack(x, scanned, self._experts(), rope, positions, mask)
        return Features(self.norm(x), router_logits, None if cache is None else caches, probed)

    def __call__(
        self, tokens, attention_mask=None, *, positions=None, cache=None, output_router_logits=False
    ) -> Output:
        """Logits of tokens [B, S] int32; arguments as those of `features`."""
        features = self.features(tokens, attention_mask, positions=positions, cache=cache)
        head = self.embedding if self.config.tied_head else self.head
        logits = jnp.einsum("bsd,vd->bsv", features.hidden, head, preferred_element_type=jnp.float32)
        return Output(logits, features.router_logits if output_router_logits else None, features.cache)


def head_weights(model: Decoder, frozen: dict) -> jax.Array:
    """The head [V, D], which is the embedding where the two are tied."""
    return frozen["embedding" if model.config.tied_head else "head"]


def init_cache(config: ModelConfig, batch: int, length: int, dtype) -> Caches:
    """An empty cache for sequences of up to `length` tokens."""

    def empty(layers, size):
        return jnp.zeros((layers, batch, length, config.kv_heads, size), dtype)

    stacks = layer_stacks(config)
    return {name: Cache(empty(n, config.key_dim), empty(n, config.value_dim)) for name, n in stacks.items()}
