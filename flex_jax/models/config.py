"""What a decoder is made of (read from config.json by its family) and what adapters it carries."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary positions (RoPE, arXiv 2104.09864) and how they are scaled beyond the trained length."""

    theta: float = 10000.0
    kind: str = "default"  # "default" | "linear" | "dynamic" | "yarn"
    factor: float = 1.0
    trained_length: int = 0  # positions before scaling, for "dynamic" and "yarn"
    beta_fast: float = 32.0  # "yarn": dimensions that turn more often than this over the trained length stay
    beta_slow: float = 1.0  # and those that turn less often are interpolated
    truncate: bool = True  # "yarn": that range is widened to whole dimensions
    attention_factor: float = 1.0  # "yarn": on cosines and sines
    softmax_mscale: float = 0.0  # "yarn" in DeepSeek-V2: attention scores grow with the factor

    @property
    def softmax_factor(self) -> float:
        """On attention scores."""
        return (1.0 + 0.1 * self.softmax_mscale * math.log(self.factor)) ** 2


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a pretrained mixture-of-experts decoder. Capital letters as in the docstrings."""

    family: str  # model_type of config.json
    vocab_size: int  # V
    width: int  # D
    layers: int  # L, dense ones included
    heads: int  # H
    kv_heads: int
    experts: int  # E
    experts_per_token: int  # K
    expert_width: int  # F
    norm_topk_prob: bool  # the K routing weights of a token sum to one
    tied_head: bool
    norm_epsilon: float
    max_positions: int
    rope: Rope
    head_dim: int = 0
    attention_bias: bool = False  # on the query, key and value projections
    qk_norm: str = ""  # RMS norm of queries and keys: "head" each head, "full" all heads at once
    shared_expert_width: int = 0  # 0: no expert that sees every token
    shared_expert_gate: bool = False
    dense_layers: int = 0  # the first layers, which have one MLP in place of experts
    dense_width: int = 0
    routed_scale: float = 1.0  # on the routing weights
    expert_groups: int = 0  # experts are chosen among those of the best groups; 0: among all
    groups_per_token: int = 0

    # Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), where latent_rank is not 0; head_dim is 0 then.
    latent_rank: int = 0  # of keys and values
    query_rank: int = 0  # 0: queries are projected in one step
    nope_dim: int = 0  # part of a head without positions
    rope_dim: int = 0  # part of a head with them
    latent_value_dim: int = 0

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def key_dim(self) -> int:
        """Size of one query or key."""
        return self.nope_dim + self.rope_dim if self.latent_rank else self.head_dim

    @property
    def value_dim(self) -> int:
        return self.latent_value_dim if self.latent_rank else self.head_dim


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685): W + alpha / rank * A B."""

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0


@dataclass(frozen=True)
class SlotConfig:
    """The slot of every MoE layer: `experts` grafted experts, trained in full or by LoRA, and what lets them speak.

    gate: "sigmoid" a trained gate beside the layer; "none" always open; "routing" they take the place of the experts
    they came from, under the router's own weights.
    """

    experts: int = 1
    training: str = "full"  # "full" | "lora"
    lora: LoraConfig = LoraConfig()
    gate: str = "sigmoid"
    gate_init: str = "router"  # of a trained gate: "router" | "closed"


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapters a model carries. The adapters tree itself says what is there; this says how it is read."""

    lora: LoraConfig = LoraConfig()
    slot: SlotConfig = SlotConfig()
