"""Measures greedy generation, for many clients in one batch and for one client at a time, with random weights.

    python benchmarks/generate.py benchmarks/shapes/small.json --clients 16 --plot generate.png
    python benchmarks/generate.py benchmarks/shapes/small.json --peer PEER --python PEER_PYTHON --shape small

Every client of FLEx has different slots and answers different random prompts: --prompts prompts of --prompt-length
tokens, with --new-tokens new tokens each; no answer stops early. The same function answers all clients at once
(`together`) and one client at a time (`in_turn`), in tokens per second. `ratio` is the first over the second. The
setting comes from --config and further arguments (--config.KEY=VALUE: model.dtype, model.quantisation, lora.*, slot.*).

With --peer, it also measures a PyTorch + peft program. --peer is a folder whose fedmoe.py defines the shape under the
name --shape; --python runs it in that folder on --device (on cuda both programs use bfloat16). The peer copies the
tensors of one client at a time into the model, and its `generate` answers the client's prompts in one batch. It runs
with each of its implementations of experts; `ratio_to_peer` is `together` over the faster one. Prints one JSON line;
with --plot, draws the tokens per second.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from measure import device, draw_bars, emit, seconds
from round import random_backbone, read_setting

from flex_jax.building import ResolvedMethod, prepare_method, start_without_grafting
from flex_jax.evaluation.generation import generate
from flex_jax.federated.client import ClientModels
from flex_jax.models.checkpoint import read_model_config

NEVER = -1  # an end-of-sequence token that no model generates
PEER_EXPERTS = {"cpu": ["batched_mm", "eager"], "cuda": ["grouped_mm", "eager"]}  # grouped_mm is very slow on CPU

PEER = """
import contextlib, json, statistics, sys, time
import torch
from fedmoe import Hyper, Simulation, add_lora, add_side_experts, build_model, moe_blocks, qwen2moe_config

asked = json.loads(sys.argv[1])
device, dtype, rows, length, new = (asked[key] for key in ("device", "dtype", "prompts", "prompt_length", "new_tokens"))
torch.manual_seed(0)
shape = qwen2moe_config(asked["shape"])
model = build_model(shape, device=device, dtype=getattr(torch, dtype), experts=asked["experts"])
chosen = [[0] * len(moe_blocks(model))] * asked["clients"]
# Nothing is trained, so the adapters can have the dtype of the model, and no autocast is needed.
model = add_lora(add_side_experts(model), r=asked["rank"], alpha=asked["alpha"], dropout=0.0, adapter_fp32=False).eval()
clients = Simulation(model, "flex", [1] * asked["clients"], Hyper(), contextlib.nullcontext, chosen=chosen)
prompts = torch.randint(0, shape.vocab_size, (asked["clients"], rows, length), device=device)
kinds = dict(do_sample=False, use_cache=True, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)

def answer_all():
    started = time.perf_counter()
    for client in range(asked["clients"]):
        clients.enter(client)
        answers = model.generate(input_ids=prompts[client], attention_mask=torch.ones_like(prompts[client]), **kinds)
        assert answers.shape == (rows, length + new)
    answers.cpu()  # waits for the result
    return time.perf_counter() - started

