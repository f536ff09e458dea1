"""A pretrained mixture-of-experts model with FLEx personal experts (arXiv 2506.00965), for transformers.

    y = M(x) + sum_j sigmoid(g_j . x) P_j(x)        M the pretrained block, P_j a personal expert, g_j its gate

`python -m flex_jax.export --format hf` copies this file next to the weights. It needs only torch and transformers:

    AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

`flex` in config.json has personal_experts, the number r of personal experts in each block; expert_width, their hidden
size; and gate_bias, whether the gates have a bias.
"""

from typing import Any

import torch
import transformers
from torch import nn


class PersonalExpert(nn.Module):
    """A SwiGLU expert, [..., D] -> [..., D]."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class PersonalSlot(nn.Module):
    """The gated sum of a block's personal experts, [..., D] -> [..., D]."""

    def __init__(self, width, hidden, num_experts, gate_bias):
        super().__init__()
        self.gate = nn.Linear(width, num_experts, bias=gate_bias)
        self.experts = nn.ModuleList(PersonalExpert(width, hidden) for _ in range(num_experts))

    def forward(self, x):
        gates = torch.sigmoid(self.gate(x)).unbind(-1)
        return sum(gate[..., None] * expert(x) for gate, expert in zip(gates, self.experts, strict=True))


def add_personal(block, inputs, output):
    return output + block.personal(inputs[0])


class PersonalSlots:
    """Gives every mixture-of-experts block of a transformers model a child `personal`. Dense layers get none."""

    model: Any  # of the transformers class that this one is mixed into

    def __init__(self, config):
        super().__init__(config)  # pyright: ignore[reportCallIssue]
        sizes = [config.flex[key] for key in ("expert_width", "personal_experts", "gate_bias")]
        for layer in self.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.personal = PersonalSlot(config.hidden_size, *sizes)
                layer.mlp.register_forward_hook(add_personal)


class FlexQwen2MoeForCausalLM(PersonalSlots, transformers.Qwen2MoeForCausalLM):
    """Qwen2-MoE with personal experts."""


class FlexQwen3MoeForCausalLM(PersonalSlots, transformers.Qwen3MoeForCausalLM):
    """Qwen3-MoE with personal experts."""


class FlexOlmoeForCausalLM(PersonalSlots, transformers.OlmoeForCausalLM):
    """OLMoE with personal experts."""


class FlexMixtralForCausalLM(PersonalSlots, transformers.MixtralForCausalLM):
    """Mixtral with personal experts."""


class FlexDeepseekV2ForCausalLM(PersonalSlots, transformers.DeepseekV2ForCausalLM):
    """DeepSeek-V2 with personal experts."""
