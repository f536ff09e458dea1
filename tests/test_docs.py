"""The documents in docs/: made from the code, or tried as they stand."""

import re
from pathlib import Path

import methods
import pytest

from flex_jax.main import main
from tests.program import SHORT, arguments, assert_refused, read

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCKS = re.findall(r"```python\n(.*?)```", (DOCS / "add_a_method.md").read_text(), re.DOTALL)


def test_the_table_of_methods_is_that_of_the_code():
    assert (DOCS / "methods.md").read_text() == methods.table()


@pytest.fixture(scope="module")
def examples(checkpoint, tmp_path_factory):
    """All examples in one file, next to methods of the package. Returns the entries of results.json by method."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "mine.py").write_text("\n".join(block for block in BLOCKS if "-> Method" in block))
    own = [f"{folder}/mine.py:{name}" for name in ("fedexp", "fedsa", "fedprox", "bias")]
    more = [f"--config.methods={('fedavg', 'fedsa_lora', 'known_fedprox', *own)}"]
    more += ["--config.overrides.known_fedprox.method=fedprox"]
    more += [f"--config.hparams.{name}.mu=0.5" for name in ("fedprox", "known_fedprox")]
    more += ["--config.overrides.fedexp.lora.rank=3", "--config.hparams.fedexp.max_eta=1.5"]
    assert main(arguments(checkpoint, folder / "run", *SHORT, *more)) == 0
    return {entry["method"]: entry for entry in read(folder / "run")["runs"]}


def test_a_method_in_a_file_of_ones_own_runs_next_to_others(examples):
    """The first example as it stands, with its own rank and hyperparameter. It is no longer than promised."""
    assert len(BLOCKS[0].splitlines()) < 40
    assert 2 * examples["fedexp"]["parameters"]["shared"] == 3 * examples["fedavg"]["parameters"]["shared"]


def test_the_other_examples_are_what_they_say(examples):
    """Two are methods of the package, and the bias, which is zero at first, is FedAvg that has learned more."""
    loss = {name: entry["average"]["eval_loss"] for name, entry in examples.items()}
    assert loss["fedsa"] == loss["fedsa_lora"] and loss["fedprox"] == loss["known_fedprox"]
    assert loss["bias"] < loss["fedavg"] != loss["fedprox"]


CONTRACT = """
from flex_jax import Method
from flex_jax.federated.method import ClientRule, ServerRule
ALL = ((r".*", "shared"),)
"""
BAD_FILES = {
    "raises": ("x = 1\ny = 1 / 0\n", ":mine", r"mine.py, line 2: ZeroDivisionError"),
    "holds no such name": ("other = 1\n", ":mine", "mine in .*mine.py must be a function that returns a Method"),
    "holds something else": ("mine = 1\n", ":mine", "mine in .*mine.py must be a function that returns a Method"),
    "owns not all": (
        "from flex_jax import Method\ndef mine():\n    return Method(ownership=(('a', 'shared'),))\n",
        ":mine",
        "mine.py: ValueError: adapter layers/.*is covered by no row",
    ),
    "composes more than the model reads": (
        CONTRACT + "def mine():\n    return Method(ownership=ALL, compose=lambda a, e, r: a | {'layers2': a})\n",
        ":mine",
        "mine.py: TypeError: compose returns layers2/.*, which the model does not read: it reads layers/attention",
    ),
    "updates to nothing": (
        CONTRACT + "def mine():\n    return Method(ownership=ALL, server=ServerRule(update=lambda s, c: None))\n",
        ":mine",
        "mine.py: TypeError: server.update: the state has nothing at shared/layers/attention/k_proj/lora_a: must be float",
    ),
    "has a client state that is no dict": (
        CONTRACT + "def mine():\n    return Method(ownership=ALL, client=ClientRule(init_extra=lambda s, i: i))\n",
        ":mine",
        "mine.py: TypeError: client.init_extra must return a dict, not ",
    ),
    "uploads another shape": (
        CONTRACT
        + "from flex_jax.federated.method import make_result as default\nimport jax\n"
        + "def make_result(context, trained):\n"
        + "    result = default(context, trained)\n"
        + "    delta = jax.tree.map(lambda leaf: leaf[:1], result.upload.delta)\n"
        + "    return result._replace(upload=result.upload._replace(delta=delta))\n"
        + "def mine():\n    return Method(ownership=ALL, client=ClientRule(make_result=make_result))\n",
        ":mine",
        r"client.make_result: the delta has float32\[1, .* at layers/attention/.*: must be float32\[3, ",
    ),
    "stores another type": (
        CONTRACT
        + "from flex_jax.federated.method import make_result as default\n"
        + "def make_result(context, trained):\n"
        + "    return default(context, trained)._replace(extra={'n': context.round})\n"
        + "def mine():\n    return Method(ownership=ALL, client=ClientRule(make_result=make_result))\n",
        ":mine",
        r"client.make_result: the extra state has int32\[\] at n: must be nothing",
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
