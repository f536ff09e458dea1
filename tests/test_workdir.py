"""Work directories: a run goes on only with the config and inputs that it began with, and survives accidents."""

import errno
import json
import os
import shutil
import signal
import socket
from functools import partial

import pytest

from flex_jax import experiment, generate, training
from flex_jax.command import raise_if_stopped, run_command
from flex_jax.data.sources import load_records
from flex_jax.federated import client_store
from flex_jax.locks import lock_workdir
from flex_jax.main import main
from flex_jax.metrics_log import MetricsLog
from tests.program import arguments, assert_refused, read, read_lines, without_times

METHOD = "from flex_jax.methods import METHODS\nmine = METHODS['local']\n"


def command(folder, *more):
    flags = ("--config.rounds=2", f"--config.data.path={folder / 'data.jsonl'}")
    return arguments(folder / "model", folder / "run", *flags, *more)


@pytest.fixture(scope="module")
def sound(checkpoint, tmp_path_factory):
    """A folder with everything that a run reads, in which one run has finished and another was stopped after it."""
    folder = tmp_path_factory.mktemp("sound") / "folder"
    shutil.copytree(checkpoint, folder / "model")
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in load_records("tiny")))
    (folder / "mine.py").write_text(METHOD)
    return folder


def both(folder):
    return command(folder, f"--config.methods='fedavg','{folder / 'mine.py'}:mine'")


@pytest.fixture(scope="module")
def stopped(sound):
    """The run of the first method has finished, that of the second was stopped in its evaluation."""
    score = training.score

    def stop_the_second(run, *args):
        if run.name == "mine-seed0":
            raise KeyboardInterrupt
        return score(run, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "score", stop_the_second)
        assert main(both(sound)) == 130
    return sound


@pytest.fixture(scope="module")
def finished(stopped):
    """What the same command makes of a copy."""
    run, copy = stopped / "run", stopped / "copy"
    shutil.copytree(run, copy)
    assert main(both(stopped)) == 0
    results, whole = read(run), read_lines(run / "metrics.jsonl")
    shutil.move(run, stopped / "finished")
    shutil.move(copy, run)
    return results, whole


@pytest.fixture
def folder(stopped, finished):
    """The folder as it was when the run was stopped, for changes; put back afterwards, as its path is in the config."""
    names = ("model", "data.jsonl", "mine.py", "run")
    saved = stopped.with_name("saved")
    saved.mkdir()
    for name in names:
        copy = shutil.copytree if (stopped / name).is_dir() else shutil.copy
        copy(stopped / name, saved / name)
    yield stopped
    for name in names:
        shutil.rmtree(stopped / name) if (stopped / name).is_dir() else (stopped / name).unlink(missing_ok=True)
        shutil.move(saved / name, stopped / name)
    saved.rmdir()


def finish(folder):
    """Puts the finished work directory in the place of the stopped one."""
    shutil.rmtree(folder / "run")
    shutil.copytree(folder / "finished", folder / "run")


def change_a_record(folder):
    lines = (folder / "data.jsonl").read_text().replace("the", "teh", 1)
    (folder / "data.jsonl").write_text(lines)


def drop_a_record(folder):
    (folder / "data.jsonl").write_text((folder / "data.jsonl").read_text().partition("\n")[2])


def change_a_weight(folder):
    content = bytearray((folder / "model/model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model/model.safetensors").write_bytes(content)


def add_a_token(folder):
    (folder / "model/added_tokens.json").write_text("{}")


def change_the_method(folder):
    (folder / "mine.py").write_text(METHOD.replace("local", "fedavg"))


@pytest.mark.parametrize("state", ["stopped", "finished"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_a_record, "data.path: other content, also [0-9,]* records"),
        (drop_a_record, "data.path: was [0-9,]* records, is [0-9,]* records"),
        (change_a_weight, "model.path model.safetensors: other content, also [0-9,]* bytes"),
        (add_a_token, "model.path added_tokens.json: was not there, is 2 bytes"),
        (change_the_method, "method mine: .*mine.py: was 61 bytes, is 62 bytes"),
    ],
)
def test_a_run_does_not_go_on_with_other_inputs(change, words, state, folder, capsys):
    if state == "finished":
        finish(folder)
    before = (folder / "run/metrics.jsonl").read_text(), (folder / "run/results.json").read_text()
    change(folder)
    assert_refused(main, both(folder), f"run holds a run of other inputs .{words}", capsys)
    assert ((folder / "run/metrics.jsonl").read_text(), (folder / "run/results.json").read_text()) == before


@pytest.mark.parametrize("change", [change_a_weight, change_the_method])
def test_another_model_or_method_does_not_answer_for_a_run(change, folder, capsys):
    change(folder)
    ask = ["--workdir", folder / "run", "--method", "mine", "--client", "0", "--prompt", "a"]
    assert_refused(generate.main, [*ask, "--trust", folder / "mine.py"], "holds a run of other inputs", capsys)


def test_a_finished_run_says_that_nothing_was_run(folder, finished, capsys):
    finish(folder)
    assert main(both(folder)) == 0
    assert f"all 2 runs in {folder / 'run'} are finished: nothing was run" in capsys.readouterr().err
    assert read(folder / "run") == finished[0]


