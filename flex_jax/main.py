"""The command line: python -m flex_jax.main --config FILE [--workdir DIR] [--config.KEY=VALUE ...].

Exit status: 0 if every run finished, 1 if runs failed, 2 with one line for a mistake that the user can mend, 130 after
Ctrl-C, 143 after SIGTERM or SIGHUP: finished rounds are saved then, and a second signal ends the program at once.
"""

import argparse
import ast
import itertools
import re
import runpy
import shlex
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from flex_jax.command import Parser, run_command
from flex_jax.config import OVERRIDABLE_SECTIONS, SCHEMA, find_key, name_methods, nearest_key, validate, validate_keys
from flex_jax.errors import InputError
from flex_jax.files import local_path
from flex_jax.terminal import tell

HPARAMS_HELP = """  --config.hparams.METHOD.NAME=VALUE
      a hyperparameter of one method, such as --config.hparams.fedprox.mu=0.1; docs/methods.md lists them
  --config.overrides.METHOD.KEY=VALUE
      a key of lora, slot, optimizer, client or server for one method alone"""


def parse(arguments: list[str]) -> tuple[ConfigDict, Path]:
    """Returns the validated config and the work directory. Raises InputError for any mistake in them."""
    keys = "\n".join(f"  --config.{key}={entry.default!r}\n      {entry.doc}" for key, entry in SCHEMA.items())
    parser = Parser(
        prog="flex_jax",
        usage="python -m flex_jax.main --config FILE [--workdir DIR] [--config.KEY=VALUE ...]",
        epilog=f"keys of the config and their defaults:\n{keys}\n{HPARAMS_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="Python file with a get_config()")
    parser.add_argument(
        "--workdir", type=local_path, metavar="DIR", help="where results go; default runs/<name of FILE>"
    )
    options, rest = parser.parse_known_args(arguments)
    config = load(options.config)
    override(config, rest)
    name_methods(config)
    validate(config)
    check_method_flags(
        config, [match[1] for match in map(re.compile(r"--?(?:no)?config\.([^=]*)").match, rest) if match]
    )
    workdir = options.workdir or Path("runs") / Path(options.config).stem
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir {workdir}: is a file, must be a directory or not exist yet")
    return config, workdir


def check_method_flags(config: ConfigDict, keys: list[str]) -> None:
    """Raises InputError for a flag of a method that does not run. Tells on stderr which flags the overrides hide."""
    for section, name, *_ in (key.split(".") for key in keys if key.startswith(("overrides.", "hparams."))):
        if name not in config.methods:
            methods = ", ".join(config.methods)
            raise InputError(f"--config.{section}.{name}: no run has this name: config.methods has {methods}")
    for key in dict.fromkeys(key for key in keys if key.split(".")[0] in OVERRIDABLE_SECTIONS):
        section, name = key.split(".")
        hidden = [method for method in config.methods if name in config.overrides.get(method, {}).get(section, {})]
        if hidden := [method for method in hidden if f"overrides.{method}.{key}" not in keys]:
            where = ", ".join(f"config.overrides.{method}" for method in hidden)
            tell(f"--config.{key} does not reach all methods: it is also in {where}")


def load(path: str) -> ConfigDict:
    """Returns what the file's get_config() returns. If the file raises something, its line is in an InputError."""
    if not Path(path).is_file():
        raise InputError(f"--config {path}: no such file")
    try:
        config = runpy.run_path(path)["get_config"]()
    except Exception as error:  # the file is the user's program, which may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        place = f"{path}, line {lines[-1]}" if lines else path
        if unknown := re.search(r'Key "(.+?)" does not exist', str(error)):
            nearest = nearest_key(unknown[1])
            raise InputError(f"{place}: the key {unknown[1]} is unknown: the nearest is config.{nearest}") from error
        raise InputError(f"{place}: {type(error).__name__}: {error}") from error
    validate_keys(config)
    return config


def override(config: ConfigDict, arguments: list[str]) -> None:
    """Sets the --config.KEY=VALUE arguments in the config. Raises InputError for anything else among them."""
    for argument in arguments:
        if re.match("--?(flagfile|undefok)", argument):  # flags of absl, which would bypass these checks
            raise InputError(f"unexpected argument {argument!r:.80}: values are set with --config.KEY=VALUE")
    arguments = _last_tuples([argument for argument in arguments if not _set_hparam(config, argument)])
    for key in (match[1] for match in map(re.compile(r"--?(?:no)?config\.([^=]*)").match, arguments) if match):
        entry = find_key(key)
        if key.startswith("overrides."):  # config_flags sets only keys that exist
            _, method, *section, name = key.split(".")
            values = {section[0]: {name: entry.default}} if section else {name: entry.default}
            with config.overrides.unlocked(), config.overrides.ignore_type():
                config.overrides.update({method: values})
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
        positional = values(["flex_jax", *arguments])[1:]
    except (MemoryError, RecursionError) as error:  # a value nested too deep
        raise InputError(f"a --config.KEY=VALUE cannot be read ({type(error).__name__}: {error})") from error
    except flags.Error as error:
        key = re.match(r"flag --config\.([^=]*)=", str(error))
        allowed = f": must be {find_key(key[1]).check.allowed}" if key else ""
        raise InputError(f"{error}{allowed}") from error
    if positional:
        raise InputError(f"unexpected argument {positional[0]!r}: values are set with --config.KEY=VALUE")


def _last_tuples(arguments: list[str]) -> list[str]:
    """Drops all but the last flag of each tuple: config_flags would join them, and other flags replace."""
    others, tuples = [], {}
    queue = iter(arguments)
    for argument in queue:
        match = re.fullmatch(r"--?config\.([^=]*)(=.*)?", argument, re.DOTALL)
        if match and match[1] in SCHEMA and isinstance(SCHEMA[match[1]].default, tuple):
            tuples[match[1]] = [argument] if match[2] else [argument, *itertools.islice(queue, 1)]
        else:
            others.append(argument)
    return [*itertools.chain(*tuples.values()), *others]


def _set_hparam(config: ConfigDict, argument: str) -> bool:
    """Sets a --config.hparams.METHOD.NAME=VALUE. Its type is the method's, which is checked when the method is made."""
    match = re.fullmatch(r"--?(no)?config\.(hparams\.[^=]*)(?:=(.*))?", argument, re.DOTALL)
    if not match:
        return False
    no, key, text = match.groups()
    find_key(key)
    if no or not text:
        raise InputError(f"--config.{key}: must have a value, as in --config.{key}=0.1")
    try:
        value = ast.literal_eval(text)
        repr(value)  # Python refuses to write integers of thousands of digits, as an error line would
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):  # a text without quotes
        value = text
    _, method, name = key.split(".")
    with config.hparams.unlocked(), config.hparams.ignore_type():
        config.hparams.update({method: {name: value}})
    return True


def main(arguments: list[str]) -> int:
    """Runs the command line and returns its exit status."""

    def train(arguments):
        config, workdir = parse(arguments)
        from flex_jax.experiment import run  # after parsing, because importing JAX takes seconds

        run(config, workdir)

    resume = shlex.join(["python", "-m", "flex_jax.main", *arguments])
    return run_command(train, arguments, interrupted=f"this resumes the run: {resume}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
