"""Random checkpoints of every family at several shapes, made by transformers: the oracle of the parity tests."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is the oracle of the parity tests")
transformers = pytest.importorskip("transformers")

VOCABULARY = 300
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 32, "intermediate_size": 48}
DEEPSEEK = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 80,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
LATENT = DEEPSEEK | {
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
LARGE_BASE = {"rope_type": "default", "rope_theta": 1e6}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# The values of DeepSeek-V2, with a shorter trained length so that the interpolation has an effect.
LATENT_YARN = YARN | {"factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}

BASE = {
    "qwen2_moe": COMMON | EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3_moe": COMMON | EXPERTS | {"head_dim": 24},
    "olmoe": COMMON | {"num_experts": 8, "intermediate_size": 32},
    "mixtral": COMMON | {"num_local_experts": 8, "intermediate_size": 32},
    "deepseek": COMMON | DEEPSEEK | {"num_key_value_heads": 2},
    "deepseek_v2": COMMON | LATENT,
}
WIDE = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "num_experts_per_tok": 4}
ONE_LAYER = {"num_hidden_layers": 1, "num_experts_per_tok": 1, "tie_word_embeddings": True}
SHAPES = {
    "qwen2_moe": [
        {},
        WIDE | {"norm_topk_prob": True, "rope_parameters": LARGE_BASE},
        ONE_LAYER | {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "norm_topk_prob": True, "qkv_bias": False, "rope_parameters": YARN},
    ],
    "qwen3_moe": [
        {"norm_topk_prob": True},
        WIDE | {"head_dim": 16, "rope_parameters": LARGE_BASE},
        ONE_LAYER,
        {"num_experts": 16, "norm_topk_prob": True, "rope_parameters": YARN | {"truncate": False}},
    ],
    "olmoe": [
        {},
        WIDE | {"norm_topk_prob": True},
        ONE_LAYER | {"num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ],
    "mixtral": [
        {},
        WIDE | {"head_dim": 32, "sliding_window": None},
        ONE_LAYER,
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            "max_position_embeddings": 12,
            "head_dim": 16,
        },
    ],
    "deepseek": [
        {},
        WIDE | {"norm_topk_prob": True, "n_shared_experts": 1},
        {"first_k_dense_replace": 0, "num_hidden_layers": 1, "tie_word_embeddings": True},
        {"first_k_dense_replace": 2, "n_routed_experts": 16, "num_experts_per_tok": 6},
    ],
    "deepseek_v2": [
        {},
        {
            "q_lora_rank": 20,
            "n_routed_experts": 12,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 16.0,
        },
        {"first_k_dense_replace": 0, "num_hidden_layers": 1, "tie_word_embeddings": True},
        {"rope_parameters": LATENT_YARN, "first_k_dense_replace": 2},
    ],
}
CASES = [(family, number) for family, shapes in SHAPES.items() for number in range(len(shapes))]
CLASSES = {
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "olmoe": "Olmoe",
    "mixtral": "Mixtral",
    "deepseek_v2": "DeepseekV2",
}


def make(family, number, path):
    """Saves a random torch model of the family as a checkpoint in `path`, and returns it."""
    torch.manual_seed(number)
    values = BASE[family] | SHAPES[family][number]
    if family == "deepseek":
        model = _deepseek(values)
    else:
        config = getattr(transformers, CLASSES[family] + "Config")(**values)
        model = getattr(transformers, CLASSES[family] + "ForCausalLM")(config)
    model = model.float().eval()
    with torch.no_grad():  # with a zero bias, unit norm or tiny router, a test would not notice a forgotten one
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.1)
            elif "norm" in name:
                weight.add_(0.1 * torch.randn_like(weight))
            elif name.endswith("mlp.gate.weight"):
                weight.normal_(0, 0.3)
    if family == "deepseek":
        _save_deepseek(model, values, path)
    else:
        model.save_pretrained(path)
    return model


def _deepseek(values):
    """DeepSeek-MoE, which transformers lacks: Llama's decoder with DeepSeek-V2's experts, chosen greedily."""
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    class Moe(DeepseekV2Moe):
        def forward(self, x):
            _, weights, index = self.gate(x)
            if values.get("norm_topk_prob"):
                weights = weights / weights.sum(-1, keepdim=True)
            routed = self.experts(x.view(-1, x.shape[-1]), index, weights).view(*x.shape)
            return routed + self.shared_experts(x)

    names = set(transformers.LlamaConfig().to_dict()) & set(values)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{name: values[name] for name in names}))
    moe = transformers.DeepseekV2Config(**values)
    for layer in model.model.layers[values["first_k_dense_replace"] :]:
        layer.mlp = Moe(moe)
        for weight in layer.mlp.parameters():
            torch.nn.init.normal_(weight, std=0.1)
    return model


def _save_deepseek(model, values, path):
    """Saves in DeepSeek's layout: a tensor for each expert, and a config.json without a class of transformers."""
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in model.state_dict().items():
        head, mark, part = name.partition("experts.gate_up_proj" if "gate_up" in name else "experts.down_proj")
        for e, expert in enumerate(tensor if mark and not part else []):
            halves = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True)) if "gate_up" in mark else {}
            for key, matrix in (halves or {"down_proj": expert}).items():
                tensors[f"{head}experts.{e}.{key}.weight"] = matrix.contiguous()
        if not (mark and not part) and not (values.get("tie_word_embeddings") and name == "lm_head.weight"):
            tensors[name] = tensor.contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    raw = {"model_type": "deepseek", "hidden_act": "silu", "rope_theta": 1e4, "rope_scaling": None, **values}
    (path / "config.json").write_text(json.dumps(raw))


def batch():
    """Returns token ids and a right-padded mask, [3, 17]."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, 17))
    return ids.astype(np.int32), (np.arange(17) < np.array([[17], [10], [3]])).astype(np.int32)


def outputs(model, ids, mask):
    """Returns (logits [B, S, V], router logits [MoE layers, B, S, E]) of a torch model."""
    seen, hooks = [], []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            hooks.append(layer.mlp.gate.register_forward_hook(lambda module, inputs, output: seen.append(output[0])))
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
    for hook in hooks:
        hook.remove()
    return out.logits.numpy(), np.stack([logits.reshape(*ids.shape, -1).numpy() for logits in seen])
