r"""Compiles a round for a GPU without having one: shows whether it compiles and how much memory it needs.

    python benchmarks/for_gpu.py benchmarks/shapes/Qwen1.5-MoE-A2.7B.json --target h200.txtpb \
        --config.model.dtype=bfloat16 --config.batch_size=4 --config.sequence_length=512 --config.local_steps=2

--target is a description of the GPU in XLA's format. XLA has such files in xla/backends/gpu/target_config/specs; remove
fields that the installed jaxlib does not know. JAX's CUDA plugin must be installed (`pip install "jax[cuda12]"`), but
no driver is needed. The setting is given as for round.py. Nothing runs, so there are no times, and kernels are not
tuned. Prints one JSON line: `round_gb` is the memory of the compiled round (arguments and temporary arrays),
`planned_gb` is that of the plan, and `kernels` counts the library kernels and custom kernels in it.
"""

import argparse
import os
import re
import time
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the check needs a driver
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")  # tuning needs the GPU

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from measure import emit
from round import backbone_shapes, read_setting, round_function

from flex_jax.building import Backbone, PreparedMethod, prepare_method, start_without_grafting
from flex_jax.data.batches import Batch


def compile_for(device, prepared: PreparedMethod, backbone: Backbone):
    """Returns the round compiled for a device, from shapes only."""
    config = prepared.config

    def start(params):
        run = start_without_grafting(config, prepared.spec, backbone._replace(params=params), jax.random.PRNGKey(0))
        return run.frozen, run.state._replace(clients=run.init_clients(np.arange(config.clients)))

    frozen, state = jax.eval_shape(start, backbone.params)
    grid = (config.clients, config.local_steps, config.batch_size, config.sequence_length)
    batches = Batch(jax.ShapeDtypeStruct(grid, np.int32), jax.ShapeDtypeStruct(grid, np.float32))
    cohort, num_examples = (jax.ShapeDtypeStruct((config.clients,), dtype) for dtype in (np.int32, np.float32))
    on_device = NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec())
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_device),
        (frozen, state, batches, cohort, num_examples),
    )
    return round_function(prepared, backbone).lower(*inputs).compile()


def main() -> dict:
    """Compiles the round and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a config.json")
    parser.add_argument("--target", type=Path, required=True, help="a .txtpb file that describes the GPU")
    parser.add_argument("--config", default="configs/dolly_pathological.py")
    parser.add_argument("--method", default="flex")
    known, changes = parser.parse_known_args()
    resolved = read_setting(known, changes)
    config = resolved.config
    backbone = backbone_shapes(config, known.model)
    target = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=known.target.read_text())
    # The operators ask for the backend, and choose their implementation by it.
    with mock.patch("jax.default_backend", lambda: "gpu"), mock.patch("flex_jax.ops.grouped._has_triton", lambda: True):
        prepared = prepare_method(resolved, backbone)
        started = time.perf_counter()
        compiled = compile_for(target.devices[0], prepared, backbone)
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return emit(
        {
            "model": known.model.stem,
            "method": known.method,
            "dtype": config.model.dtype,
            "quantisation": config.model.quantisation,
            "remat": config.model.remat,
            "clients": config.clients,
            "compile_s": round(time.perf_counter() - started, 1),
            "round_gb": round(total / 1e9, 2),
            "planned_gb": round(prepared.plan.peak_bytes / 1e9, 2),
            "kernels": Counter(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text())),
            "device": target.devices[0].device_kind,
        }
    )


if __name__ == "__main__":
    main()
