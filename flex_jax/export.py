"""The command line: python -m flex_jax.export --workdir RUN --client NAME|#N|shared --format FORMAT --out DIR.

Writes what a run trained for one client, or the aggregated model, in a form that PEFT or transformers can load: its
LoRA as a PEFT adapter (peft), its whole model with the personal experts (hf), or, if it has none, plain weights
(hf-merged). Exit status: 0, or 2 with one line for a mistake that the user can mend.
"""

import argparse
import contextlib
import glob
import os
import shutil
import sys
import tempfile
from pathlib import Path

from flex_jax.command import Parser, run_command
from flex_jax.errors import InputError
from flex_jax.files import local_path
from flex_jax.locks import locked_directory
from flex_jax.terminal import visible

FORMATS = ("peft", "hf", "hf-merged")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the flags, with `out` as an absolute path. Raises InputError for any mistake in them."""
    parser = Parser(
        prog="flex_jax.export",
        usage="python -m flex_jax.export --workdir RUN --client NAME|#N|shared --format FORMAT --out DIR",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", type=local_path, required=True, metavar="RUN", help="work directory of the run")
    parser.add_argument("--client", required=True, metavar="NAME", help="a client, or shared: nothing personal")
    parser.add_argument("--trust", type=Path, metavar="FILE", help="the file of the run's own method, to run it")
    parser.add_argument("--method", help="default: the run's first")
    parser.add_argument("--seed", type=int, help="default: the run's first")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty directory")
    options = parser.parse_args(arguments)
    options.out = local_path(options.out).resolve()
    if options.out.exists() and not (options.out.is_dir() and not any(options.out.iterdir())):
        raise InputError(f"--out {options.out}: must not exist yet or be an empty directory")
    return options


@contextlib.contextmanager
def whole_directory(out: Path):
    """Yields a new directory next to `out` to write in. It becomes `out` when all is written, or is removed.

    What killed exports have left there is removed.
    """
    prefix = f"{out.name}.partial-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for old in out.parent.glob(f"{glob.escape(prefix)}*/"):
            with locked_directory(old) as abandoned:
                if abandoned:
                    shutil.rmtree(old)
        with (
            tempfile.TemporaryDirectory("", prefix, out.parent, ignore_cleanup_errors=True) as partial,
            locked_directory(Path(partial)),
        ):
            yield Path(partial)
            os.chmod(partial, 0o755)  # only its owner can read a temporary directory
            os.rename(partial, out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error})") from error


def check_format(wanted: str, client: str, name: str, family, *, lora: bool, slot: bool) -> None:
    """Raises InputError if the format cannot express the model of this client. lora, slot: whether it has these."""
    if not lora:
        raise InputError(f"--client {client}: {name} has no adapter that is shared; name a client")
    if wanted == "hf" and not family.in_transformers:
        instead = "peft" if slot else "peft or hf-merged"
        raise InputError(f"--format hf: transformers has no model of the family {family.model_type}; use {instead}")
    if wanted == "hf-merged" and slot:
        instead = "peft, which leaves it out" if not family.in_transformers else "hf"
        raise InputError(f"--format hf-merged: client {client} of {name} has a personal expert; use {instead}")


def how_to_load(wanted: str, out: Path, family, *, slot: bool) -> str:
    """Returns the Python call that loads what was written, and what it leaves out."""
    if wanted == "peft":
        left_out = "; the personal expert is not part of a PEFT adapter" if slot else ""
        return f"PeftModel.from_pretrained(base, {str(out)!r}){left_out}"
    trust = ", trust_remote_code=True" if slot or not family.in_transformers else ""
    left_out = "; without trust_remote_code the personal expert is left out" if slot else ""
    return f"AutoModelForCausalLM.from_pretrained({str(out)!r}{trust}){left_out}"


def export(arguments: list[str]) -> None:
    """Runs the command. Raises InputError for a mistake that the user can mend."""
    options = parse(arguments)
    import jax  # after parsing, because importing JAX takes seconds

    from flex_jax.building import checkpoint_name
    from flex_jax.files import write_text
    from flex_jax.methods import user_error, user_frame
    from flex_jax.models.adapters import LORA
    from flex_jax.models.checkpoint import find_checkpoint
    from flex_jax.models.export.peft import has_adapter, save_adapter
    from flex_jax.models.export.transformers import personal_slot, save_transformers
    from flex_jax.models.families import FAMILIES
    from flex_jax.restored_run import client_label, open_run, parse_client
    from flex_jax.workdir import read_client_names

    names = read_client_names(options.workdir)
    client = parse_client(options.client, names)
    label = client_label(client, names)
    run = open_run(options.workdir, options.method, options.seed, [] if client is None else [client], options.trust)
    models = run.shared_model() if client is None else run.models([client])
    variables = models.variables(jax.tree.map(lambda leaf: leaf[0], models.clients))
    model, adapters = run.spec.model, variables["adapters"]
    family = FAMILIES[model.config.family]
    slot = personal_slot(adapters) is not None
    projection = model.adapters.projection
    if projection is not LORA and (options.format == "peft" or projection.merge is None):
        instead = "no format has that" if projection.merge is None else "use hf-merged"
        raise InputError(f"--format {options.format}: {run.name} has adapters that are more than a LoRA: {instead}")
    if slot and model.adapters.slot.gate == "routing":
        raise InputError(f"--format {options.format}: {run.name} has its experts under the router: no format has that")
    lora = has_adapter(model.config, adapters)
    check_format(options.format, label, run.name, family, lora=lora, slot=slot)
    name = checkpoint_name(run.config)
    base, local = find_checkpoint(name), local_path(name)
    with whole_directory(options.out) as directory:
        if options.format == "peft":
            base_name = str(local.resolve()) if local.exists() else name
            save_adapter(directory, model.config, adapters, model.adapters.lora, base_name)
        else:
            try:
                save_transformers(directory, base, model, variables)
            except Exception as error:  # a method's own `merge` is the user's program, which may raise anything
                if projection is LORA or not user_frame(run.config.method, error):
                    raise
                raise user_error(run.config.method, error) from error
        write_text(directory / "README.md", f"{label} of {run.name}, round {int(run.state.round)}, from flex_jax.\n")
    how = how_to_load(options.format, options.out, family, slot=slot)
    stage = f"{run.name} after round {int(run.state.round)} of {run.config.rounds}"
    print(visible(f"wrote {options.out} ({options.format}, {stage}, client {label}): load it with {how}"))


def main(arguments: list[str]) -> int:
    """Runs the command line and returns its exit status."""
    return run_command(export, arguments, interrupted="nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
