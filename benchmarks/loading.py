"""How much memory loading a sharded checkpoint takes beside the parameters themselves.

    python benchmarks/loading.py --gigabytes 2 --shards 4 [--dtype bfloat16] [--quantisation int4]

Writes a random Qwen2-MoE checkpoint of that size into a temporary folder, loads it in a process of its own and watches
that process. Prints one JSON line: `ratio` is the most anonymous memory held while loading, less what the process held
before, over the bytes of the parameters; `ratio_with_files` counts the pages of the mapped files too, which the kernel
takes back when it needs them. On a CPU the parameters lie in that memory too: the floor of `ratio` is 1.
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
from flex_jax.models.families.family import tensors, write_config


def shape_of(gigabytes: float) -> ModelConfig:
    """A Qwen2-MoE of about that size in float32: as many layers of 100 MB as it takes."""
    config = ModelConfig(
        family="qwen2_moe",
        vocab_size=32000,
        width=512,
        layers=1,
        heads=8,
        kv_heads=8,
        head_dim=64,
        experts=32,
        experts_per_token=4,
        expert_width=480,
        shared_expert_width=1024,
        shared_expert_gate=True,
        norm_topk_prob=False,
        attention_bias=True,
        tied_head=False,
        norm_epsilon=1e-6,
        max_positions=2048,
        rope=Rope(),
    )
    values = vars(config) | {"layers": max(1, round((gigabytes * 1e9 - 131e6) / 107e6))}
    return ModelConfig(**values)


def write_random(path: Path, config: ModelConfig, shards: int) -> int:
    """A random float32 checkpoint; returns its bytes."""
    family, rng = FAMILIES[config.family], np.random.default_rng(0)
    shapes = [(name, row.shape) for row in tensors(family, config) for name, _ in row.parts()]
    total = sum(4 * int(np.prod(shape)) for _, shape in shapes)
    write_shards(path, ((name, rng.random(shape, np.float32)) for name, shape in shapes), total / shards)
    (path / "config.json").write_text(json.dumps(write_config(family, config)))
    return total


def memory(kinds: tuple[str, ...]) -> int:
    """Bytes of this process by kind of memory, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.split(":")[0] in kinds)


def load(path: str, dtype: str, quantisation: str | None) -> dict:
    """Load the checkpoint while a thread watches."""
    kinds = {"ratio": ("RssAnon",), "ratio_with_files": ("RssAnon", "RssFile")}
    jax.block_until_ready(jax.numpy.zeros(8) + 1)  # what JAX itself takes is there before
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
    held = tree_bytes(frozen)
    ratios = {name: round((peak[name] - before[name]) / held, 3) for name in kinds}
    return {"parameters_gb": round(held / 1e9, 3), "load_s": round(seconds, 1)} | ratios


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the checkpoint, in float32")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantisation", choices=["int8", "int4"])
    parser.add_argument("--load", help=argparse.SUPPRESS)  # the inner process
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
