"""A pretrained mixture-of-experts model with FLEx personal experts (arXiv 2506.00965), for transformers.

    y = M(x) + sum_j sigmoid(g_j . x) P_j(x)        M the pretrained block, P_j a personal expert, g_j its gate

`python -m flex_jax.export --format hf` copies this file beside the weights; it needs torch and transformers alone:

    AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

`flex` in config.json: personal_experts, the number r of them in each block; expert_width; gate_bias, whether the gates
have one.
"""

import torch
from torch import nn
from transformers import (
    DeepseekV2ForCausalLM,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)


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
    """What the personal experts add to a block's output, each as much as its gate lets it: [..., D] -> [..., D]."""

    def __init__(self, width, hidden, experts, gate_bias):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=gate_bias)
        self.experts = nn.ModuleList(PersonalExpert(width, hidden) for _ in range(experts))

    def forward(self, x):
        gates = torch.sigmoid(self.gate(x)).unbind(-1)
        return sum(gate[..., None] * expert(x) for gate, expert in zip(gates, self.experts, strict=True))


def add_personal(block, inputs, output):
    """Forward hook of a block."""
    return output + block.personal(inputs[0])


class PersonalSlots:
    """Gives every mixture-of-experts block of a transformers model a child `personal`; dense layers have none."""

    def __init__(self, config):
        super().__init__(config)
        flex = config.flex
        for layer in self.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.personal = PersonalSlot(
                    config.hidden_size, flex["expert_width"], flex["personal_experts"], flex["gate_bias"]
                )
                layer.mlp.register_forward_hook(add_personal)


class FlexQwen2MoeForCausalLM(PersonalSlots, Qwen2MoeForCausalLM):
    pass


class FlexQwen3MoeForCausalLM(PersonalSlots, Qwen3MoeForCausalLM):
    pass


class FlexOlmoeForCausalLM(PersonalSlots, OlmoeForCausalLM):
    pass


class FlexMixtralForCausalLM(PersonalSlots, MixtralForCausalLM):
    pass


class FlexDeepseekV2ForCausalLM(PersonalSlots, DeepseekV2ForCausalLM):
    pass
