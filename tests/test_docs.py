"""The documents in docs/: made from the code, or tried as they stand."""

import json
import re
from pathlib import Path

import methods
import pytest

from flex_jax.main import main
from tests.program import SHORT, arguments, assert_refused

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCKS = re.findall(r"```python\n(.*?)```", (DOCS / "add_a_method.md").read_text(), re.DOTALL)


def test_the_table_of_methods_is_that_of_the_code():
    assert (DOCS / "methods.md").read_text() == methods.table()


def average(workdir):
    return json.loads((workdir / "results.json").read_text())["runs"][0]["average"]


def test_a_method_in_a_file_of_ones_own_runs_beside_others(checkpoint, tmp_path):
    """The first example as it stands, with its own rank and hyperparameter. It is no longer than promised."""
    assert len(BLOCKS[0].splitlines()) < 40
    (tmp_path / "mine.py").write_text(BLOCKS[0])
    methods = f'--config.methods=("fedavg","{tmp_path}/mine.py:fedexp")'
    more = (methods, "--config.overrides.fedexp.lora.rank=3", "--config.hparams.fedexp.max_eta=1.5")
    assert main(arguments(checkpoint, tmp_path / "run", *SHORT, *more)) == 0
    runs = json.loads((tmp_path / "run/results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["fedavg", "fedexp"]
    assert 2 * runs[1]["parameters"]["shared"] == 3 * runs[0]["parameters"]["shared"]


@pytest.mark.parametrize("name", ["fedsa", "fedprox", "bias"])
def test_the_other_examples_are_what_they_say(name, checkpoint, tmp_path):
    """Two are methods of the package, and the bias, which is zero at first, is FedAvg that has learned more."""
    block = next(block for block in BLOCKS if f"def {name}(" in block)
    (tmp_path / "mine.py").write_text(f"{BLOCKS[0]}\n{block}")
    losses = []
    for method in (f"{tmp_path}/mine.py:{name}", {"fedsa": "fedsa_lora", "bias": "fedavg"}.get(name, name)):
        workdir = tmp_path / str(len(losses))
        assert main(arguments(checkpoint, workdir, *SHORT, f"--config.method={method}")) == 0
        losses.append(average(workdir)["eval_loss"])
    assert losses[0] < losses[1] if name == "bias" else losses[0] == losses[1]


BAD_FILES = {
    "raises": ("x = 1\ny = 1 / 0\n", ":mine", r"mine.py, line 2: ZeroDivisionError"),
    "holds no such name": ("other = 1\n", ":mine", "mine in .*mine.py must be a function that returns a Method"),
    "holds something else": ("mine = 1\n", ":mine", "mine in .*mine.py must be a function that returns a Method"),
    "owns not all": (
        "from flex_jax import Method\ndef mine():\n    return Method(ownership=(('a', 'shared'),))\n",
        ":mine",
        "mine.py: ValueError: adapter layers/.*is covered by no row",
    ),
    "returns no method": ("def mine():\n    return 1\n", ":mine", "must return a Method, not int"),
    "breaks as it is made": ("def mine(x=0):\n    return 1 / x\n", ":mine", "mine.py, line 2: ZeroDivisionError"),
    "has no name": ("mine = 1\n", ":", "must be a method's name or path/to/file.py:name"),
    "is missing": (None, ":mine", "mine.py is no file"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_without_a_method_is_one_line(kind, checkpoint, tmp_path, capsys):
    source, suffix, words = BAD_FILES[kind]
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    command = arguments(checkpoint, tmp_path / "run", f"--config.method={tmp_path}/mine.py{suffix}")
    assert_refused(main, command, words, capsys, tmp_path / "run")


@pytest.mark.parametrize("file", [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("benchmarks/*.md")], ids=str)
def test_links_lead_somewhere(file):
    text = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (file.parent / link).exists()] == []


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.syspath_prepend(ROOT)
    short = "config.local_steps, config.data.test_examples, config.slot.calibration_examples = 1, 1, 8\nresults = run("
    block = block.replace("results = run(", short).replace('"runs/from_python"', repr(str(tmp_path / "run")))
    block = block.replace('"flex_jax/', f'"{ROOT}/flex_jax/')
    values = {}
    exec(block, values)
    assert {entry["method"] for entry in values["results"]["runs"]} == {"flex", "local"}
