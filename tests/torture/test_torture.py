"""A selection of `make torture`. It runs in a process of its own, as it forks before JAX begins."""

import subprocess
import sys

from tests.program import ROOT


def test_a_selection_of_the_battery_finds_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", "--quick", "--workers", "1"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
