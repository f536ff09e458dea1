"""An invented results.json and metrics.jsonl of any size, true to the contract."""

import random

import pytest

from flex_jax.results import average_scores, summarise

NAMES = ("closed_qa", "information_extraction", "classification", "summarization")


def make_results(methods=("fedavg", "flex", "local"), seeds=(0, 1, 2), clients=4, layers=4, experts=1, rounds=20):
    """Returns (results, metrics); of the methods only flex has grafted experts, only local sends nothing."""
    chance = random.Random(0)
    runs, metrics = [], []
    for index, method in enumerate(methods):
        for seed in seeds:
            rows = []
            for client in range(clients):
                name = NAMES[client] if clients == len(NAMES) else f"client {client}"
                row = {
                    "id": client,
                    "name": name,
                    "train_examples": 900 + 10 * client,
                    "eval_examples": 25,
                    "eval_loss": 1.4 - 0.1 * index + chance.gauss(0, 0.02),
                    "perplexity": 4.0,
                    "rouge1": 42 + client + chance.gauss(0, 1),
                    "rouge2": 21 + chance.gauss(0, 1),
                    "rougeL": 35 + 5 * (client % 3) + (4 if method == "flex" else 0) + chance.gauss(0, 1),
                    "examples": [
                        {
                            "instruction": f"Name the capital of country {client}.",
                            "context": "",
                            "reference": f"Capital {client}",
                            "prediction": f"{method} says {client}",
                        }
                    ],
                }
                if method == "flex":
                    row["grafted_experts"] = [chance.sample(range(16), experts) for _ in range(layers)]
                rows.append(row)
            shared = 0 if method == "local" else 786_432
            personal = {"local": 786_432, "flex": 3_148_288}.get(method, 0)
            runs.append(
                {
                    "method": method,
                    "seed": seed,
                    "parameters": {
                        "frozen": 14_316_000_000,
                        "shared": shared,
                        "personal_per_client": personal,
                        "trained_per_client": shared + personal,
                    },
                    "clients": rows,
                    "average": average_scores(rows),
                    "communication": {
                        "upload_bytes_per_client_round": 4 * shared,
                        "download_bytes_per_client_round": 8 * shared,
                        "total_bytes": 12 * shared * clients * rounds,
                    },
                    "timing": {
                        "graft_s": 1.5 if method == "flex" else None,
                        "compile_s": 12.5 if seed == seeds[0] else 0.1,
                        "evaluation_s": 30.0,
                        "round_s_median": 0.5 + 0.1 * index,
                        "train_tokens_per_s": 9000.0,
                    },
                }
            )
            for round in range(rounds):
                head = {"run": f"{method}-seed{seed}", "method": method, "seed": seed, "round": round}
                losses = [2.5 / (1 + 0.1 * round) - 0.1 * index + chance.gauss(0, 0.05) for _ in range(clients)]
                metrics += [
                    {**head, "client": client, "train_loss": loss, "grad_norm": 0.8, "learning_rate": 4e-5}
                    for client, loss in enumerate(losses)
                ]
                metrics.append(
                    {
                        **head,
                        "client": None,
                        "train_loss": sum(losses) / clients,
                        "round_s": 0.5,
                        "train_tokens_per_s": 9000.0,
                    }
                )
                if round % 5 == 4:
                    metrics += [
                        {**head, "client": client, "eval_loss": loss + 0.2} for client, loss in enumerate(losses)
                    ]
    results = {
        "runs": runs,
        "summary": summarise(runs),
        "failures": [],
        "versions": {"python": "3.11.9", "jax": "0.10.2"},
        "device": "cpu x 1",
    }
    return results, metrics


@pytest.fixture
def fake():
    return make_results
