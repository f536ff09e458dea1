"""Malformed records: each file is read as it says, or refused with one line that names the place."""

import json
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flex_jax import tiny
from flex_jax.data.batches import encode_client
from flex_jax.data.columns import FIELDS
from flex_jax.data.partition import PartitionSettings, partition
from flex_jax.data.prompts import prompt_text
from flex_jax.data.sources import load_data
from flex_jax.errors import InputError
from tests.torture.battery import Case, Outcome, require
from tests.torture.programs import Lab

COLUMNS = [
    "instruction",
    "response",
    "context",
    "input",
    "output",
    "question",
    "answer",
    "category",
    "prompt",
    "completion",
]
PARTS = ("context", "input", "system", "passage")  # what an instruction may need
TEXT = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", " ", "\x00", "\ud83d", "<|endoftext|>", "\ufeff", "\u2028", "nan", "x" * 2000, "\r\n", "\x1b[0m"]
    ),
)
SCALAR = st.one_of(TEXT, st.none(), st.booleans(), st.integers(), st.floats(), st.just(10**400))
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=5
)
PAIRS = st.sampled_from([(f.instruction, f.response) for f in FIELDS.values()])

PUT = [b"[" * 100_000, b"9" * 10_000, b"NaN", b"\xff", b"\r", b"\n", b"\xef\xbb\xbf", b"\\ud83d", b"\x00"]


@st.composite
def rows(draw: st.DrawFn, sound: bool) -> dict[str, Any]:
    """Draws a record with further columns; an unsound one may have any values, and may lack a column."""
    instruction, response = draw(PAIRS)
    row: dict[str, Any] = {
        instruction: draw(st.text("abc é", min_size=1)) + "?",
        response: draw(st.text("xyz", min_size=1)),
    }
    names = st.sampled_from(COLUMNS[2:]) if sound else st.one_of(st.sampled_from(COLUMNS), TEXT)
    row |= draw(st.dictionaries(names, st.text("uvw ", max_size=9) if sound else VALUE, max_size=2)) | row
    if not sound and draw(st.booleans()):
        del row[draw(st.sampled_from([instruction, response]))]
    return row


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draws the suffix and the bytes of a data file."""
    suffix = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".parquet"]))
    kind = draw(st.sampled_from(["bytes", "sound", "sound", "sound", "unsound", "unsound", "edited", "edited"]))
    if kind == "bytes":
        return suffix, draw(st.binary(max_size=200))
    row, number = draw(rows(sound=True)), draw(st.integers(4, 8))
    items = [row | {name: f"{value}{i}" for name, value in row.items()} for i in range(number)]
    if kind == "unsound":
        items[draw(st.integers(0, number - 1))] = draw(rows(sound=False))
    texts = [json.dumps(item) for item in items]
    content = ("\n".join(texts) if suffix == ".jsonl" else f"[{','.join(texts)}]").encode()
    if kind == "edited":
        at = draw(st.integers(0, len(content)))
        put = draw(st.one_of(st.binary(max_size=3), st.sampled_from(PUT)))
        content = content[:at] + put + content[at + draw(st.integers(0, 5)) :]
    return suffix, content


def draw_files(number: int, first: int) -> list[tuple[str, bytes]]:
    """Returns `number` files, the same for the same seed."""
    drawn: list[tuple[str, bytes]] = []
    while len(drawn) < number:

        @seed(first + len(drawn))
        @settings(
            max_examples=number - len(drawn),
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(files())
        def collect(file: tuple[str, bytes]) -> None:
            drawn.append(file)

        collect()
    return drawn[:number]


def plain_rows(suffix: str, content: bytes) -> list[Any]:
    """Reads the rows as Python's json does, without the package."""
    text = content.decode("utf-8-sig")
    return [json.loads(line) for line in text.split("\n") if line.strip()] if suffix == ".jsonl" else json.loads(text)


def load(suffix: str, content: bytes, folder: Path) -> Outcome:
    """Reads a file, divides its records and encodes them."""
    file = folder / f"data{suffix}"
    file.write_bytes(content)
    try:
        data = load_data(str(file))
    except InputError as error:
        require("data" in str(error) and len(str(error)) < 3000, Outcome.TRACEBACK, str(error)[:3000])
        return Outcome.REFUSED
    records, sources = data.train, plain_rows(suffix, content)
    require(len(records) == len(sources), Outcome.WRONG, f"{len(records)} of {len(sources)} records: {content[:300]!r}")
    for record, source in zip(records, sources, strict=True):
        pairs = [(f.instruction, f.response) for f in FIELDS.values()]
        right = any(source.get(i) == record["instruction"] and source.get(r) == record["response"] for i, r in pairs)
        require(right, Outcome.WRONG, f"{record} of {source}")
        texts = all(isinstance(value, str) for value in record.values())
        require(texts and record["instruction"].strip() and record["response"].strip(), Outcome.WRONG, f"{record}")
        prompt = prompt_text(record)
        unread = [key for key in PARTS if isinstance(source.get(key), str) and source[key] not in prompt]
        untold = [key for key in unread if key not in data.summary.partition("not in the prompt")[2]]
        require(not untold, Outcome.WRONG, f"{untold} of {source} is dropped without a word")
    try:
        clients = partition(records, PartitionSettings("iid", test_examples=1), num_clients=1, seed=0)
        for client in clients:
            encode_client(client.name, client.train, tokenizer(), 64)
    except InputError:
        return Outcome.REFUSED
    return Outcome.SURVIVED


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny.CHECKPOINT)


def cases(lab: Lab) -> Iterator[Case]:
    for number, (suffix, content) in enumerate(draw_files(lab.count(5000, 200), lab.seed)):
        yield Case(f"file {number} ({suffix})", partial(load, suffix, content))
