"""What makes a run fast and must not get lost: one compilation, and a mesh that gives the same results."""

import logging
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from flex_jax.main import main
from tests.program import arguments, read


def test_a_round_is_compiled_once_for_all_rounds_seeds_and_cohorts(checkpoint, tmp_path, caplog):
    jax.clear_caches()
    flags = ("--config.seeds=0,1", "--config.cohort=2", "--config.rounds=4")
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        assert main(arguments(checkpoint, tmp_path / "run", *flags)) == 0
    compiled = [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    assert compiled and sum("round_fn" in message for message in compiled) == 1
    assert len(read(tmp_path / "run")["runs"]) == 2


MESHES = {"clients and batches divided": (2, 2, 1), "experts divided": (1, 1, 2)}


@pytest.mark.parametrize("clients, fsdp, expert", MESHES.values(), ids=MESHES)
def test_a_run_over_a_mesh_is_that_of_one_device(checkpoint, tmp_path, clients, fsdp, expert):
    """From loading to the report: choice of experts, rounds, generation."""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    mesh = [f"--config.mesh.{axis}={n}" for axis, n in (("clients", clients), ("fsdp", fsdp), ("expert", expert))]
    results = []
    for workdir, more in ((tmp_path / "one", []), (tmp_path / "mesh", mesh)):
        flags = arguments(checkpoint, workdir, "--config.lora.dropout=0.0", "--config.rounds=2", *more)
        command = [sys.executable, "-m", "flex_jax.main", *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(read(workdir)["runs"][0])
    one, many = results
    assert many["communication"] == one["communication"]
    for ours, expected in zip(many["clients"], one["clients"], strict=True):
        assert ours["grafted_experts"] == expected["grafted_experts"]
        np.testing.assert_allclose(ours["eval_loss"], expected["eval_loss"], rtol=1e-4)


def test_a_mesh_of_more_devices_than_there_are_is_one_line(checkpoint, tmp_path, capsys):
    assert main(arguments(checkpoint, tmp_path / "run", "--config.mesh.clients=4")) == 2
    error = capsys.readouterr().err.strip()
    assert (
        "config.mesh is clients 4 x fsdp 1 x expert 1, 4 devices: must be at most the 1" in error and "\n" not in error
    )
    assert not (tmp_path / "run").exists()


def test_experts_that_a_mesh_cannot_divide_are_one_line(checkpoint, tmp_path):
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    flags = arguments(checkpoint, tmp_path / "run", "--config.mesh.expert=4", "--config.batch_size=4")
    done = subprocess.run(
        [sys.executable, "-m", "flex_jax.main", *flags], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "config.mesh.expert is 4: must divide the 6 experts of a layer" in done.stderr
