"""Damaged checkpoints: refused by name, or read as transformers reads them."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from flex_jax.building import build_backbone, build_federation, load_data_of
from flex_jax.errors import InputError
from flex_jax.main import parse
from tests.program import arguments
from tests.torture.battery import Case, Outcome, require
from tests.torture.programs import Lab

WEIGHTS = "model.safetensors"
VALUES = [
    None,
    -1,
    0,
    1,
    2,
    1.5,
    10**30,
    "",
    "a",
    [],
    {},
    True,
    False,
    [1],
    {"rope_type": "yarn", "factor": 4.0},
    1e9,
    "float8",
]
NEAR = 1e-4  # of a logit
TOKENS = np.arange(20).reshape(2, 10) + 3


def edit(file: str, change: Callable[[Any], Any], folder: Path) -> None:
    path = folder / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def set_key(key: str, value: Any, config: dict) -> dict:
    return config | {key: value}


def drop_key(key: str, config: dict) -> dict:
    return {name: value for name, value in config.items() if name != key}


def tensors(change: Callable[[dict[str, np.ndarray]], None], folder: Path) -> None:
    arrays = load_file(folder / WEIGHTS)
    change(arrays)
    save_file(arrays, folder / WEIGHTS, {"format": "pt"})


def cut(file: str, share: float, folder: Path) -> None:
    path = folder / file
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(file: str, position: float, bit: int, folder: Path) -> None:
    content = bytearray((folder / file).read_bytes())
    content[int(position * min(len(content), 3000))] ^= 1 << bit  # where the names and shapes are
    (folder / file).write_bytes(content)


def other_kind(file: str, make: Callable[[Path], Any], folder: Path) -> None:
    (folder / file).unlink()
    make(folder / file)


def old_shards(complete: bool, folder: Path) -> None:
    """Puts shards of other weights, or only their index, beside the file."""
    arrays = {name: array + 1 for name, array in load_file(folder / WEIGHTS).items()}
    shard = "model-00001-of-00001.safetensors"
    if complete:
        save_file(arrays, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(arrays, shard)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def two_ropes(folder: Path) -> None:
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    yarn = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}
    edit("config.json", lambda config: config | both | yarn, folder)


def expected_logits(folder: Path) -> np.ndarray:
    """Returns the logits of transformers, or raises what it raises."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def decoded(folder: Path) -> list[str]:
    from transformers import AutoTokenizer

    texts = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return [
        texts.decode(texts(text)["input_ids"], skip_special_tokens=True) for text in ("Name two fruits.", "2 + 2 = 4")
    ]


def load(lab: Lab, damage: Callable[[Path], None], folder: Path) -> Outcome:
    """Builds the backbone and the clients of a damaged copy, and compares the logits with those of transformers."""
    path = Path(shutil.copytree(lab.folder / "model", folder / "model"))
    damage(path)
    config, _ = parse(arguments(path, folder / "run"))
    try:
        backbone = build_backbone(config)
        build_federation(config, backbone, load_data_of(config), 0)
    except InputError as error:
        require(str(path) in str(error) or "config." in str(error), Outcome.TRACEBACK, f"does not name it: {error}")
        require(len(str(error)) < 3000, Outcome.TRACEBACK, f"{len(str(error))} characters")
        return Outcome.REFUSED
    logits = np.asarray(backbone.model.apply({"params": backbone.params}, jnp.asarray(TOKENS)).logits)
    try:
        expected = expected_logits(path)
    except Exception:  # transformers is stricter: then nothing may have changed
        expected = expected_logits(lab.folder / "model")
    require(logits.shape == expected.shape, Outcome.WRONG, f"logits {logits.shape}, transformers' {expected.shape}")
    if not np.isfinite(logits).all():  # no plausible number: a run tells that its loss is NaN
        return Outcome.SURVIVED
    near = np.allclose(logits, expected, rtol=0, atol=NEAR)
    require(near, Outcome.WRONG, f"logits differ by {np.abs(logits - expected).max():.3g} from those of transformers")
    require(decoded(path) == decoded(lab.folder / "model"), Outcome.WRONG, f"the tokenizer gives {decoded(path)}")
    return Outcome.SURVIVED


def damages(lab: Lab) -> Iterator[tuple[str, Callable[[Path], None]]]:
    random, model = lab.random("checkpoints"), lab.folder / "model"
    config = json.loads((model / "config.json").read_text())
    names = sorted(load_file(model / WEIGHTS))
    texts = [file.name for file in sorted(model.glob("*.json")) if file.name != "config.json"]
    yield "two kinds of rope", two_ropes
    yield "old shards beside the file", partial(old_shards, True)
    yield "an old index beside the file", partial(old_shards, False)
    for number in range(lab.count(90, 6)):
        key, value = random.choice([*config, "rope_scaling", "quantization_config"]), random.choice(VALUES)
        change = partial(drop_key, key) if number % 4 == 0 else partial(set_key, key, value)
        title = f"config.json without {key}" if number % 4 == 0 else f"config.json: {key} = {value!r}"
        yield title, partial(edit, "config.json", change)
    for number in range(lab.count(50, 3)):
        name, kind = random.choice(names), number % 6
        changes = {
            "missing": lambda arrays, name=name: arrays.pop(name),
            "of another shape": lambda arrays, name=name: arrays.update({name: arrays[name].repeat(2, axis=0)}),
            "transposed": lambda arrays, name=name: arrays.update({name: np.ascontiguousarray(arrays[name].T)}),
            "of integers": lambda arrays, name=name: arrays.update({name: arrays[name].astype(np.int32)}),
            "NaN": lambda arrays, name=name: arrays[name].fill(np.nan),
            "renamed": lambda arrays, name=name: arrays.update({f"{name}.old": arrays.pop(name)}),
        }
        title, change = list(changes.items())[kind]
        yield f"{name} {title}", partial(tensors, change)
    for number in range(lab.count(25, 2)):
        file = random.choice([WEIGHTS, "config.json", *texts])
        damage = (
            partial(cut, file, random.random())
            if number % 2
            else partial(flip, file, random.random(), random.randrange(8))
        )
        yield f"{file} {'cut' if number % 2 else 'with a flipped bit'}, {number}", damage
    for file in [WEIGHTS, "config.json", *texts]:
        for title, make in {"a directory": Path.mkdir, "empty": Path.touch, "missing": lambda path: None}.items():
            yield f"{file} {title}", partial(other_kind, file, make)
        if file != WEIGHTS:
            for content in ("[]", "3", '{"model": 3}', "[" * 100_000):
                yield f"{file} is {content[:20]}", partial(other_kind, file, lambda path, c=content: path.write_text(c))


def cases(lab: Lab) -> Iterator[Case]:
    for title, damage in list(damages(lab))[: lab.count(1000, 5)]:
        yield Case(title, partial(load, lab, damage))
