import gzip
import json
from collections import Counter

import pytest

from flex_jax.data.sources import load_records
from flex_jax.errors import InputError

ROWS = [
    {"instruction": "Say hi.", "context": "", "response": "Hi.\u2028There.", "category": "chat", "department": "A"},
    {"instruction": "Add.", "context": "1 2", "response": "3", "category": "maths", "department": "B"},
]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows, path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl(ROWS)),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("bom_and_blank_lines.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS).replace(b"\n", b"\r\n\r\n")),
    ],
)
def test_every_format_gives_the_same_records(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert load_records(str(tmp_path / name)) == ROWS


def test_parquet(tmp_path):
    parquet(ROWS, tmp_path / "a.parquet")
    assert load_records(str(tmp_path / "a.parquet")) == ROWS


def test_a_directory_is_its_data_files_in_sorted_order(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(jsonl(ROWS[1:]))
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:1]))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    assert load_records(str(tmp_path)) == ROWS


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "input": "c", "output": "r"}, ("q", "c", "r", "alpaca")),
        ({"question": "q", "answer": " r\n#### 4 "}, ("q", "", " r\n#### 4 ", "math")),
        ({"prompt": "q", "completion": "r", "category": "k"}, ("q", "", "r", "k")),
        ({"instruction": "q", "response": "r"}, ("q", "", "r", "instruction_response")),
        ({"instruction": "q", "context": None, "response": "r", "category": None}, ("q", "", "r", "dolly")),
    ],
)
def test_auto_finds_the_columns(tmp_path, row, expected):
    (tmp_path / "a.jsonl").write_bytes(jsonl([row]))
    keys = ("instruction", "context", "response", "category")
    assert load_records(str(tmp_path / "a.jsonl")) == [dict(zip(keys, expected, strict=True))]


def test_fields_names_one_mapping_where_several_fit(tmp_path):
    row = {"instruction": "q", "context": "c", "response": "r", "prompt": "p", "completion": "d"}
    (tmp_path / "a.jsonl").write_bytes(jsonl([row]))
    assert load_records(str(tmp_path / "a.jsonl"))[0]["response"] == "r"
    assert load_records(str(tmp_path / "a.jsonl"), fields="prompt_completion")[0]["response"] == "d"


def test_other_columns_are_strings(tmp_path):
    row = {"instruction": "q", "response": "r", "department": 7, "tags": ["a"], "note": None}
    (tmp_path / "a.jsonl").write_bytes(jsonl([row]))
    record = load_records(str(tmp_path / "a.jsonl"))[0]
    assert record["department"] == "7" and record.keys().isdisjoint({"tags", "note"})


GOOD = jsonl(ROWS[:1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: no record"),
        ("a.jsonl", b"\n \n", "a.jsonl: no record"),
        ("a.json", b"[]", "a.json: no record"),
        ("a.json", b"", "a.json: no record"),
        ("a.csv", b"x", r"a.csv: the file's name must end in one of .json,"),
        ("a.jsonl", GOOD + b"{'x': 1}\n", "a.jsonl:2: broken JSON"),
        ("a.json", b'[\n{"instruction": "q",\n]', "a.json:[23]: broken JSON"),
        ("a.json", b'{"instruction": "q"}', "a.json: must be a list"),
        ("a.jsonl", GOOD + b'["q"]\n', "a.jsonl:2: a record must be an object, not list"),
        ("a.json", b"[1]", "a.json: record 1: a record must be an object, not int"),
        ("a.jsonl", GOOD + b'{"instruction": "q"}', "a.jsonl:2: the record has no response"),
        ("a.jsonl", GOOD + b'{"response": "r"}', "a.jsonl:2: the record has no instruction"),
        ("a.jsonl", GOOD + b'{"instruction": "q", "response": " \\n"}', "a.jsonl:2: response is empty"),
        ("a.jsonl", GOOD + b'{"instruction": "q", "response": 5}', "a.jsonl:2: response must be a string, not int"),
        ("a.jsonl", GOOD + b'{"instruction": "q", "response": "r", "category": 5}', "a.jsonl:2: category must be"),
        ("a.jsonl", GOOD + b'{"instruction": "q", "response": "\\ud83d"}', "a.jsonl:2: response contains half a su"),
        ("a.jsonl.gz", gzip.compress(GOOD * 9)[:-12], r"a.jsonl.gz:\d+: cannot be read"),
        ("a.jsonl.gz", GOOD, "a.jsonl.gz:1: cannot be read"),
        ("a.jsonl", GOOD + b'{"instruction": "\xff"}\n', "a.jsonl:2: not UTF-8"),
        ("a.parquet", b"PAR1", "a.parquet: not a readable parquet file"),
        ("a.jsonl", b'{"text": "t"}', "a.jsonl:1: .* columns are text; known are dolly .* alpaca .* gsm8k"),
    ],
)
def test_bad_input_is_one_line_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_records(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_directory_without_data_files(tmp_path):
    with pytest.raises(InputError, match="no file in it ends in one of"):
        load_records(str(tmp_path))


def test_an_empty_file_in_a_directory_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match="b.jsonl: no record"):
        load_records(str(tmp_path))


@pytest.mark.parametrize("path", ["missing.jsonl", "folder/missing.json.gz", "/no/such", "./no", "~/no/such", "a/b/c"])
def test_a_missing_file_is_not_looked_for_on_the_hub(path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(InputError, match="no such file"):
        load_records(path)


def test_unknown_fields_lists_the_names():
    with pytest.raises(InputError, match="'dolyl' is unknown; choose auto or one of dolly, alpaca"):
        load_records("tiny", fields="dolyl")


def test_tiny_is_the_embedded_task_set():
    records = load_records("tiny")
    assert len(records) > 100
    assert all({"instruction", "context", "response", "category"} <= record.keys() for record in records)


def test_a_hub_dataset_is_loaded_by_name_and_split(monkeypatch):
    import datasets

    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: calls.append((name, split)) or ROWS)
    assert load_records("owner/name-2.5", split="test") == ROWS
    assert calls == [("owner/name-2.5", "test")]


def test_offline_says_what_to_download(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="download the dataset no-such-owner/no-such-name") as error:
        load_records("no-such-owner/no-such-name")
    assert "\n" not in str(error.value)


def test_dolly_has_its_official_counts(shared_data):
    records = load_records(str(shared_data / "dolly-15k.jsonl.gz"))
    assert Counter(record["category"] for record in records) == {
        "open_qa": 3742,
        "general_qa": 2191,
        "classification": 2136,
        "closed_qa": 1773,
        "brainstorming": 1766,
        "information_extraction": 1506,
        "summarization": 1188,
        "creative_writing": 709,
    }