@pytest.mark.parametrize("lost", [["config.json"], ["config.json", "inputs.json"]])
@pytest.mark.parametrize(
    ("results", "words"),
    [
        (True, "results.json: fedavg seed 0 is of another config"),
        (False, r"fedavg-seed0: of another run \(different: optimizer.learning_rate\)"),
    ],
)
def test_a_checkpoint_knows_what_it_belongs_to(results, words, lost, folder, capsys):
    """Without config.json nothing else would tell that the learning rate is another one."""
    for name in lost if results else [*lost, "results.json"]:
        (folder / "run" / name).unlink()
    assert_refused(main, [*both(folder), "--config.optimizer.learning_rate=2e-2"], words, capsys)
    assert not any((folder / "run" / name).exists() for name in lost)


def lose(lines):
    return []


def shorten(lines):
    return lines[: len(lines) // 3]


@pytest.mark.parametrize("damage", [lose, shorten])
def test_bytes_do_not_depend_on_the_log(damage, folder, finished, capsys):
    log = folder / "run/metrics.jsonl"
    left = damage(log.read_text().splitlines(keepends=True))
    log.write_text("".join(left)) if left else log.unlink()
    assert main(both(folder)) == 0
    assert without_times(read(folder / "run")) == without_times(finished[0])
    assert "metrics.jsonl has lost 2 of 2 rounds of mine-seed0" in capsys.readouterr().err


def test_a_line_that_is_there_twice_is_refused(folder, capsys):
    log = folder / "run/metrics.jsonl"
    log.write_text(log.read_text() * 2)
    assert_refused(main, both(folder), "metrics.jsonl, line 21: there is a line before of this run", capsys)


def test_a_second_process_is_refused_at_once(folder, capsys):
    with lock_workdir(folder / "run"):
        words = f"run: in use by process {os.getpid()} on {socket.gethostname()} since 20"
        assert_refused(main, both(folder), words, capsys)


def test_a_dead_holder_does_not_keep_a_work_directory(folder, finished):
    (folder / "run/.lock").write_text("process 1 on another since 2020-01-01\n")
    assert main(both(folder)) == 0
    assert without_times(read(folder / "run")) == without_times(finished[0])


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_one_run_and_no_other(folder, finished, monkeypatch, capsys):
    """Neither the failure's traceback nor the results can be written while the disk is full."""
    shutil.rmtree(folder / "run")
    save_file, calls = client_store.save_file, []

    def full_at_first(*args):
        calls.append(args)
        return full_disk() if len(calls) <= 2 else save_file(*args)

    with monkeypatch.context() as patch:
        patch.setattr(client_store, "save_file", full_at_first)
        patch.setattr(experiment, "write_text", full_disk)
        methods_reversed = f"--config.methods='{folder / 'mine.py'}:mine','fedavg'"
        assert main(command(folder, methods_reversed)) == 2
    told = capsys.readouterr().err
    assert "mine seed 0 failed: OSError: [Errno 28] No space left on device" in told and "Traceback" not in told
    assert [run["method"] for run in read(folder / "run")["runs"]] == ["fedavg"]
    assert not list((folder / "run").rglob("*.tmp"))
    assert main(command(folder, methods_reversed)) == 0
    by_method = {run["method"]: run for run in without_times(read(folder / "run"))}
    for run in without_times(finished[0]):
        assert by_method[run["method"]]["clients"] == run["clients"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_run_in_good_order(name, folder, finished, monkeypatch, capsys):
    shutil.rmtree(folder / "run")
    write, number = MetricsLog.write, signal.Signals[name]
    before = signal.getsignal(number)

    def write_and_stop(self, run, method, seed, round, lines):
        write(self, run, method, seed, round, lines)
        if run == "mine-seed0" and round == 1:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_DFL  # a second one ends the process at once

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_and_stop)
        assert main(both(folder)) == 143
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"flex_jax: stopped by {name}: this resumes the run: python -m flex_jax.main --config ")
    assert signal.getsignal(number) == before
    assert main(both(folder)) == 0
    assert without_times(read(folder / "run")) == without_times(finished[0])
    assert len(read_lines(folder / "run/metrics.jsonl")) == 2 * 2 * 5


def test_a_signal_within_a_callback_of_the_garbage_collector_is_not_lost(monkeypatch, capsys):
    """Python drops an exception that a handler raises there, as JAX has such a callback."""

    class Dropped:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    def work(arguments):
        monkeypatch.setattr("sys.unraisablehook", lambda _: None)
        Dropped()
        raise_if_stopped()
        raise AssertionError("it must have stopped")

    assert run_command(work, [], interrupted="resume") == 143
    assert capsys.readouterr().err == "flex_jax: stopped by SIGTERM: resume\n"


def make_directory(file):
    file.unlink()
    file.mkdir()


def make_fifo(file):
    file.unlink()
    os.mkfifo(file)


def write(text, file):
    file.write_text(text)


@pytest.mark.parametrize(
    "damage",
    [make_directory, make_fifo, partial(write, f"{'[' * 100_000}\n"), partial(write, "\xff\n"), partial(write, "3\n")],
)
@pytest.mark.parametrize("name", ["config.json", "inputs.json", "results.json", "metrics.jsonl"])
def test_a_broken_file_of_a_work_directory_is_one_line(name, damage, folder, capsys):
    damage(folder / "run" / name)
    assert_refused(main, both(folder), rf"run/{name}[:,].*(restore|move it away)", capsys)


@pytest.mark.parametrize("workdir", ["data.jsonl/run", "x" * 300, "mine.py"])
def test_a_work_directory_that_cannot_be(workdir, folder, capsys):
    flags = arguments(folder / "model", folder / workdir)
    assert_refused(main, flags, "(File name too long|Not a directory|is a file)", capsys)
