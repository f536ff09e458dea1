"""What a decoder is made of (read from config.json by its family) and what adapters it carries."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a pretrained mixture-of-experts decoder. Capital letters as in the docstrings."""

    family: str  # model_type of config.json
    vocab_size: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int
    head_dim: int
    experts: int  # E
    experts_per_token: int  # K
    expert_width: int  # F
    shared_expert_width: int
    norm_topk_prob: bool  # the K routing weights of a token sum to one
    attention_bias: bool  # on the query, key and value projections
    tied_head: bool
    norm_epsilon: float
    rope_theta: float


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685): W + alpha / rank * A B."""

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0


@dataclass(frozen=True)
class SlotConfig:
    """The personal slot of every MoE layer: `experts` grafted experts, trained in full or by LoRA, and their gate."""

    experts: int = 1
    training: str = "full"  # "full" | "lora"
    lora: LoraConfig = LoraConfig()
    gate_init: str = "router"  # "router" | "closed"


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapters a model carries. The adapters tree itself says what is there; this says how it is read."""

    lora: LoraConfig = LoraConfig()
    slot: SlotConfig = SlotConfig()
