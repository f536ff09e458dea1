"""Reads and writes Hugging Face directories of safetensors."""

import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from flex_jax.errors import InputError
from flex_jax.files import local_path, write_json
from flex_jax.models.config import ModelConfig
from flex_jax.models.decoder import Decoder
from flex_jax.models.families import FAMILIES
from flex_jax.models.families.family import read_config, weight_map, write_config
from flex_jax.models.weight_map import WeightMapping
from flex_jax.ops.quantised import Quantised, dequantise, quantise
from flex_jax.terminal import tell

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # some checkpoints contain a tied head as well
FUSED = "mlp.experts.gate_up_proj"  # end of a tensor's name, if all experts of a layer share the tensor
READABLE = ("F64", "F32", "F16", "BF16")
IGNORED = re.compile(r".*rotary_emb\.inv_freq")  # computed, not learnt; some old checkpoints contain it
DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py"]  # configs, weights, tokenizer and code
READ_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
MAX_NAMED_ERRORS = 8  # wrong tensors that the error line names; further ones are only counted
SHARD_BYTES = 5e9

Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]  # (path of a parameter, shape) -> sharding


def find_checkpoint(path) -> Path:
    """Returns the local directory of a checkpoint: a directory, or a Hugging Face model to download."""
    directory = local_path(path)
    if directory.exists():
        return directory
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise InputError(f"{path}: no such checkpoint directory, and not the name OWNER/MODEL of a Hub model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=DOWNLOADED))
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{path}: no such directory here, and if it is the name of a Hub model, that is not in the local cache and "
            f"the Hub cannot be reached; on a machine that can reach it, run: hf download {path}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"{path}: no such directory, and it cannot be downloaded from the Hub: {error}") from error


def checkpoint_files(directory: Path) -> list[Path]:
    """Returns the files of a checkpoint that decide about a model and its tokenizer, in order."""
    return sorted(file for file in directory.iterdir() if file.suffix in READ_SUFFIXES and file.is_file())


def read_model_config(file: Path) -> ModelConfig:
    if not file.is_file():
        raise InputError(f"{file.parent}: not a checkpoint directory (no {file.name})")
    raw = read_json(file)
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"{file}: model_type {name!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    try:
        return read_config(FAMILIES[name], raw)
    except KeyError as error:
        raise InputError(f"{file}: key {error} is missing") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{file}: not supported: {error}") from error


def load_pretrained(
    path, *, dtype: str = "float32", quantisation: str | None = None, sharding: Sharding | None = None
) -> tuple[Decoder, dict]:
    """Loads a model and its frozen parameters.

    `path` is a Hugging Face directory or the name of a model on the Hub. All weights are cast to `dtype`, "float32" or
    "bfloat16". With a quantisation "int8" or "int4", the matrices of the layers, except routers, become `Quantised`.
    `sharding` gives each parameter's sharding; None puts all on one device. At most one tensor is in memory in addition
    to the parameters. Raises InputError if the checkpoint is broken or not supported.
    """
    directory = find_checkpoint(path)
    config = read_model_config(directory / "config.json")
    with contextlib.ExitStack() as stack:
        files = _open(directory, stack)
        fused = any(name.endswith(FUSED) for name in files)
        mappings = weight_map(FAMILIES[config.family], config, fused=fused)
        check_tensors(directory, mappings, files, quantisation)
        flat, count = {}, sum(1 for mapping in mappings for _ in mapping.parts())
        with tqdm(total=count, desc="load", unit=" tensors", delay=3) as progress:
            for mapping in mappings:
                parameter = empty_parameter(mapping, dtype, quantisation, sharding)
                for name, start in mapping.parts():
                    part = files[name].get_tensor(name)
                    parameter = _write_part(parameter, part, np.array(start, np.int32), mapping.transposed)
                    jax.block_until_ready(parameter)  # otherwise parts that wait for the device pile up in memory
                    progress.update()
                flat[mapping.path] = parameter
    return Decoder(config, stacked=sharding is None), unflatten_dict(flat, sep="/")


def empty_params(config: ModelConfig, *, dtype: str, quantisation: str | None = None) -> dict:
    """Returns zeros for every parameter. Under `jax.eval_shape` these are shapes."""
    mappings = weight_map(FAMILIES[config.family], config)
    return unflatten_dict({m.path: empty_parameter(m, dtype, quantisation) for m in mappings}, sep="/")


def empty_parameter(
    mapping: WeightMapping, dtype: str, quantisation: str | None, sharding: Sharding | None = None
) -> jax.Array | Quantised:
    shape = mapping.parameter_shape
    leaves = jax.ShapeDtypeStruct(shape, dtype)
    if quantisation and mapping.quantisable:
        leaves = jax.eval_shape(lambda: quantise(jnp.zeros(shape), quantisation, dtype))

    def zeros(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype, device=sharding and sharding(mapping.path, leaf.shape))

    return jax.tree.map(zeros, leaves)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _write_part(parameter: jax.Array | Quantised, part: jax.Array, start: jax.Array, transposed: bool):
    """Returns the parameter with one part written at `start`, in the same memory."""
    source = jnp.swapaxes(part, -1, -2) if transposed else part
    if isinstance(parameter, Quantised):
        kind = "int4" if parameter.values.dtype == jnp.uint8 else "int8"
        source = quantise(source, kind, parameter.scales.dtype)

    def write(leaf, piece):
        # bfloat16 is written as integers: otherwise XLA on CPU converts the whole array to float32 and back.
        bits = jnp.uint16 if leaf.dtype == jnp.bfloat16 else leaf.dtype
        piece = lax.bitcast_convert_type(piece.astype(leaf.dtype), bits)
        stacked = piece.reshape((1,) * (leaf.ndim - piece.ndim) + piece.shape)
        written = lax.dynamic_update_slice(lax.bitcast_convert_type(leaf, bits), stacked, list(start))
        return lax.bitcast_convert_type(written, leaf.dtype)

    return jax.tree.map(write, parameter, source)


def read_json(file: Path) -> dict:
    """Reads a JSON object. Raises InputError that names the file and what is wrong with it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_distinct_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: broken JSON ({error})") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: not a JSON object")
    return value


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict:
    if len(value := dict(pairs)) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {name!r} stands twice in one object")
    return value


def _open(directory: Path, stack) -> dict:
    """Returns {tensor name: the open file that contains it}. A line on stderr names the weights that are not read."""
    names = [WEIGHTS]
    if (directory / INDEX).is_file():
        shard_of = read_json(directory / INDEX).get("weight_map")
        if not isinstance(shard_of, dict) or not shard_of:
            raise InputError(f"{directory / INDEX}: key 'weight_map' is missing")
        for file in shard_of.values():
            if not isinstance(file, str) or Path(file).name != file or not file.isprintable():
                raise InputError(f"{directory / INDEX}: {file!r} is not the name of a file next to it")
        names = sorted(set(shard_of.values()))
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    if WEIGHTS in present and WEIGHTS not in names:
        missing = [name for name in names if name not in present]
        state = f"{missing[0]} is missing" if missing else "all of them are there"
        raise InputError(
            f"{directory}: has {WEIGHTS}, which transformers reads, and {INDEX}, which names {len(names)} other files "
            f"({state}): delete what is out of date"
        )
    if present and names == [WEIGHTS] and WEIGHTS not in present:
        raise InputError(f"{directory}: missing weights file {WEIGHTS}, or {INDEX} that names {present[0]!r}")
    files = {}
    for name in names:
        opened = open_tensors(directory / name, stack)
        if duplicates := sorted(files.keys() & opened.keys()):
            raise InputError(f"{directory / name}: tensor {duplicates[0]} is also in another file of the checkpoint")
        files |= opened
    tell_unread(directory, names)
    return files


def tell_unread(directory: Path, names: list[str]) -> None:
    """Prints a line on stderr that names the other weights of a directory, if there are any."""
    if unread := sorted(path.name for path in directory.glob("*.safetensors") if path.name not in names):
        tell(f"{directory}: weights not read: {', '.join(map(repr, unread))}")


def open_tensors(file: Path, stack: contextlib.ExitStack) -> dict:
    """Returns {tensor name: the open file}. `stack` closes the file. Raises InputError if it is missing or broken."""
    try:
        if not file.is_file():
            raise InputError(f"{file}: missing weights file")
        opened = stack.enter_context(safe_open(file, framework="np"))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read as a complete safetensors file ({error})") from error
    return dict.fromkeys(opened.keys(), opened)


def check_tensors(directory: Path, mappings: list[WeightMapping], files: dict, quantisation: str | None = None) -> None:
    """Raises InputError that names tensors of `files` that are missing, unknown, misshapen or cannot be quantised."""
    shapes = {name: mapping.shape for mapping in mappings for name, _ in mapping.parts()}
    unknown = (name for name in sorted(files.keys() - shapes.keys()) if not IGNORED.fullmatch(name))
    wrong = []
    for name, shape in shapes.items():
        stored = files[name].get_slice(name) if name in files else None
        if stored is None:
            wrong.append(f"{name} is missing")
        elif tuple(stored.get_shape()) != shape:
            wrong.append(f"{name} has shape {stored.get_shape()}, not {list(shape)}")
        elif stored.get_dtype() not in READABLE:
            wrong.append(f"{name} has type {stored.get_dtype()}, not one of {', '.join(READABLE)}")
    tied = EMBEDDING in shapes and HEAD not in shapes
    wrong += [f"{name} is not part of the model" for name in unknown if not (tied and name == HEAD)]
    if (
        tied
        and not wrong
        and HEAD in files
        and not _equal(*(files[name].get_slice(name) for name in (HEAD, EMBEDDING)))
    ):
        wrong.append(f"{HEAD} differs from {EMBEDDING}, though tie_word_embeddings is true")
    for mapping in mappings:
        inputs = mapping.part_shape[-2:][0]
        if quantisation and mapping.quantisable and inputs % 2:
            wrong.append(f"{mapping.path} has {inputs} inputs; {quantisation} needs an even number")
    if wrong:
        more = f"; and {len(wrong) - MAX_NAMED_ERRORS} more" if len(wrong) > MAX_NAMED_ERRORS else ""
        count = f"{len(wrong)} wrong tensor{'s' * (len(wrong) > 1)}"
        raise InputError(f"{directory}: {count}: {'; '.join(wrong[:MAX_NAMED_ERRORS])}{more}")


def _equal(one, other) -> bool:
    """Whether two tensors of open files are equal. Memory: some of their rows."""
    if (one.get_shape(), one.get_dtype()) != (other.get_shape(), other.get_dtype()):
        return False
    rows = one.get_shape()[0]
    pieces = (slice(start, min(start + 4096, rows)) for start in range(0, rows, 4096))
    return all(np.array_equal(one[piece], other[piece]) for piece in pieces)


def save_pretrained(path, config: ModelConfig, frozen: dict, *, tokenizer=None, raw: dict | None = None, extra=()):
    """Writes a Hugging Face directory that `load_pretrained` and transformers read, in shards of at most 5 GB.

    Quantised tensors are written dequantised, with a transformers `tokenizer` if there is one. `raw` is the
    config.json, by default made from `config`; `extra` has further (name on disk, array) pairs.
    """
    path, family = Path(path), FAMILIES[config.family]
    path.mkdir(parents=True, exist_ok=True)
    flat: dict[str, Any] = dict(flatten_dict(frozen, sep="/"))
    parts = (m.disassemble(np.asarray(dequantise(flat[m.path]))) for m in weight_map(family, config))
    write_shards(path, itertools.chain(itertools.chain.from_iterable(parts), extra))
    raw = (write_config(family, config) if raw is None else raw) | {"dtype": str(flat["embedding"].dtype)}
    if tokenizer is not None:
        raw |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        tokenizer.save_pretrained(path)
    write_json(path / "config.json", raw)


def write_shards(path: Path, parts: Iterable[tuple[str, np.ndarray]], shard_bytes: float = SHARD_BYTES) -> None:
    """Writes (name on disk, array) pairs to one file, or to several with an index. Memory: one shard at a time."""
    shards, shard, size, total = [], {}, 0, 0

    def flush():
        save_file(shard, path / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))

    for name, array in parts:
        if shard and size + array.nbytes > shard_bytes:
            flush()
            shard, size = {}, 0
        shard[name] = array
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    shard_of = {}
    for i, names in enumerate(shards):
        file = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (path / f"part-{i}").rename(path / file)
        shard_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": shard_of})
