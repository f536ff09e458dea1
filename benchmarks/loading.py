"""Measures how much memory it takes to load a sharded checkpoint, relative to its parameters.

    python benchmarks/loading.py --gigabytes 2 --shards 4 [--dtype bfloat16] [--quantisation int4]

Writes a random Qwen2-MoE checkpoint of that size into a temporary folder, loads it in a separate process and watches
the memory of that process. Prints one JSON line. `ratio` is the growth of anonymous memory at its peak, divided by the
bytes of the parameters. `ratio_with_files` also counts the pages of the mapped files, which the kernel can reclaim at
any time. On a CPU the parameters themselves are in this memory, so `ratio` is at least 1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

from flex_jax import load_pretrained
from flex_jax.federated.compression import tree_bytes
from flex_jax.models.checkpoint import write_shards
from flex_jax.models.config import ModelConfig, Rope
from flex_jax.models.families import FAMILIES
from flex_jax.models.families.family import weight_map, write_config


def shape_of(gigabytes: float) -> ModelConfig:
    """Returns a Qwen2-MoE of about that size in float32, with as many layers of 107 MB as it takes."""
    return ModelConfig(
        family="qwen2_moe",
        vocab_size=32000,
        hidden_size=512,
        num_layers=max(1, round((gigabytes * 1e9 - 131e6) / 107e6)),
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=480,
        shared_expert_intermediate_size=1024,
        shared_expert_gate=True,
        norm_topk_prob=False,
        attention_bias=True,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        rope=Rope(),
    )


def write_random(path: Path, config: ModelConfig, shards: int) -> int:
    """Writes a random float32 checkpoint and returns its bytes."""
    family, rng = FAMILIES[config.family], np.random.default_rng(0)
    shapes = [(name, mapping.shape) for mapping in weight_map(family, config) for name, _ in mapping.parts()]
    total = sum(4 * int(np.prod(shape)) for _, shape in shapes)
    write_shards(path, ((name, rng.random(shape, np.float32)) for name, shape in shapes), total / shards)
    (path / "config.json").write_text(json.dumps(write_config(family, config)))
    return total


def memory(kinds: tuple[str, ...]) -> int:
    """Returns the bytes of this process in these kinds of memory, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.split(":")[0] in kinds)


def load(path: str, dtype: str, quantisation: str | None) -> dict:
    """Loads the checkpoint while a thread watches the memory."""
    kinds = {"ratio": ("RssAnon",), "ratio_with_files": ("RssAnon", "RssFile")}
    jax.block_until_ready(jax.numpy.zeros(8) + 1)  # so that the memory of JAX itself is not counted
    before = {name: memory(kind) for name, kind in kinds.items()}
    peak, done = dict(before), threading.Event()

    def watch():
        while not done.wait(0.002):
            for name, kind in kinds.items():
                peak[name] = max(peak[name], memory(kind))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    _, frozen = load_pretrained(path, dtype=dtype, quantisation=quantisation)
    jax.block_until_ready(frozen)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    total = tree_bytes(frozen)
    ratios = {name: round((peak[name] - before[name]) / total, 3) for name in kinds}
    return {"parameters_gb": round(total / 1e9, 3), "load_s": round(seconds, 1)} | ratios


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint, in float32")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantisation", choices=["int8", "int4"])
    parser.add_argument("--load", help=argparse.SUPPRESS)  # for the process that is watched
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.dtype, arguments.quantisation)))
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        total = write_random(Path(folder), shape_of(arguments.gigabytes), arguments.shards)
        command = [sys.executable, __file__, *sys.argv[1:], "--load", folder]
        result = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        files = len(list(Path(folder).glob("*.safetensors")))
    setting = {"checkpoint_gb": round(total / 1e9, 3), "files": files, "dtype": arguments.dtype}
    print(json.dumps(setting | {"quantisation": arguments.quantisation} | json.loads(result.splitlines()[-1])))
