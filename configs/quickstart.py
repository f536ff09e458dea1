"""FLEx, FedAvg and local training on the embedded model and data, minutes on a CPU.

    python -m flex_jax.main --config configs/quickstart.py

Four clients, one for each department of the embedded data, with three seeds of every method.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("flex", "fedavg", "local")
    config.seeds = (0, 1, 2)
    config.rounds = 30
    config.local_steps = 4
    config.batch_size = 8
    config.sequence_length = 128
    config.clients = 4

    config.data.partition = "column"
    config.data.column = "department"
    config.data.examples_per_client = 100
    config.data.test_examples = 40

    config.lora.rank = 8
    config.lora.alpha = 16.0
    config.lora.dropout = 0.0

    config.optimizer.learning_rate = 3e-3
    config.optimizer.final_learning_rate = 3e-4

    config.evaluation.max_new_tokens = 24
    config.evaluation.batch_size = 40
    return config
