"""The decoder: embedding, layers of attention and mixture-of-experts under a scan, final norm, head."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flex_jax.models.adapters import AdapterConfig
from flex_jax.models.attention import Attention, Cache, LatentAttention, Positions
from flex_jax.models.config import ModelConfig
from flex_jax.models.linear import MLP
from flex_jax.models.lora import DROPOUT
from flex_jax.models.moe import MoE, Probe
from flex_jax.models.norm import RMSNorm
from flex_jax.models.rotary import rotary
from flex_jax.ops.experts import ExpertOps, ExpertWeights
from flex_jax.ops.remat import SAVE_PRODUCTS

MAX_UNROLLED_LAYERS = 4
Caches = dict[str, Cache]  # by stack of layers


class Output(NamedTuple):
    """The result of a decoder."""

    logits: jax.Array  # [B, S, V] float32
    router_logits: jax.Array | None  # [MoE layers, B, S, E] float32, if asked for
    cache: Caches | None  # if one was given


class Features(NamedTuple):
    """Everything before the head."""

    hidden: jax.Array  # [B, S, D] after the final norm
    router_logits: jax.Array  # [MoE layers, B, S, E] float32
    cache: Caches | None
    probed: Any  # results of the probe, stacked over MoE layers


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), as the body of a scan over layers.

    The feed-forward part is a mixture of experts, or one MLP if the layer is `dense`.
    """

    config: ModelConfig
    adapters: AdapterConfig
    experts: ExpertOps
    probe: Probe | None
    dense: bool

    @nn.compact
    def __call__(self, x: jax.Array, scanned: tuple, stacks: tuple[Any, Any] | None, positions: Positions):
        """Maps x [B, S, D] to y [B, S, D] and (cache, router logits, result of the probe).

        `scanned` is this layer's cache and number. `stacks` are the experts of all layers; None: they are parameters.
        """
        (cache, layer), c = scanned, self.config
        normed = RMSNorm(c.rms_norm_eps, name="attention_norm")(x)
        attention = (LatentAttention if c.kv_lora_rank else Attention)(c, self.adapters, name="attention")
        y, cache = attention(normed, cache, positions)
        x = x + y
        normed = RMSNorm(c.rms_norm_eps, name="feed_forward_norm")(x)
        if self.dense:
            return x + MLP(c.intermediate_size, name="mlp")(normed), (cache, None, None)
        weights = None if stacks is None else ExpertWeights(*stacks, layer)
        moe = MoE(c, self.adapters.slot, self.experts, self.probe, name="moe")
        y, router_logits, probed = moe(normed, weights)
        return x + y, (cache, router_logits, probed)


class Decoder(nn.Module):
    """A mixture-of-experts language model. It is a pure function of its Flax collections.

    The collections are `params`, the frozen backbone; `adapters`, everything that is trained (LoRA and personal slots),
    absent or empty for the pretrained model; and `grafts`, the int32 indices of the experts that the slots came from.

    With `remat` the backward pass computes each layer again from its input. Without, the products of a layer's matrices
    are saved, and only cheap operations are computed again.
    """

    config: ModelConfig
    adapters: AdapterConfig = AdapterConfig()
    experts: ExpertOps = ExpertOps()
    probe: Probe | None = None
    remat: bool = True
    stacked: bool = True  # experts are read in place, from the stack of all layers; False if devices divide the stack
    gather: Callable[[str, dict], dict] | None = None  # (stack, a device's slices of a layer) -> the layer's parameters

    def setup(self):
        c = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size))
        if not c.tie_word_embeddings:
            self.head = self.param("head", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size))
        for name, num_layers in c.layer_stacks().items():
            setattr(self, name, self._stack(name, num_layers))
        self.norm = RMSNorm(c.rms_norm_eps)

    def _stack(self, name: str, num_layers: int):
        layer = Layer
        if gather := self.gather:  # inside of `remat`, so that nothing gathered outlives its layer
            layer = nn.map_variables(Layer, "params", lambda local: {"params": gather(name, local["params"])})
        return nn.scan(
            nn.remat(layer, prevent_cse=False, policy=None if self.remat else SAVE_PRODUCTS),
            variable_axes={"params": 0, "adapters": 0, "grafts": 0},
            split_rngs={"params": True, DROPOUT: True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=num_layers,
            # Unrolling is about 10% faster on CPU but uses more memory, which would defeat remat.
            unroll=num_layers if num_layers <= MAX_UNROLLED_LAYERS and not self.remat else 1,
        )(self.config, self.adapters, self.experts, self.probe, name == "dense_layers")

    def _expert_stacks(self) -> tuple[Any, Any] | None:
        """(gate_up, down) of all MoE layers, so that the scan does not copy them. None if the stack is sharded."""
        if not self.stacked or self.is_initializing():
            return None
        moe = self.get_variable("params", "layers")["moe"]
        return moe["gate_up"], moe["down"]

    def features(self, tokens, attention_mask=None, *, positions=None, cache: Caches | None = None) -> Features:
        """Computes everything before the head, for tokens int32 [B, S].

        attention_mask [B, S] is 0 at padding; None: no padding. With a cache (see `init_cache`) the tokens stand at
        `positions` [B, S], and attend to all cached positions up to theirs.
        """
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = None
        if cache is not None:
            mask = (jnp.arange(cache["layers"].key.shape[2]) <= positions[..., None])[:, None]
        elif attention_mask is not None:
            mask = (attention_mask != 0)[:, None, None, :] & jnp.tri(tokens.shape[1], dtype=bool)
        length = positions.max(1) + 1 if attention_mask is None else attention_mask.sum(1)
        rope = rotary(c.rope, c.qk_rope_head_dim or c.head_dim, positions, length)
        where = Positions(positions, rope, mask)
        x, caches, router_logits, probed = self.embedding[tokens], {}, None, None
        for name, num_layers in c.layer_stacks().items():
            scanned = None if cache is None else cache[name], jnp.arange(num_layers)
            stack = getattr(self, name)
            x, (caches[name], router_logits, probed) = stack(x, scanned, self._expert_stacks(), where)
        assert router_logits is not None  # the last stack has experts
        return Features(self.norm(x), router_logits, None if cache is None else caches, probed)

    def __call__(
        self, tokens, attention_mask=None, *, positions=None, cache: Caches | None = None, output_router_logits=False
    ) -> Output:
        """Computes the logits of tokens [B, S] int32. The arguments are those of `features`."""
        features = self.features(tokens, attention_mask, positions=positions, cache=cache)
        head = self.embedding if self.config.tie_word_embeddings else self.head
        logits = jnp.einsum("bsd,vd->bsv", features.hidden, head, preferred_element_type=jnp.float32)
        return Output(logits, features.router_logits if output_router_logits else None, features.cache)


def head_weights(model: Decoder, frozen: dict) -> jax.Array:
    return frozen["embedding" if model.config.tie_word_embeddings else "head"]


def init_cache(config: ModelConfig, batch: int, length: int, dtype) -> Caches:
    def empty(num_layers):
        shape, sizes = (num_layers, batch, length, config.num_kv_heads), (config.key_dim, config.value_dim)
        return Cache(*(jnp.zeros((*shape, size), dtype) for size in sizes))

    return {name: empty(num_layers) for name, num_layers in config.layer_stacks().items()}
