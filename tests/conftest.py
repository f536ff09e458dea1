"""What several test folders use."""

import itertools
import os
from pathlib import Path

from jaxlib.version import __version_info__ as jaxlib_version

# Most programs of the tests run once or twice, so compiling takes most of the time. This leaves a third of it on a CPU.
os.environ.setdefault("TQDM_DISABLE", "1")  # on a busy machine loading gets a progress bar, which is no error line
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + (" --xla_cpu_use_fusion_emitters=false" if jaxlib_version < (0, 11) else ""),  # unknown, and so fatal, later
)

import jax
import jax.numpy as jnp
import pytest

from flex_jax.models.adapters import AdapterConfig
from flex_jax.models.config import LoraConfig, SlotConfig
from flex_jax.models.decoder import Decoder
from tests.program import save_checkpoint, small_model

TESTS = itertools.count()


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """Every compiled program maps memory. Linux lets a process have 65,530 maps; with more, XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if next(TESTS) % 8 == 0 and maps.exists():
        if maps.read_bytes().count(b"\n") > 20_000:
            jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data (dolly-15k.jsonl.gz and others): FLEX_JAX_SHARED_DATA, or next to the repository."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FLEX_JAX_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip("no real data: set FLEX_JAX_SHARED_DATA to a folder with dolly-15k.jsonl.gz")
    return folder


@pytest.fixture(scope="session")
def model_config():
    """A Qwen2-MoE of a few thousand weights."""
    return small_model()


@pytest.fixture(scope="session")
def adapter_config():
    return AdapterConfig(LoraConfig(rank=2, alpha=4.0), SlotConfig())


@pytest.fixture(scope="session")
def model(model_config, adapter_config):
    return Decoder(model_config, adapter_config)


@pytest.fixture(scope="session")
def params(model_config):
    """Random weights in which nothing is zero or one, so that a forgotten bias or scale shows."""
    fresh = Decoder(model_config).init(jax.random.PRNGKey(0), jnp.zeros((1, 4), jnp.int32))["params"]
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.PRNGKey(1), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@pytest.fixture(scope="session")
def tokens(model_config):
    return jax.random.randint(jax.random.PRNGKey(2), (4, 11), 0, model_config.vocab_size)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random model with the embedded tokenizer, as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("random") / "model"
    save_checkpoint(path)
    return path
