"""The documents in docs/: made from the code, or tried as they stand."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import methods
from flex_jax.main import main
from tests.test_experiment import arguments, checkpoint  # noqa: F401  (a fixture)

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = re.findall(r"```python\n(.*?)```", (DOCS / "add_a_method.md").read_text(), re.DOTALL)
SHORT = ("--config.rounds=2", "--config.local_steps=2", "--config.evaluation.max_new_tokens=1")


def test_the_table_of_methods_is_that_of_the_code():
    assert (DOCS / "methods.md").read_text() == methods.table()


def test_a_method_in_a_file_of_ones_own_runs_beside_others(checkpoint, tmp_path):  # noqa: F811
    """The first example as it stands, under its own rank; it is no longer than promised."""
    assert len(BLOCKS[0].splitlines()) < 40
    (tmp_path / "mine.py").write_text(BLOCKS[0])
    more = (f'--config.methods=("fedavg","{tmp_path}/mine.py:fedexp")', "--config.overrides.fedexp.lora.rank=3")
    assert main(arguments(checkpoint, tmp_path / "run", *SHORT, *more)) == 0
    runs = json.loads((tmp_path / "run/results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["fedavg", "fedexp"]
    assert 2 * runs[1]["parameters"]["shared"] == 3 * runs[0]["parameters"]["shared"]


@pytest.mark.parametrize("name", ["fedsa", "fedprox"])
def test_the_other_examples_are_the_methods_of_the_package(name, checkpoint, tmp_path):  # noqa: F811
    block = next(block for block in BLOCKS if f"\n{name} = " in f"\n{block}")
    head = BLOCKS[0] + "\n"
    (tmp_path / "mine.py").write_text(head + block)
    losses = []
    for method in (f"{tmp_path}/mine.py:{name}", {"fedsa": "fedsa_lora", "fedprox": "fedprox"}[name]):
        workdir = tmp_path / str(len(losses))
        assert main(arguments(checkpoint, workdir, *SHORT, f"--config.method={method}")) == 0
        losses.append(json.loads((workdir / "results.json").read_text())["runs"][0]["average"]["eval_loss"])
    assert losses[0] == losses[1]


BAD_FILES = {
    "raises": ("x = 1\ny = 1 / 0\n", ":mine", r"mine.py, line 2: ZeroDivisionError"),
    "holds no such name": ("other = 1\n", ":mine", "mine in .*mine.py must be a flex_jax.methods.Method"),
    "holds something else": ("mine = 1\n", ":mine", "mine in .*mine.py must be a flex_jax.methods.Method"),
    "owns not all": (
        "from flex_jax.methods import Method\nmine = Method(placement=(('a', 'shared'),))\n",
        ":mine",
        "mine.py: ValueError: adapter layers/.*is covered by no row",
    ),
    "has no name": ("mine = 1\n", ":", "must be a method's name or path/to/file.py:name"),
    "is missing": (None, ":mine", "mine.py is no file"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_without_a_method_is_one_line(kind, checkpoint, tmp_path, capsys):  # noqa: F811
    source, suffix, words = BAD_FILES[kind]
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    assert main(arguments(checkpoint, tmp_path / "run", f"--config.method={tmp_path}/mine.py{suffix}")) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("flex_jax: error:") and "\n" not in error and re.search(words, error), error
    assert not (tmp_path / "run").exists()
