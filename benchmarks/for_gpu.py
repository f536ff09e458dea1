"""A round compiled for a GPU that is not there: that it compiles, and the bytes that it will hold.

    python benchmarks/for_gpu.py benchmarks/shapes/Qwen1.5-MoE-A2.7B.json --target h200.txtpb \\
        --config.model.dtype=bfloat16 --config.batch_size=4 --config.sequence_length=512 --config.local_steps=2

--target: what the GPU is, in the words of XLA, which keeps such files in xla/backends/gpu/target_config/specs (fields
that are newer than the installed jaxlib have to be taken out). JAX's CUDA plugin has to be installed (`pip install
"jax[cuda12]"`), a driver not. The setting is given as for round.py. Nothing runs, so nothing is timed, and kernels are
not tuned. Prints one JSON line: `round_gb`, arguments and scratch of the compiled round, beside what the plan says;
`kernels`, how often each kernel of a library or of ours is in it.
"""

import argparse
import os
import re
import time
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it asks the driver
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")  # tuning runs on the GPU

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from measure import emit
from round import backbone_shapes, read_setting

from flex_jax.data.batches import Batch
from flex_jax.simulation import Backbone, any_run, build_round, describe


def compile_for(device, config, backbone: Backbone):
    """The compiled round, from shapes alone."""
    made = {}

    def start(params):
        made["run"] = any_run(config, backbone._replace(params=params), jax.random.PRNGKey(0))
        frozen, state, clients = made["run"].start
        return frozen, state._replace(clients=clients(np.arange(config.clients)))

    frozen, state = jax.eval_shape(start, backbone.params)
    grid = (config.clients, config.local_steps, config.batch_size, config.sequence_length)
    batches = Batch(jax.ShapeDtypeStruct(grid, np.int32), jax.ShapeDtypeStruct(grid, np.float32))
    cohort, examples = (jax.ShapeDtypeStruct((config.clients,), dtype) for dtype in (np.int32, np.float32))
    there = NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec())
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there),
        (frozen, state, batches, cohort, examples),
    )
    return build_round(config, made["run"]).lower(*arguments).compile()


def main() -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a config.json")
    parser.add_argument("--target", type=Path, required=True, help="a .txtpb file that describes the GPU")
    parser.add_argument("--config", default="configs/dolly_pathological.py")
    parser.add_argument("--method", default="flex")
    known, changes = parser.parse_known_args()
    config = read_setting(known, changes)
    backbone = backbone_shapes(config, known.model)
    target = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=known.target.read_text())
    # What operators ask, to choose how they compute.
    with (
        mock.patch("jax.default_backend", lambda: "gpu"),
        mock.patch("flex_jax.ops.grouped._has_triton", lambda: True),
    ):
        planned = describe(config, backbone, known.method)
        started = time.perf_counter()
        compiled = compile_for(target.devices[0], config, backbone)
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return emit(
        {
            "model": known.model.stem,
            "method": known.method,
            "dtype": config.model.dtype,
            "quantisation": config.model.quantisation,
            "remat": config.model.remat,
            "clients": config.clients,
            "compile_s": round(time.perf_counter() - started, 1),
            "round_gb": round(held / 1e9, 2),
            "planned_gb": round(planned["peak_bytes"] / 1e9, 2),
            "kernels": Counter(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text())),
            "device": target.devices[0].device_kind,
        }
    )


if __name__ == "__main__":
    main()
