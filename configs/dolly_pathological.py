r"""databricks-dolly-15k, pathological: 4 clients with one task each (FLEx, arXiv 2506.00965).

The paper's row, Qwen1.5-MoE-A2.7B, average ROUGE-L: FLEx 43.13, best baseline 42.37. It trains 100 rounds of 5 steps
of 4 examples of 512 tokens; LoRA rank 32, alpha 64, dropout 0.05; AdamW, cosine from 4e-5 to 1e-6.

    python -m flex_jax.main --config configs/dolly_pathological.py --config.data.path=dolly-15k.jsonl.gz \
        --workdir runs/dolly_pathological

The model is the embedded one, which cannot reach that row. The paper's checkpoint, or another of its family, is a
local Hugging Face directory:

    --config.model.path=checkpoints/Qwen1.5-MoE-A2.7B --config.model.dtype=bfloat16

Without --config.data.path the data set comes from the Hugging Face hub.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.clients = 4
    config.data.path = "databricks/databricks-dolly-15k"
    config.data.partition = "pathological"
    config.data.categories = ("closed_qa", "information_extraction", "classification", "summarization")
    config.data.test_examples = 100
    return config