answer_all()
taken = statistics.median(answer_all() for _ in range(asked["repeats"]))
sizes = [shape.vocab_size, shape.hidden_size, shape.num_hidden_layers, shape.num_experts, shape.moe_intermediate_size]
print(json.dumps({"tokens_per_s": asked["clients"] * rows * new / taken, "sizes": sizes}))
"""


def time_ours(resolved: ResolvedMethod, known: argparse.Namespace) -> dict[str, float]:
    """Returns the tokens per second for all clients together and for one client at a time."""
    backbone = random_backbone(resolved.config, known.model)
    spec = prepare_method(resolved, backbone).spec
    frozen, state, init_clients = start_without_grafting(resolved.config, spec, backbone, jax.random.PRNGKey(0))
    client_states = init_clients(np.arange(known.clients))
    grid = known.clients, known.prompts, known.prompt_length
    prompts = np.random.default_rng(0).integers(0, backbone.model.config.vocab_size, grid).astype(np.int32)
    lengths = np.full(grid[:2], known.prompt_length, np.int32)
    everything = jax.device_put((client_states, prompts, lengths))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], everything) for i in range(known.clients)]
    settings = {"max_new_tokens": known.new_tokens, "end": NEVER}

    def answer(groups):
        return [
            generate(ClientModels(spec, frozen, state.server, clients), *inputs, **settings)
            for clients, *inputs in groups
        ]

    groups = {"together": [everything], "in_turn": each}
    tokens = known.clients * known.prompts * known.new_tokens
    return {name: round(tokens / seconds(answer, group, repeats=known.repeats), 1) for name, group in groups.items()}


def time_peer(config, known: argparse.Namespace) -> dict[str, float]:
    """Returns the tokens per second of the peer for each of its implementations of experts."""
    names = "shape", "device", "clients", "prompts", "prompt_length", "new_tokens", "repeats"
    asked = {name: getattr(known, name) for name in names}
    asked |= {"dtype": config.model.dtype, "rank": config.lora.rank, "alpha": config.lora.alpha}
    shape, speeds = read_model_config(known.model), {}
    for experts in PEER_EXPERTS[known.device]:
        command = [known.python, "-c", PEER, json.dumps(asked | {"experts": experts})]
        done = subprocess.run(command, cwd=known.peer, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the peer: exit status {done.returncode}\n{done.stderr[-2000:]}")
        line = json.loads(done.stdout.strip().splitlines()[-1])
        sizes = [shape.vocab_size, shape.hidden_size, shape.num_layers, shape.num_experts, shape.moe_intermediate_size]
        if line["sizes"] != sizes:
            raise SystemExit(f"--shape {known.shape} has other sizes than {known.model}: {line['sizes']}, {sizes}")
        speeds[experts] = round(line["tokens_per_s"], 1)
    return speeds


def main(arguments: list[str] | None = None) -> dict:
    """Measures generation and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = Path(__file__).parent / "shapes"
    parser.add_argument("model", type=Path, nargs="?", default=shapes / "small.json", help="a config.json")
    parser.add_argument("--config", default="configs/dolly_pathological.py")
    for name, default in (("clients", 16), ("prompts", 1), ("prompt-length", 128), ("new-tokens", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peer", type=Path, help="the folder of the PyTorch program")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the peer")
    parser.add_argument("--shape", default="small", help="the peer's name of the shape")
    parser.add_argument("--device", default="cpu", choices=list(PEER_EXPERTS), help="the device of the peer")
    parser.add_argument("--plot", type=Path)
    parser.set_defaults(method="flex")
    known, changes = parser.parse_known_args(arguments)
    dtype = ["--config.model.dtype=bfloat16"] if known.device == "cuda" else []
    resolved = read_setting(known, [f"--config.clients={known.clients}", *dtype, *changes])
    config = resolved.config
    result = {"model": known.model.stem, "dtype": config.model.dtype, "quantisation": config.model.quantisation}
    result["clients x prompts x (prompt + new)"] = (
        f"{known.clients} x {known.prompts} x ({known.prompt_length} + {known.new_tokens})"
    )
    peer = time_peer(config, known) if known.peer else {}  # first, because JAX allocates the memory of a GPU for good
    ours = time_ours(resolved, known)
    result |= {f"{name}_tokens_per_s": speed for name, speed in ours.items()}
    result["ratio"] = round(ours["together"] / ours["in_turn"], 2)
    if peer:
        result |= {"peer_tokens_per_s": peer, "ratio_to_peer": round(ours["together"] / max(peer.values()), 2)}
    result["device"] = device()
    if known.plot:
        values = {"all clients together": ours["together"], "one after another": ours["in_turn"]}
        values |= {f"peer, {experts}": speed for experts, speed in peer.items()}
        draw_bars(known.plot, f"Generation, {known.model.stem}, {known.clients} clients", "tokens/s", values)
    return emit(result)


if __name__ == "__main__":
    main()
