r"""databricks-dolly-15k, Dirichlet 0.5: 10 clients with their own mixtures of 4 tasks (FLEx, arXiv 2506.00965).

The paper's setting: every client draws 1,000 examples with replacement, after 25 test examples of each task are held
out for all; its second row is --config.data.alpha=1.0. Qwen1.5-MoE-A2.7B; 100 rounds of 5 steps of 4 examples of
512 tokens; LoRA rank 32, alpha 64, dropout 0.05; AdamW, cosine from 4e-5 to 1e-6.

    python -m flex_jax.main --config configs/dolly_dirichlet.py --config.data.path=dolly-15k.jsonl.gz \
        --workdir runs/dolly_dirichlet

The model is the embedded one, which cannot reach the paper's scores. The paper's checkpoint, or another of its family,
is a local Hugging Face directory:

    --config.model.path=checkpoints/Qwen1.5-MoE-A2.7B --config.model.dtype=bfloat16

Without --config.data.path the data set comes from the Hugging Face hub.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.clients = 10
    config.data.path = "databricks/databricks-dolly-15k"
    config.data.partition = "dirichlet"
    config.data.categories = ("closed_qa", "information_extraction", "classification", "summarization")
    config.data.alpha = 0.5
    config.data.examples_per_client = 1000
    config.data.test_examples = 25
    return config
