import gzip
import json
import os
from collections import Counter

import pytest

from flex_jax.data.sources import load_data, load_records
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
    with pytest.raises(
        InputError, match="instruction and prompt may each be the instruction: choose one with data.fie"
    ):
        load_records(tmp_path / "a.jsonl")
    assert load_records(str(tmp_path / "a.jsonl"), fields="dolly")[0]["response"] == "r"
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
        ("a.jsonl", GOOD + b'{"x": ' + b"[" * 100_000, "a.jsonl:2: broken JSON .* nested too deeply"),
        ("a.json", b'[{"x": "[[[["},\n{"x": ' + b"[" * 100_000, "a.json:2: broken JSON .* nested too deeply"),
        (
            "a.jsonl",
            GOOD + b'{"x": ' + b"9" * 10_000 + b"}",
            "a.jsonl:2: broken JSON .the number 9{20}, of 10000 characters, is too",
        ),
        ("a.json", b'[{"x": 1},\n{"x": ' + b"9" * 10_000 + b"}]", "a.json:2: broken JSON .the number 9{20}, of 10000"),
        ("a.jsonl", GOOD + b'{"x": 1e999}', "a.jsonl:2: broken JSON .the number 1e999"),
        ("a.jsonl", GOOD + b'{"x": -Infinity}', "a.jsonl:2: broken JSON .the number -Infinity"),
        ("a.jsonl", GOOD + b'{"instruction": "q", "response": "a\\u0000b"}', "a.jsonl:2: response contains a NUL byte"),
        ("a.jsonl", GOOD + b'{"\\u001b[31m": "q"}', "a.jsonl:2: a column's name must have .* not '.x1b"),
        ("a.jsonl", GOOD + b'{"\\ud83d": "q"}', "a.jsonl:2: a column's name must have .* not '.ud83d"),
        ("a.jsonl", GOOD.replace(b'chat"', b'a\\u0007"'), "a.jsonl:1: a category must have at most 200 characters"),
        ("a.jsonl", GOOD.replace(b"chat", b"c" * 300), "a.jsonl:1: a category must have at most 200 characters"),
        ("a.json", b'{"data": [{"instruction": "q"}]}', "a.json: must be a list of records or one record a line"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user"}]}',
            "a.jsonl:1: no column for .* columns are messages; recognised",
        ),
        ("a.parquet", b"PAR1", "a.parquet: not a readable parquet file"),
        (
            "a.jsonl",
            b'{"text": "t"}',
            "a.jsonl:1: no column for the instruction and the response: the columns are text; recognised are ins",
        ),
    ],
)
def test_bad_input_is_one_line_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_records(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_directory_without_data_files(tmp_path):
    with pytest.raises(InputError, match="doesn't contain any data files"):
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
    with pytest.raises(InputError, match="'dolyl' is unknown: choose auto, one of dolly, alpaca"):
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


def written(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jsonl(rows))
    return path


@pytest.mark.parametrize(
    ("row", "expected", "said"),
    [
        ({"question": "q", "context": "c", "answer": "r"}, ("q", "c", "r", "all"), "context <- context"),
        ({"instruction": "q", "input": "c", "response": "r"}, ("q", "c", "r", "all"), "context <- input"),
        ({"instruction": "q", "output": "r"}, ("q", "", "r", "all"), "context <- none, response <- output"),
        ({"Question": "q", "passage ": "c", "TARGET": "r"}, ("q", "c", "r", "all"), "context <- passage "),
        (
            {"instruction": "q", "input": "", "context": "c", "output": "r"},
            ("q", "c", "r", "all"),
            "context <- context",
        ),
    ],
)
def test_no_part_of_an_instruction_vanishes(tmp_path, row, expected, said):
    data = load_data(written(tmp_path / "a.jsonl", [row]))
    assert tuple(data.train[0][key] for key in ("instruction", "context", "response", "category")) == expected
    assert data.summary.startswith(f"1 records of {tmp_path}/a.jsonl: instruction <- ") and said in data.summary


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "q", "output": "r", "response": "s"}, "output and response may each be the response"),
        ({"instruction": "q", "question": "p", "answer": "r"}, "data.fields=instruction=instruction"),
        ({"prompt": "q", "input": "c", "context": "d", "completion": "r"}, "input and context may each be the context"),
    ],
)
def test_two_columns_for_one_role_are_refused(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        load_data(written(tmp_path / "a.jsonl", [row]))


def test_pairs_choose_columns(tmp_path):
    row = {"q": "q", "input": "c", "output": "r", "response": "s"}
    file = written(tmp_path / "a.jsonl", [row])
    data = load_data(file, fields="instruction=q, response=output")
    assert [data.train[0][key] for key in ("instruction", "context", "response")] == ["q", "c", "r"]
    assert data.summary.endswith("response <- output; not in the prompt: response")
    assert load_records(file, fields="instruction=q,context=,response=output")[0]["context"] == ""
    for fields, message in [
        ("instruction=nope,response=output", "no column nope; found are q, input, output, response"),
        ("instruction=q,instruction=q", "is unknown: choose auto"),
        ("instruction=", "is unknown: choose auto"),
        ("gsm8k", "no column question"),
    ]:
        with pytest.raises(InputError, match=message):
            load_records(file, fields=fields)


def test_the_summary_lists_what_is_not_in_the_prompt(tmp_path):
    row = {"instruction": "q", "output": "r", "id": 7, "tags": ["a"], "site": "x", "category": "k"}
    rows = [row, row | {"category": None, "output": "\x9b"}]
    summary = load_data(written(tmp_path / "a.jsonl", rows), column="site").summary
    assert (
        "; not in the prompt: id, tags (lists or objects, dropped); no category: 1 records, which get 'all'" in summary
    )
    assert summary.endswith("control characters in the text of 1 records, first " + f"{tmp_path}/a.jsonl:2")


def test_numbers_of_a_column_are_one_value_each(tmp_path):
    parquet([ROWS[0] | {"site": site} for site in (1.0, 2.5, float("nan"), None)], tmp_path / "a.parquet")
    assert [record.get("site") for record in load_records(tmp_path / "a.parquet")] == ["1", "2.5", None, None]
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl([ROWS[0] | {"site": site} for site in (1, 1.0, "1")]) + GOOD.replace(b'"A"', b"NaN"))
    assert [record.get("site") for record in load_records(file)] == ["1", "1", "1", None]


