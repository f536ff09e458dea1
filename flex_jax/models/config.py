"""What a decoder is made of (read from config.json by its family), and the sizes of its adapters."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary positions (RoPE, arXiv 2104.09864) and how they are scaled beyond the trained length."""

    theta: float = 10000.0
    kind: str = "default"  # "default" | "linear" | "dynamic" | "yarn"
    factor: float = 1.0
    trained_length: int = 0  # "dynamic" and "yarn": positions before scaling
    beta_fast: float = 32.0  # "yarn": dimensions that turn more often over the trained length are not scaled
    beta_slow: float = 1.0  # "yarn": dimensions that turn less often are fully interpolated
    truncate: bool = True  # "yarn": widen the range between these two to whole dimensions
    attention_factor: float = 1.0  # "yarn": multiplies cosines and sines
    softmax_mscale: float = 0.0  # "yarn" in DeepSeek-V2: attention scores grow with the factor

    @property
    def softmax_factor(self) -> float:
        return (1.0 + 0.1 * self.softmax_mscale * math.log(self.factor)) ** 2


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a pretrained mixture-of-experts decoder. Capital letters are those of shapes."""

    family: str  # model_type in config.json
    vocab_size: int  # V
    hidden_size: int  # D
    num_layers: int  # L, with the dense layers
    num_heads: int  # H
    num_kv_heads: int
    num_experts: int  # E
    num_experts_per_tok: int  # K
    moe_intermediate_size: int  # F: hidden size of an expert
    norm_topk_prob: bool  # the K routing weights of a token sum to one
    tie_word_embeddings: bool
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    head_dim: int = 0
    attention_bias: bool = False  # query, key and value projections have a bias
    qk_norm: str = ""  # RMS norm of queries and keys: "head" for each head, "full" over all heads
    shared_expert_intermediate_size: int = 0  # 0: no expert sees every token
    shared_expert_gate: bool = False
    first_k_dense_replace: int = 0  # the first layers have an MLP in place of experts
    intermediate_size: int = 0  # hidden size of that MLP
    routed_scaling_factor: float = 1.0  # multiplies the routing weights
    n_group: int = 0  # the experts of a token come from the best topk_group of n_group groups; 0: from all experts
    topk_group: int = 0

    # Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), if kv_lora_rank is not 0. Then head_dim is 0.
    kv_lora_rank: int = 0
    q_lora_rank: int = 0  # 0: queries are projected in one step
    qk_nope_head_dim: int = 0  # the part of a head without positions
    qk_rope_head_dim: int = 0  # the part of a head with positions
    v_head_dim: int = 0

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.first_k_dense_replace

    @property
    def key_dim(self) -> int:  # of one head's query or key
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.kv_lora_rank else self.head_dim

    @property
    def value_dim(self) -> int:
        return self.v_head_dim if self.kv_lora_rank else self.head_dim

    def lora_projections(self) -> dict[str, tuple[int, int]]:
        """Returns (inputs, outputs) of the projections with LoRA: those that make queries, keys and values."""
        width, latent, queries = self.hidden_size, self.kv_lora_rank, self.num_heads * self.key_dim
        query = {"q_proj": (width, queries)}
        if not latent:
            keys = (width, self.num_kv_heads * self.head_dim)
            return query | {"k_proj": keys, "v_proj": keys}
        if self.q_lora_rank:
            query = {"q_a_proj": (width, self.q_lora_rank), "q_b_proj": (self.q_lora_rank, queries)}
        expanded = self.num_heads * (self.qk_nope_head_dim + self.value_dim)
        return query | {"kv_a_proj": (width, latent + self.qk_rope_head_dim), "kv_b_proj": (latent, expanded)}

    def layer_stacks(self) -> dict[str, int]:
        """Returns the name and number of layers of each scanned stack, in order. Dense layers, if any, come first."""
        stacks = {"dense_layers": self.first_k_dense_replace, "layers": self.num_moe_layers}
        return {name: num_layers for name, num_layers in stacks.items() if num_layers}


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685): W + alpha / rank * A B."""

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class SlotConfig:
    """The slot of every MoE layer, with a client's grafted experts (FLEx, arXiv 2506.00965).

    The gate "sigmoid" is trained, and "none" is always open. With "routing" the experts replace the ones that they came
    from, and get the router's weights.
    """

    num_experts: int = 1
    training: str = "full"  # or "lora", on the frozen experts
    lora: LoraConfig = LoraConfig()
    gate: str = "sigmoid"
    gate_init: str = "router"  # a trained gate starts as the experts' router columns, or nearly "closed"
