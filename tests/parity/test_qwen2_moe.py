"""Logits of random Qwen2-MoE checkpoints made by transformers, ours against torch's, both ways."""

import numpy as np
import pytest

from flex_jax import load_pretrained
from flex_jax.models.checkpoint import save_pretrained

torch = pytest.importorskip("torch", reason="torch is the oracle of the parity tests")
transformers = pytest.importorskip("transformers")

BASE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
SHAPES = {
    "grouped heads, untied": {},
    "full heads, tied, normalised": {"num_key_value_heads": 4, "tie_word_embeddings": True, "norm_topk_prob": True},
    "wide, top 4, normalised": {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "one kv head, top 1, tied": {
        "num_key_value_heads": 1,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
        "num_hidden_layers": 1,
    },
}


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def theirs(request, tmp_path_factory):
    torch.manual_seed(0)
    model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**BASE | SHAPES[request.param])).float().eval()
    with torch.no_grad():  # no zero bias and no unit norm, or a forgotten one would not show
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.1)
            elif "norm" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    path = tmp_path_factory.mktemp("torch")
    model.save_pretrained(path)
    return model, path


def batch():
    """Token ids and a right-padded mask [3, 17]."""
    ids = np.random.default_rng(0).integers(0, 300, (3, 17))
    mask = (np.arange(17) < np.array([[17], [10], [3]])).astype(np.int32)
    return ids.astype(np.int32), mask


def torch_outputs(model, ids, mask):
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(), output_router_logits=True
        )
    return out.logits.numpy(), np.stack([layer.reshape(*ids.shape, -1).numpy() for layer in out.router_logits])


def test_logits_and_router_logits_agree(theirs):
    ids, mask = batch()
    logits, router_logits = torch_outputs(theirs[0], ids, mask)
    model, frozen = load_pretrained(theirs[1])
    out = model.apply({"params": frozen}, ids, mask, output_router_logits=True)
    real = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(out.logits)[real], logits[real], atol=1e-4, rtol=0)
    np.testing.assert_allclose(np.asarray(out.router_logits)[:, real], router_logits[:, real], atol=1e-4, rtol=0)


def test_what_we_save_torch_reads(theirs, tmp_path):
    ids, mask = batch()
    model, frozen = load_pretrained(theirs[1])
    save_pretrained(tmp_path, model.config, frozen)
    again = transformers.Qwen2MoeForCausalLM.from_pretrained(tmp_path).eval()
    real = mask.astype(bool)
    before, after = (torch_outputs(model, ids, mask)[0][real] for model in (theirs[0], again))
    np.testing.assert_allclose(before, after, atol=1e-4, rtol=0)
