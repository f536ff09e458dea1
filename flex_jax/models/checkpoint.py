"""Hugging Face directories of safetensors, in and out."""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives NumPy the name bfloat16, which safetensors asks for)
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from flex_jax.errors import InputError
from flex_jax.models.config import ModelConfig
from flex_jax.models.decoder import Decoder
from flex_jax.models.families import FAMILIES
from flex_jax.models.families.family import read_config, tensors, write_config
from flex_jax.models.tensors import Tensor
from flex_jax.ops.quantised import Quantised, dequantise, quantise

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FUSED = "mlp.experts.gate_up_proj"  # the name of the experts of a layer where they share a tensor
READABLE = ("F64", "F32", "F16", "BF16")
IGNORED = re.compile(r".*rotary_emb\.inv_freq")  # computed, not learnt; some old checkpoints hold it
DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py"]  # configs, weights, tokenizer and code
NAMED_ERRORS = 8  # wrong tensors that the error line names; the others are counted
SHARD_BYTES = 5e9

Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]  # of a parameter's path and shape


def find_checkpoint(path) -> Path:
    """The local directory of a checkpoint: `path` itself, or where the Hugging Face Hub model of this name lies once it
    is downloaded. Raises InputError when it is neither."""
    directory = Path(path).expanduser()
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
            f"the Hub cannot be reached; where it can, run: hf download {path}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"{path}: no such directory, and the Hub does not give it: {error}") from error


def read_model_config(file: Path) -> ModelConfig:
    """The ModelConfig of a config.json. Raises InputError for what is missing or not supported in it."""
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
    except ValueError as error:
        raise InputError(f"{file}: not supported: {error}") from error


def load_pretrained(
    path, *, dtype: str = "float32", quantisation: str | None = None, sharding: Sharding | None = None
) -> tuple[Decoder, dict]:
    """A model and its frozen parameters, from a Hugging Face directory or a Hub name.

    The family is read from config.json. Every weight is cast to `dtype` ("float32" or "bfloat16"); with `quantisation`
    ("int8" or "int4") the matrices of the layers, routers apart, become `Quantised` with scales of that dtype.
    `sharding` says where a parameter goes; by default to the one device. Tensors are read, cast and placed one by one,
    so that no more than one of them is in memory beside the parameters. Raises InputError with the missing, misshapen
    and unknown tensors named at once.
    """
    directory = find_checkpoint(path)
    config = read_model_config(directory / "config.json")
    with contextlib.ExitStack() as stack:
        files = _open(directory, stack)
        fused = any(name.endswith(FUSED) for name in files)
        table = tensors(FAMILIES[config.family], config, fused=fused)
        check_tensors(directory, table, files, quantisation)
        flat, count = {}, sum(1 for row in table for _ in row.parts())
        with tqdm(total=count, desc="load", unit=" tensors", delay=3) as progress:
            for row in table:
                parameter = empty_parameter(row, dtype, quantisation, sharding)
                for name, start in row.parts():
                    part = files[name].get_tensor(name)
                    parameter = _place(parameter, part, np.array(start, np.int32), row.transposed)
                    jax.block_until_ready(parameter)  # or the parts that wait for the device would pile up
                    progress.update()
                flat[row.path] = parameter
    return Decoder(config, stacked=sharding is None), unflatten_dict(flat, sep="/")


def empty_params(config: ModelConfig, *, dtype: str, quantisation: str | None = None) -> dict:
    """Zeros in the place of every parameter; under `jax.eval_shape`, shapes."""
    table = tensors(FAMILIES[config.family], config)
    return unflatten_dict({row.path: empty_parameter(row, dtype, quantisation) for row in table}, sep="/")


def empty_parameter(row: Tensor, dtype: str, quantisation: str | None, sharding: Sharding | None = None):
    """Zeros in the place of one parameter."""
    shape = row.parameter_shape
    if quantisation is None or not row.quantisable:
        leaves = jax.ShapeDtypeStruct(shape, dtype)
    else:
        leaves = jax.eval_shape(lambda: quantise(jnp.zeros(shape), quantisation, dtype))

    def zeros(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype, device=sharding and sharding(row.path, leaf.shape))

    return jax.tree.map(zeros, leaves)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _place(parameter: jax.Array | Quantised, part: jax.Array, start: jax.Array, transposed: bool):
    """The parameter with one part written into its memory at `start`."""
    if transposed:
        part = jnp.swapaxes(part, -1, -2)
    if isinstance(parameter, Quantised):
        kind = "int4" if parameter.values.dtype == jnp.uint8 else "int8"
        part = quantise(part, kind, parameter.scales.dtype)

    def write(leaf, piece):
        # bfloat16 as integers: on CPU, XLA would convert the whole array to float32 and back to write a part of it
        bits = jnp.uint16 if leaf.dtype == jnp.bfloat16 else leaf.dtype
        piece = lax.bitcast_convert_type(piece.astype(leaf.dtype), bits)
        stacked = piece.reshape((1,) * (leaf.ndim - piece.ndim) + piece.shape)
        written = lax.dynamic_update_slice(lax.bitcast_convert_type(leaf, bits), stacked, list(start))
        return lax.bitcast_convert_type(written, leaf.dtype)

    return jax.tree.map(write, parameter, part)


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises InputError when it holds anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: broken JSON ({error})") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: not a JSON object")
    return value