def test_all_empty_records_are_named_at_once_or_left_out(tmp_path):
    rows = [*ROWS, *[ROWS[0] | {"response": empty} for empty in ("", " ", None, "", "", "")]]
    file = written(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        InputError, match=r"^6 of 8 records cannot be used: .*a.jsonl:3: response is empty; .*:7: .*; and 1"
    ):
        load_records(file)
    data = load_data(file, skip_empty=True)
    assert data.train == ROWS and "left out for want of an instruction or response: 6 records" in data.summary
    with pytest.raises(InputError, match="no record of 'train' has an instruction and a response"):
        load_data(written(tmp_path / "b.jsonl", rows[2:]), skip_empty=True)


def test_json_lines_in_a_json_file(tmp_path):
    assert load_records(written(tmp_path / "lines.json", ROWS)) == ROWS


TEST_ROWS = [ROWS[0] | {"instruction": "test"}]


def save_to_disk(path):
    import datasets

    splits = {"train": ROWS, "test": TEST_ROWS}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(path)


def clone(path):
    written(path / "d" / "x.jsonl", ROWS)
    written(path / "d" / "y.jsonl", TEST_ROWS)
    files = "[{split: train, path: d/x.jsonl}, {split: test, path: d/y.jsonl}]"
    (path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n")


def files_or_folders(train, test):
    return lambda path: (written(path / train, ROWS), written(path / test, TEST_ROWS))


@pytest.mark.parametrize(
    "write",
    [
        files_or_folders("train.jsonl", "test.jsonl"),
        files_or_folders("my-train-0.json", "my_eval.jsonl"),
        files_or_folders("train/a.jsonl", "test/a.jsonl"),
        files_or_folders("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        clone,
        save_to_disk,
    ],
)
def test_the_splits_of_a_directory(tmp_path, write):
    directory = tmp_path / "set"
    write(directory)
    before = sorted(directory.rglob("*"))
    assert load_records(directory) == ROWS
    assert load_records(directory, split="test") == TEST_ROWS
    data = load_data(directory, test_split="test")
    assert (data.train, data.test) == (ROWS, TEST_ROWS) and ", 1 of its split test for testing: " in data.summary
    assert sorted(directory.rglob("*")) == before
    with pytest.raises(InputError, match="no split 'validation': its splits are train, test"):
        load_records(directory, split="validation")


def test_files_of_a_directory_that_are_not_read_are_told(tmp_path):
    written(tmp_path / "train.jsonl", ROWS)
    written(tmp_path / "test.jsonl", ROWS)
    written(tmp_path / "more.jsonl", ROWS)
    assert load_data(tmp_path).summary.endswith("; files not read: more.jsonl, test.jsonl")


def test_a_changed_file_of_a_directory_is_read_anew(tmp_path):
    file = written(tmp_path / "a.jsonl", ROWS)
    assert load_records(tmp_path) == ROWS
    stat = file.stat()
    file.write_bytes(file.read_bytes().replace(b"Say hi", b"Say ho"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_records(tmp_path)[0]["instruction"] == "Say ho."


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"split": "test"}, "no split 'test': its splits are train"),
        ({"test_split": "test"}, "no split 'test': its splits are train"),
        ({"test_split": "train"}, "data.test_split is 'train', as data.split is"),
    ],
)
def test_a_file_has_one_split(tmp_path, splits, message):
    for source in (written(tmp_path / "a.jsonl", ROWS), "tiny"):
        with pytest.raises(InputError, match=message):
            load_data(source, **splits)


def test_a_broken_directory_is_one_line(tmp_path):
    written(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(InputError, match="not a directory of data files"):
        load_records(tmp_path)
    save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved" / "train").glob("*.arrow")).write_bytes(b"no")
    with pytest.raises(InputError, match="not a readable data set of save_to_disk"):
        load_records(tmp_path / "saved")
