"""A selection of the battery, in every run of the tests. `make torture` runs all of it."""

import subprocess
import sys

from tests.program import ROOT

KINDS = ("kills", "disk", "clients", "determinism", "names", "configs", "records", "checkpoints")


def test_a_selection_of_the_battery():
    command = [sys.executable, "-m", "tests.torture", "--quick", "--workers", "1", *KINDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].split()[0] == "all"
