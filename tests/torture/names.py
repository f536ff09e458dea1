"""Hostile names and paths: no file outside of the work directory, no control character on terminal or page."""

import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from flex_jax import export, generate
from flex_jax.main import main
from tests.program import arguments
from tests.torture.battery import Case, Outcome, require
from tests.torture.programs import Finished, Lab, Reference, call, check_no_traceback, check_refused

ESCAPE, OVERRIDE, BIDI = (
    "\x1b[31mred\x1b[0m\x07",
    "\u202egnp.exe\u202c",
    set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"),
)
ELSEWHERE = Path(tempfile.gettempdir()) / "torture-outside"  # an absolute path, which no run may write to
HOSTILE = {
    "quotes": ["'", '"', "`$(touch pwned)`", "a';b"],
    "paths": ["../../outside", str(ELSEWHERE), "..", "a/b\\c"],
    "control": ["a\nb", ESCAPE, "a\rb\tc", "\x7f\x85\u2028"],
    "NUL": ["a\x00b", "\x00", "\x00\x01", "b\x00"],
    "HTML": ["<script>alert(1)</script>", "</td></table><img src=x onerror=alert(1)>", "&lt;&amp;", "{{7*7}}${7*7}"],
    "long": ["x" * 300, "y" * 5000, "é" * 300, "😀" * 300],
    "directions": [OVERRIDE, "\u2066a\u2069", "שלום", "a\u200bb"],
    "options": ["--help", "-rf", "shared", "#1"],
    "words": ["nan", "None", "null", "inf"],
    "alike": ["A", "a", "а", " a "],
}


def check_shown(text: str, where: str) -> None:
    """Raises `Found` if a text holds a character that rules a terminal or turns a line around."""
    rules = {c for c in text if (unicodedata.category(c) == "Cc" and c not in "\n\t\r") or c in BIDI}
    require(not rules, Outcome.WRONG, f"{where} has {sorted(map(ascii, rules))}")


def check_finished(finished: Finished) -> None:
    check_no_traceback(finished)
    check_shown(finished.out + finished.err, "the terminal")


def records(names: list[str], key: str) -> str:
    rows = [{"instruction": f"Say {i} {n}", "response": f"yes {i}", key: n} for n in names for i in range(12)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def outside(folder: Path) -> set[str]:
    """Returns what lies next to the work directory and where the hostile names point."""
    found = {
        str(path.relative_to(folder)) for path in folder.rglob("*") if "run" not in path.relative_to(folder).parts[:1]
    }
    return found | {str(path) for path in [ELSEWHERE, folder.parent / "outside"] if path.exists()}


def named_clients(lab: Lab, kind: str, key: str, folder: Path) -> Outcome:
    """Clients, or categories of records, that have these names."""
    os.chdir(folder)
    data, names = folder / "data.jsonl", HOSTILE[kind]
    data.write_text(records(names, key))
    before = outside(folder)
    how = ["--config.data.partition=column", f"--config.data.column={key}"]
    how = how if key != "category" else ["--config.data.partition=pathological", "--config.data.column="]
    flags = [
        f"--config.data.path={data}",
        *how,
        "--config.methods='fedavg',",
        "--config.rounds=1",
        f"--config.note={names[0]}",
    ]
    finished = call(main, arguments(lab.folder / "model", folder / "run", *flags))
    check_finished(finished)
    require(outside(folder) == before, Outcome.WRONG, f"written outside: {outside(folder) - before}")
    if finished.status:
        return check_refused(finished)
    page = (folder / "run/report.html").read_text()
    check_shown(page, "the page")
    require(
        not re.search(r"<script>alert|<img src=x|49", page.partition("<svg")[0]) or kind != "HTML",
        Outcome.WRONG,
        "HTML",
    )
    found = [client["name"] for client in json.loads((folder / "run/results.json").read_text())["runs"][0]["clients"]]
    require(len(set(found)) == 4, Outcome.WRONG, f"clients {found}")
    for name in found:
        asked = call(
            generate.main, ["--workdir", folder / "run", "--client", name, "--prompt", "a", "--max-new-tokens", 1]
        )
        check_finished(asked)
        require(asked.status == 0 or asked.lines, Outcome.TRACEBACK, f"--client {name!r}: {asked.err[-200:]}")
    return Outcome.SURVIVED


def path_names(lab: Lab, name: str, folder: Path) -> Outcome:
    """The work directory, the data and the method's file have this in their path."""
    os.chdir(folder)
    place = folder / (name.replace("/", "∕")[:80])
    place.mkdir()
    (place / "mine.py").write_text(
        "from flex_jax import Method\n\ndef mine():\n    return Method(ownership=((r'.*', 'shared'),))\n"
    )
    (place / "data.jsonl").write_text(records(["a", "b", "c", "d"], "who"))
    flags = [f"--config.data.path={place}/data.jsonl", "--config.data.column=who", "--config.rounds=1"]
    flags.append(f"--config.methods=({str(place) + '/mine.py:mine'!r},)")
    finished = call(main, arguments(lab.folder / "model", place / "run", *flags))
    check_finished(finished)
    if finished.status:
        return check_refused(finished)
    check_shown((place / "run/report.html").read_text(), "the page")
    return Outcome.SURVIVED


def flag_value(reference: Reference, program: str, flag: str, value: str, folder: Path) -> Outcome:
    """A flag with a hostile value: refused, or harmless."""
    os.chdir(folder)
    words: list[object] = ["--workdir", reference.workdir, "--client", "finance"]
    words += ["--prompt", "a"] if program == "generate" else ["--format", "peft", "--out", folder / "out"]
    command = {"generate": generate.main, "export": export.main, "train": main}[program]
    if program == "train":
        words = [word for word in reference.command(folder / "run") if not word.startswith(flag)]
    finished = call(command, [*words, f"{flag}={value}"])
    check_finished(finished)
    left = {path.name for path in folder.iterdir()} - {"out", "run"}
    require(not left, Outcome.WRONG, f"written: {left}")
    return check_refused(finished) if finished.status else Outcome.SURVIVED


def cases(lab: Lab) -> Iterator[Case]:
    flex = lab.references["flex"]
    values = [
        "a\x00b",
        ESCAPE,
        OVERRIDE,
        "\udce9",
        "\ud83d",
        "x" * 300,
        "x" * 5000,
        "../../outside",
        "",
        "9" * 10_000,
        "a\nb",
    ]
    if lab.quick:
        yield Case("--client with an escape", partial(flag_value, flex, "generate", "--client", ESCAPE))
        return
    for kind in HOSTILE:
        for key in ("who", "category"):
            yield Case(f"{kind} in {key}", partial(named_clients, lab, kind, key))
    for kind, names in HOSTILE.items():
        if kind not in ("words", "alike", "options", "NUL"):
            yield Case(f"{kind} in paths", partial(path_names, lab, names[1]))
    flags = [("generate", flag) for flag in ("--client", "--prompt", "--context", "--method", "--workdir", "--prompts")]
    flags += [("export", flag) for flag in ("--client", "--method", "--workdir", "--format")]
    flags += [
        ("train", f"--config.{key}") for key in ("data.path", "model.path", "data.column", "lora.path", "availability")
    ]
    flags += [
        ("train", "--config"),
        ("train", "--workdir"),
        ("train", "--config.methods"),
        ("train", "--config.nothing"),
    ]
    for program, flag in flags:
        for value in values:
            yield Case(f"{program} {flag} {ascii(value[:20])}", partial(flag_value, flex, program, flag, value))
