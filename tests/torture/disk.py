"""A full disk, and one that cannot be written: one line, other methods go on, and later the command completes."""

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.torture.battery import Case, Outcome, require
from tests.torture.programs import Lab, Program, Reference, at_call, check_no_traceback, check_refused, scores

ERRORS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT)


def judge_failed(reference: Reference, workdir: Path, folder: Path, finished) -> None:
    """Raises `Found` unless a command that met the fault has said so, or did not need what failed."""
    check_no_traceback(finished)
    if finished.status:
        check_refused(finished)
    else:
        require(scores(workdir) == scores(reference.workdir), Outcome.WRONG, f"status 0: {finished.err[-300:]}")


def failing_call(reference: Reference, target: str, number: int, code: int, onwards: bool, folder: Path) -> Outcome:
    """A call fails, or all from that on. The error is made by the test: root is denied no file, and fills no quota."""
    workdir = folder / "run"

    def fail() -> None:
        raise OSError(code, os.strerror(code), str(workdir / "somewhere"))

    fault = partial(at_call, target, number, fail, workdir, onwards=onwards)
    finished = Program(reference.command(workdir), folder / "failed", fault=fault).wait()
    judge_failed(reference, workdir, folder, finished)
    return reference.resume(workdir, folder)


def limited_files(reference: Reference, size: int, folder: Path) -> Outcome:
    """No file can be longer than `size`: RLIMIT_FSIZE, under which a write fails halfway."""
    workdir = folder / "run"
    fault = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    finished = Program(reference.command(workdir), folder / "failed", fault=fault).wait()
    judge_failed(reference, workdir, folder, finished)
    return reference.resume(workdir, folder)


def full_disk(reference: Reference, share: float, folder: Path) -> Outcome:
    """A file system that holds a share of what the run writes, and more later."""
    mount, workdir = folder / "disk", folder / "disk/run"
    mount.mkdir()
    used = sum(path.stat().st_blocks * 512 for path in reference.workdir.rglob("*") if path.is_file())
    size = f"size={max(int(share * used) // 4096, 2) * 4}k"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "torture", str(mount)], capture_output=True, text=True
    )
    if mounted.returncode:
        return Outcome.SURVIVED, f"skipped, no tmpfs can be mounted: {mounted.stderr.strip()}"
    try:
        finished = Program(reference.command(workdir), folder / "failed").wait()
        check_refused(finished)
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        return reference.resume(workdir, folder)
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def others_go_on(pair: Reference, folder: Path) -> Outcome:
    """What one method writes fails; the other one finishes."""
    workdir = folder / "run"

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(workdir / "somewhere"))

    prefix = workdir / "checkpoints" / f"{pair.methods[0]}-seed0"
    fault = partial(at_call, "io:open", 1, fail, prefix, onwards=True)
    fault_too = partial(at_call, "os:mkdir", 2, fail, prefix, onwards=True)
    finished = Program(pair.command(workdir), folder / "failed", fault=lambda: (fault(), fault_too())).wait()
    require(finished.status == 1, Outcome.WRONG, f"status {finished.status}")
    check_refused(finished)
    (done, _), _ = scores(workdir)
    require(done == scores(pair.workdir)[0][0][1:], Outcome.LOST, f"finished: {[run['method'] for run in done]}")
    resumed = Program(pair.command(workdir), folder / "resumed").wait()
    check_no_traceback(resumed)
    by_method = {run["method"]: run for run in scores(workdir)[0][0]}
    wanted = {run["method"]: run for run in scores(pair.workdir)[0][0]}
    require(resumed.status == 0 and by_method == wanted, Outcome.LOST, f"status {resumed.status}: {resumed.err[-300:]}")
    return Outcome.SURVIVED


def cases(lab: Lab) -> Iterator[Case]:
    random = lab.random("disk")
    flex = lab.references["flex"]
    points = [(target, n) for target, count in flex.facts["calls"].items() for n in range(1, count + 1)]
    points = [point for point in points if not point[0].endswith("MetricsLog.write")]  # which opens a file, see io:open
    for target, number in random.sample(points, lab.count(14, 1)):
        code, onwards = random.choice(ERRORS), random.random() < 0.5
        name = f"flex: {errno.errorcode[code]} at call {number} of {target}{' and later' * onwards}"
        yield Case(name, partial(failing_call, flex, target, number, code, onwards), uses_jax=False)
    if lab.quick:
        return
    for share in (0.02, 0.2, 0.4, 0.6, 0.8):
        name = random.choice(list(lab.references))
        yield Case(f"{name}: a disk for {share} of it", partial(full_disk, lab.references[name], share), uses_jax=False)
    for size in (100, 1500, 4000, 20_000):
        yield Case(f"flex: no file above {size} bytes", partial(limited_files, flex, size), uses_jax=False)
    yield Case("flex, local: no space for flex alone", partial(others_go_on, lab.pair), uses_jax=False)
