"""The command line: what reaches the run, and exit 2 with exactly one line for every mistake of the user."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flex_jax import main as command
from flex_jax.errors import InputError

START = "from flex_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"


@pytest.fixture
def config_file(tmp_path):
    """Writes a config file whose get_config() ends with the given lines."""

    def write(body="return config"):
        path = tmp_path / "trial.py"
        path.write_text(START + "".join(f"    {line}\n" for line in body.splitlines()))
        return str(path)

    return write


@pytest.fixture
def run(monkeypatch):
    """Runs the command line with a stand-in for the experiment, which keeps what it is given."""
    given = SimpleNamespace(config=None, workdir=None, error=None)

    def experiment(config, workdir):
        given.config, given.workdir = config, workdir
        if given.error:
            raise given.error

    monkeypatch.setitem(sys.modules, "flex_jax.experiment", SimpleNamespace(run=experiment))

    def call(*arguments, error=None):
        given.error = error
        return command.main([*arguments]), given

    return call


def assert_one_line(capsys, *parts):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("flex_jax: error: ") and captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("--config.rounds=3", "rounds", 3),
        ("--config.lora.alpha=8", "lora.alpha", 8.0),
        ("--config.data.path=dolly.jsonl.gz", "data.path", "dolly.jsonl.gz"),
        ("--config.methods=('flex', 'fedavg')", "methods", ("flex", "fedavg")),
        ("--config.methods='flex','fedavg'", "methods", ("flex", "fedavg")),
        ("--config.methods=fedavg", "methods", ("fedavg",)),
        ("--config.seeds=0,1", "seeds", (0, 1)),
        ("--config.seeds=7", "seeds", (7,)),
        ("--config.data.categories=closed_qa", "data.categories", ("closed_qa",)),
        ("--config.overrides.flex.optimizer.learning_rate=1e-3", "overrides.flex.optimizer.learning_rate", 1e-3),
        ("--config.hparams.fedprox.mu=0.5", "hparams.fedprox.mu", 0.5),
        ("--config.hparams.hetlora.ranks=(8, 16)", "hparams.hetlora.ranks", (8, 16)),
        ("--config.hparams.mine.kind=exact", "hparams.mine.kind", "exact"),
        ("--config.hparams.mine.kind=0x" + "f" * 10_000, "hparams.mine.kind", "0x" + "f" * 10_000),
    ],
)
def test_an_override_reaches_the_run(run, config_file, argument, key, value):
    others = [argument.split(".")[2]] if argument.startswith(("--config.hparams", "--config.overrides")) else []
    status, given = run("--config", config_file(f"config.methods = {(*others, 'fedit')}\nreturn config"), argument)
    assert status == 0
    found = given.config
    for name in key.split("."):
        found = found[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--config.methods=flex", "--config.methods=local"], "methods", ("local",)),
        (["--config.methods", "flex", "-config.methods", "local"], "methods", ("local",)),
        (["--config.methods='flex','fedit'", "--config.rounds=2", "--config.methods=local"], "methods", ("local",)),
        (["--config.seeds=0,1", "--config.seeds=3"], "seeds", (3,)),
        (["--config.data.categories=a", "--config.data.categories=b"], "data.categories", ("b",)),
        (["--config.rounds=2", "--config.rounds=3"], "rounds", 3),
        (["--config.hparams.flex.mu=2", "--config.hparams.flex.mu=3"], "hparams.flex.mu", 3),
        (["--config.overrides.flex.lora.rank=2", "--config.overrides.flex.lora.rank=3"], "overrides.flex.lora.rank", 3),
    ],
)
def test_the_last_of_equal_flags_replaces(run, config_file, arguments, key, value):
    status, given = run("--config", config_file(), *arguments)
    assert status == 0
    found = given.config
    for name in key.split("."):
        found = found[name]
    assert found == value


def test_a_flag_that_overrides_hide_is_told(run, config_file, capsys):
    path = config_file(
        'config.overrides.flex = {"lora": {"rank": 2}}\nconfig.overrides.local = {"lora": {"rank": 3}}\nreturn config'
    )
    assert (
        run("--config", path, "--config.lora.rank=4", "--config.overrides.local.lora.rank=4", "--config.rounds=2")[0]
        == 0
    )
    told = "--config.lora.rank does not reach all methods: it is also in config.overrides.flex\n"
    assert capsys.readouterr().err == f"flex_jax: {told}"


def test_one_override_of_a_method_keeps_those_of_the_file(run, config_file):
    path = config_file(
        'config.overrides.flex = {"optimizer": {"learning_rate": 1}, "slot": {"experts": 2}}\nreturn config'
    )
    status, given = run("--config", path, "--config.overrides.flex.optimizer.learning_rate=0.5")
    assert status == 0
    assert given.config.overrides.to_dict() == {"flex": {"optimizer": {"learning_rate": 0.5}, "slot": {"experts": 2}}}


def test_one_hyperparameter_keeps_those_of_the_file(run, config_file):
    """Its new value may have another type: only the method knows which is right."""
    path = config_file(
        'config.methods = ("fedadam",)\nconfig.hparams.fedadam = {"eta": 0.1, "tau": 1e-3}\nreturn config'
    )
    status, given = run("--config", path, "--config.hparams.fedadam.eta=1", "--config.hparams.fedadam.beta1=x=y")
    assert status == 0
    assert given.config.hparams.to_dict() == {"fedadam": {"eta": 1, "tau": 1e-3, "beta1": "x=y"}}


def test_a_method_of_ones_own_file_has_hyperparameters_under_its_name(run, config_file):
    method, hparam = "--config.method=mine.py:new", "--config.hparams.new.eta=2"
    status, given = run("--config", config_file(), method, hparam)
    assert status == 0 and given.config.methods == ("new",)
    assert given.config.overrides.to_dict() == {"new": {"method": "mine.py:new"}}
    assert given.config.hparams.to_dict() == {"new": {"eta": 2}}


def test_the_command_line_may_complete_the_file(run, config_file):
    path = config_file('config.data.partition = "column"\nreturn config')
    assert run("--config", path, "--config.data.column=author")[0] == 0


def test_the_work_directory_is_named_after_the_file(run, config_file, tmp_path):
    assert run("--config", config_file())[1].workdir == Path("runs/trial")
    assert run(f"--config={config_file()}", "--workdir", str(tmp_path))[1].workdir == tmp_path


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.rounds=many"], ["config.rounds=many", "an integer of at least 1"]),
        (["--config.rounds=2.5"], ["config.rounds=2.5", "an integer of at least 1"]),
        (["--config.rounds=0"], ["config.rounds is 0", "an integer of at least 1"]),
        (["--config.rounds", "-1"], ["config.rounds is -1"]),
        (["--config.rounds"], ["config.rounds"]),
        (["--config.seeds=(0,"], ["config.seeds"]),
        (["--config.lora=5"], ["config.lora is a section"]),
        (["--config.lora.rnk=5"], ["config.lora.rnk is unknown", "config.lora.rank"]),
        (["--config.round=5"], ["config.round is unknown", "config.rounds"]),
        (["--noconfig.rounds"], ["config.rounds"]),
        (["--config.overrides.flex.lora.rank=x"], ["config.overrides.flex.lora.rank=x", "an integer of at least 1"]),
        (["--config.overrides.flex.rank=1"], ["config.overrides.flex.rank is unknown", "overrides.flex.lora.rank"]),
        (["--config.overrides.2-x.lora.rank=1"], ["config.overrides.2-x.lora.rank is unknown"]),
        (["--config.hparams.fedprox=1"], ["config.hparams.fedprox", "config.hparams.METHOD.NAME"]),
        (["--config.hparams=1"], ["config.hparams", "config.hparams.METHOD.NAME"]),
        (["--config.hparams.fedprox.mu"], ["--config.hparams.fedprox.mu", "must have a value"]),
        (["--config.hparams.fedprox.mu", "1"], ["--config.hparams.fedprox.mu", "must have a value"]),
        (["--config.hparams.fedprox.mu="], ["--config.hparams.fedprox.mu", "must have a value"]),
        (["--config.hparams.fedprox.mu=[1]"], ["config.hparams.fedprox.mu is [1]", "a number, a text or a tuple"]),
        (["--config.hparams.fedprox.mu={'a': 1}"], ["config.hparams.fedprox.mu"]),
        (["--config.hparams.fedprox.mu.x=1"], ["config.hparams.fedprox.mu.x", "config.hparams.METHOD.NAME"]),
        (["--config.hparams.2-x.mu=1"], ["config.hparams.2-x.mu", "config.hparams.METHOD.NAME"]),
        (["--noconfig.hparams.fedprox.mu"], ["config.hparams.fedprox.mu"]),
        (["--config.hparams.fedprox.mu=1"], ["--config.hparams.fedprox: no run has this name", "flex, fedavg, local"]),
        (["--config.overrides.fedprox.lora.rank=1"], ["--config.overrides.fedprox: no run has this name"]),
        (["--config.overrides.far.method=flex"], ["--config.overrides.far: no run has this name"]),
        (["--config.methods=fedprox", "--config.overrides.flex.lora.rank=1"], ["--config.overrides.flex: no run"]),
        (["--config.methods=1"], ["config.methods is (1,)", "different method names"]),
        (["--config.seeds=" + "-" * 100_000 + "1"], ["cannot be read", "MemoryError"]),
        (["--config.rounds=9999999999"], ["config.rounds is 9999999999", "at most 2147483647"]),
        (["--config.lora.alpha=1e39"], ["config.lora.alpha is 1e+39", "at most 1e38"]),
        (["--bogus=1"], ["bogus"]),
        (["stray"], ["stray"]),
        (["--workdir"], ["--workdir"]),
        (["--workdir", __file__], ["--workdir", "must be a directory"]),
        (["-config=other.py"], ["config=other.py"]),
    ],
)
def test_a_wrong_argument_is_one_line(run, config_file, capsys, arguments, parts):
    status, given = run("--config", config_file(), *arguments)
    assert status == 2 and given.config is None
    assert_one_line(capsys, *parts)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [([], "--config"), (["--config"], "--config"), (["--config.rounds=3"], "--config"), (["--config=no.py"], "no.py")],
)
def test_a_config_file_is_required(run, capsys, arguments, part):
    assert run(*arguments)[0] == 2
    assert_one_line(capsys, part)


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("config.rounds = 'many'\nreturn config", ["trial.py, line 6", "rounds"]),
        ("config.lora.rnk = 3\nreturn config", ["trial.py, line 6", "rnk", "config.lora.rank"]),
        ("config.rounds = 0\nreturn config", ["config.rounds is 0"]),
        ("config.lora = None\nreturn config", ["config.lora is a section"]),
        ("pass", ["None", "default_config()"]),
        ("return {}", ["default_config()"]),
        ("raise RuntimeError('two\\nlines')", ["trial.py, line 6", "RuntimeError: two lines"]),
        ("open('missing.txt')", ["trial.py, line 6", "missing.txt"]),
        ("return (", ["trial.py", "SyntaxError"]),
    ],
)
def test_a_wrong_config_file_is_one_line(run, config_file, capsys, body, parts):
    status, given = run("--config", config_file(body), "--config.local_steps=2")
    assert status == 2 and given.config is None
    assert_one_line(capsys, *parts)


def test_a_config_file_without_get_config_is_one_line(run, tmp_path, capsys):
    path = tmp_path / "empty.py"
    path.write_text("rounds = 3\n")
    assert run("--config", str(path))[0] == 2
    assert_one_line(capsys, "empty.py", "get_config")


def test_an_input_error_of_the_run_is_one_line(run, config_file, capsys):
    assert run("--config", config_file(), error=InputError("data.jsonl, line 3:\nno text"))[0] == 2
    assert_one_line(capsys, "data.jsonl, line 3: no text")


def test_an_interrupt_is_one_line(run, config_file, capsys):
    assert run("--config", config_file(), error=KeyboardInterrupt())[0] == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_mistake_in_the_package_keeps_its_traceback(run, config_file):
    with pytest.raises(ZeroDivisionError):
        run("--config", config_file(), error=ZeroDivisionError())


def test_the_module_exits_with_the_status():
    command_line = [sys.executable, "-m", "flex_jax.main", "--config", "nowhere.py"]
    done = subprocess.run(command_line, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr == "flex_jax: error: --config nowhere.py: no such file\n"


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    assert "--config.evaluation.max_new_tokens=256" in capsys.readouterr().out
