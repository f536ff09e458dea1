"""The programs in examples/ run and print what they say."""

import re
import runpy

from flex_jax import experiment
from tests.program import ROOT


def test_one_round_in_plain_python_is_that_of_the_package(capsys):
    runpy.run_path(str(ROOT / "examples/one_round.py"), run_name="__main__")
    *losses, difference = capsys.readouterr().out.splitlines()
    assert [line.partition(": loss ")[0] for line in losses] == ["finance", "legal", "shipping", "support"]
    assert all(float(line.partition(": loss ")[2]) > 0 for line in losses)
    assert difference.startswith("largest difference") and float(difference.split()[-1]) < 1e-4


def test_own_methods_run_next_to_fedavg(checkpoint, capsys, monkeypatch):
    """With a smaller model and fewer steps than the program has."""
    run, results = experiment.run, []

    def run_short(config, workdir):
        assert config.hparams.fedexp.max_eta == 2.0
        config.model.path, config.rounds, config.local_steps = str(checkpoint), 1, 2
        config.data.test_examples, config.evaluation.max_new_tokens = 3, 1
        results.append(run(config, workdir))

    monkeypatch.setattr(experiment, "run", run_short)
    runpy.run_path(str(ROOT / "examples/own_method.py"), run_name="__main__")
    (entries,) = [result["runs"] for result in results]
    assert [entry["method"] for entry in entries] == ["fedavg", "fedexp", "bias"]
    parameters = {entry["method"]: entry["parameters"] for entry in entries}
    assert parameters["bias"]["shared"] == parameters["fedexp"]["shared"]
    assert parameters["bias"]["personal_per_client"] > 0 == parameters["fedexp"]["personal_per_client"]
    printed = capsys.readouterr().out
    assert len(re.findall(r"^(fedavg|fedexp|bias) ", printed, re.MULTILINE)) == 2 * 3  # the plan and the summary
