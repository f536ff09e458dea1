"""The command line: python -m flex_jax.export --workdir RUN --client N|shared --format peft|hf|hf-merged --out DIR.

Writes what a run trained for one client, or for all of them together, where PEFT or transformers can load it: its LoRA
as a PEFT adapter (peft), its whole model with the personal experts (hf), or, where it has none, as plain weights
(hf-merged). Exit status: 0, or 2 with one line for a mistake that the user can mend.
"""

import argparse
import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

from flex_jax.command import Parser, run_command
from flex_jax.errors import InputError

FORMATS = ("peft", "hf", "hf-merged")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags, `out` as an absolute path; raises InputError for any mistake in them."""
    parser = Parser(
        prog="flex_jax.export",
        usage="python -m flex_jax.export --workdir RUN --client N|shared --format FORMAT --out DIR",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN", help="work directory of the run")
    parser.add_argument("--client", required=True, metavar="N", help="number of a client, or shared: nothing personal")
    parser.add_argument("--method", help="default: the run's first")
    parser.add_argument("--seed", type=int, help="default: the run's first")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty directory")
    options = parser.parse_args(arguments)
    options.out = options.out.expanduser().resolve()
    if options.out.exists() and not (options.out.is_dir() and not any(options.out.iterdir())):
        raise InputError(f"--out {options.out}: must not exist yet or be an empty directory")
    return options


@contextlib.contextmanager
def whole_directory(out: Path):
    """A new directory beside `out` to write in, which becomes `out` when all is written and else is removed."""
    partial = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
        yield partial
        partial.chmod(0o755)  # of a temporary directory it is the owner's alone
        partial.rename(out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error})") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def check_adapters(wanted: str, name: str, leaves: set[str], slot_gate: str | None) -> None:
    """Raises InputError where a format has no place for adapters with such `leaves` (last parts of their paths) or for
    a slot of that gate, None for no slot."""
    if "experts_a" in leaves:
        raise InputError(f"--format {wanted}: {name} has a mixture of LoRA experts: no format has that")
    if "delta" in leaves and wanted == "peft":
        raise InputError(f"--format peft: {name} has merged adapters into the backbone; use hf-merged")
    if slot_gate == "routing":
        raise InputError(f"--format {wanted}: {name} has its experts under the router: no format has that")


def check_format(wanted: str, client: str, name: str, family, *, lora: bool, slot: bool) -> None:
    """Raises InputError when the format cannot hold the model of this client. lora, slot: whether it has these."""
    if not lora:
        raise InputError(f"--client {client}: {name} has no adapter that is shared; give the number of a client")
    if wanted == "hf" and not family.in_transformers:
        instead = "peft" if slot else "peft or hf-merged"
        raise InputError(f"--format hf: transformers has no model of the family {family.model_type}; use {instead}")
    if wanted == "hf-merged" and slot:
        instead = "peft, which leaves it out" if not family.in_transformers else "hf"
        raise InputError(f"--format hf-merged: client {client} of {name} has a personal expert; use {instead}")


def how_to_load(wanted: str, out: Path, family, *, slot: bool) -> str:
    """The Python call that loads what was written, and what it leaves out."""
    if wanted == "peft":
        left_out = "; the personal expert is not part of a PEFT adapter" if slot else ""
        return f"PeftModel.from_pretrained(base, {str(out)!r}){left_out}"
    trust = ", trust_remote_code=True" if slot or not family.in_transformers else ""
    left_out = "; without trust_remote_code the personal expert is left out" if slot else ""
    return f"AutoModelForCausalLM.from_pretrained({str(out)!r}{trust}){left_out}"


def export(arguments: list[str]) -> None:
    """Runs the command; raises InputError for a mistake that the user can mend."""
    options = parse(arguments)
    import jax  # after the parsing: JAX takes seconds to import
    from flax.traverse_util import flatten_dict

    from flex_jax.federated.client import collections
    from flex_jax.models.checkpoint import find_checkpoint
    from flex_jax.models.families import FAMILIES
    from flex_jax.models.peft import has_adapter, save_adapter
    from flex_jax.models.personalised import personal_slot, save_personalised
    from flex_jax.simulation import checkpoint_name
    from flex_jax.trained import client_names, clients_of, open_run, parse_client

    client = parse_client(options.client, client_names(options.workdir))
    trained = open_run(options.workdir, options.method, options.seed)
    own = jax.tree.map(lambda leaf: leaf[0], clients_of(trained, [client]))
    variables = collections(trained.recipe, trained.frozen, trained.state.server, own)
    model, adapters = trained.recipe.model, variables["adapters"]
    family = FAMILIES[model.config.family]
    slot = personal_slot(adapters) is not None
    lora = has_adapter(model.config, adapters)
    leaves = {path[-1] for path in flatten_dict(adapters)}
    check_adapters(options.format, trained.name, leaves, model.adapters.slot.gate if slot else None)
    check_format(options.format, options.client, trained.name, family, lora=lora, slot=slot)
    name = checkpoint_name(trained.config)
    base, local = find_checkpoint(name), Path(name).expanduser()
    with whole_directory(options.out) as directory:
        if options.format == "peft":
            of = str(local.resolve()) if local.exists() else name
            save_adapter(directory, model.config, adapters, model.adapters.lora, of)
        else:
            save_personalised(directory, base, model, variables)
    how = how_to_load(options.format, options.out, family, slot=slot)
    print(f"wrote {options.out} ({options.format}, {trained.name}, client {options.client}): load it with {how}")


def main(arguments: list[str]) -> int:
    """Runs the command line and returns its exit status."""
    return run_command(export, arguments, interrupted="nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