def _open(directory: Path, stack) -> dict:
    """Tensor name -> the open file that holds it."""
    names = [WEIGHTS]
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{directory / INDEX}: key 'weight_map' is missing")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise InputError(f"{directory / INDEX}: {file!r} is not the name of a file beside it")
        names = sorted(set(weight_map.values()))
    files = {}
    for name in names:
        opened = open_tensors(directory / name, stack)
        if twice := sorted(files.keys() & opened.keys()):
            raise InputError(f"{directory / name}: tensor {twice[0]} is in another file of the checkpoint too")
        files |= opened
    return files


def open_tensors(file: Path, stack: contextlib.ExitStack) -> dict:
    """Tensor name -> the open file, which `stack` closes. Raises InputError when it is missing or cut off."""
    if not file.is_file():
        raise InputError(f"{file}: missing weights file")
    try:
        opened = stack.enter_context(safe_open(file, framework="np"))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file that can be read ({error})") from error
    return dict.fromkeys(opened.keys(), opened)


def check_tensors(directory: Path, table: list[Tensor], files: dict, quantisation: str | None = None) -> None:
    """Raises InputError unless the tensors of `files` (name -> open file) are those of the table, and can be quantised
    where that is asked for; all wrong ones are named at once."""
    shapes = {name: row.shape for row in table for name, _ in row.parts()}
    unknown = (name for name in sorted(files.keys() - shapes.keys()) if not IGNORED.fullmatch(name))
    wrong = []
    for name, shape in shapes.items():
        if name not in files:
            wrong.append(f"{name} is missing")
            continue
        held = files[name].get_slice(name)
        if tuple(held.get_shape()) != shape:
            wrong.append(f"{name} has shape {held.get_shape()}, not {list(shape)}")
        elif held.get_dtype() not in READABLE:
            wrong.append(f"{name} has type {held.get_dtype()}, not one of {', '.join(READABLE)}")
    tied = "lm_head.weight" not in shapes  # some checkpoints hold the tied head as well
    wrong += [f"{name} is not part of the model" for name in unknown if not (tied and name == "lm_head.weight")]
    for row in table:
        inputs = row.part_shape[-2:][0]
        if quantisation and row.quantisable and inputs % 2:
            wrong.append(f"{row.path} has {inputs} inputs; {quantisation} needs an even number")
    if wrong:
        more = f"; and {len(wrong) - NAMED_ERRORS} more" if len(wrong) > NAMED_ERRORS else ""
        count = f"{len(wrong)} wrong tensor{'s' * (len(wrong) > 1)}"
        raise InputError(f"{directory}: {count}: {'; '.join(wrong[:NAMED_ERRORS])}{more}")


def save_pretrained(
    path, config: ModelConfig, frozen: dict, *, tokenizer=None, raw: dict | None = None, extra=()
) -> None:
    """Write a Hugging Face directory that `load_pretrained` and transformers read, in shards of at most 5 GB.

    The tensors keep their dtype; quantised ones are written as they are computed with. `tokenizer`, a transformers
    tokenizer, is saved beside them. raw: the config.json to write, by default one made from `config`; extra: more
    (name, array) pairs.
    """
    path, family = Path(path), FAMILIES[config.family]
    path.mkdir(parents=True, exist_ok=True)
    flat = flatten_dict(frozen, sep="/")
    parts = (
        pair for row in tensors(family, config) for pair in row.disassemble(np.asarray(dequantise(flat[row.path])))
    )
    write_shards(path, itertools.chain(parts, extra))
    raw = (write_config(family, config) if raw is None else raw) | {"dtype": str(flat["embedding"].dtype)}
    if tokenizer is not None:
        raw |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def write_shards(path: Path, parts: Iterable[tuple[str, np.ndarray]], shard_bytes: float = SHARD_BYTES) -> None:
    """Write (name on disk, array) pairs as one file, or as several and their index; one shard in memory at a time."""
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
    if len(shards) == 1:
        (path / "part-0").rename(path / WEIGHTS)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (path / f"part-{i}").rename(path / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
