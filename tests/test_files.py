import json
import os

import numpy as np
import pytest

from flex_jax import files
from flex_jax.files import to_plain, write_json, write_text


@pytest.mark.parametrize("number", [float("nan"), np.float32("inf"), np.array(-np.inf)])
def test_what_json_cannot_say_is_null(tmp_path, number):
    write_json(tmp_path / "a.json", {"runs": [{"eval_loss": number}]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"runs": [{"eval_loss": None}]}


def test_write_json_takes_numpy_at_any_depth(tmp_path):
    value = {"n": np.int64(3), "x": (np.float64(0.5),), "a": np.arange(4).reshape(2, 2)}
    write_json(tmp_path / "a.json", value)
    plain = {"n": 3, "x": [0.5], "a": [[0, 1], [2, 3]]}
    assert json.loads((tmp_path / "a.json").read_text()) == to_plain(value) == plain


def test_text_is_written_as_it_is(tmp_path):
    write_text(tmp_path / "a.txt", "± é\n")
    assert (tmp_path / "a.txt").read_bytes() == "± é\n".encode()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})

    def killed(descriptor):
        assert json.loads(path.read_text()) == {"old": 1}  # the new content is still elsewhere
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    monkeypatch.undo()
    write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}
    assert os.listdir(tmp_path) == ["results.json"]
