"""The layers of the package: lower ones never import upper ones, and every file can be read in one sitting."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "flex_jax").rglob("*.py"))
}

# From the lowest to the highest. Packages of one line do not import each other. A module belongs to the longest prefix.
LAYERS = [
    ["flex_jax.errors", "flex_jax.terminal", "flex_jax.tiny"],
    ["flex_jax.checks", "flex_jax.files", "flex_jax.fingerprint", "flex_jax.locks"],
    ["flex_jax.config", "flex_jax.ops", "flex_jax.command", "flex_jax.metrics_log", "flex_jax.results"],
    ["flex_jax.models"],
    ["flex_jax.data", "flex_jax.grafting"],
    ["flex_jax.federated"],
    ["flex_jax.methods"],
    ["flex_jax.evaluation"],
    ["flex_jax.reporting"],
    ["flex_jax.memory"],
    ["flex_jax.building"],
    ["flex_jax.workdir", "flex_jax.divergence"],
    ["flex_jax.training"],
    ["flex_jax.experiment", "flex_jax.restored_run"],
    ["flex_jax.main", "flex_jax.generate", "flex_jax.export"],
    ["flex_jax"],  # the public names, which nothing in the package imports
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
CONFIG_READERS = {
    f"flex_jax.{name}" for name in ("building", "workdir", "training", "experiment", "restored_run", "main")
}


def layer(module):
    """The entry of LAYERS that a module belongs to."""
    names = [name for name in LEVELS if module == name or (name != "flex_jax" and module.startswith(f"{name}."))]
    assert names, f"{module} has no layer: add it to LAYERS"
    return max(names, key=len)


def imports(source, module, is_package):
    """The modules that a source imports, also inside functions; `from a import b` gives a.b if that is a module."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES or name in LEVELS else origin for name in names}
    return found


def upward(module, imported):
    """The imported modules of this package that are in an upper layer, or in another package of the same layer."""
    own = layer(module)
    targets = {name for name in imported if name == "flex_jax" or name.startswith("flex_jax.")}
    return {name for name in targets if layer(name) != own and LEVELS[layer(name)] >= LEVELS[own]}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_an_upper_layer(module):
    path = MODULES[module]
    imported = imports(path.read_text(), module, path.name == "__init__.py")
    assert not upward(module, imported)
    if module not in CONFIG_READERS and module != "flex_jax":
        assert "flex_jax.config" not in imported, "lower layers take plain values"
        assert module == "flex_jax.config" or "ml_collections" not in imported, "lower layers take plain values"


def test_every_layer_is_one_of_the_package():
    assert LEVELS.keys() <= MODULES.keys() and CONFIG_READERS <= MODULES.keys()


@pytest.mark.parametrize("path", ["flex_jax/tiny/__init__.py", "tools/tiny_language.py", "tools/tiny_tasks.py"])
def test_the_embedded_data_needs_only_python(path):
    imported = imports((ROOT / path).read_text(), "tiny", False)
    others = {item for item in imported if item.split(".")[0] not in sys.stdlib_module_names}
    assert all(item.startswith(("tiny_", "flex_jax.tiny")) for item in others)


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("flex_jax.models.moe", "from flex_jax.methods import flex", {"flex_jax.methods"}),
        ("flex_jax.models.moe", "def f():\n    import flex_jax.experiment", {"flex_jax.experiment"}),
        ("flex_jax.models.moe", "from ..federated.state import X", {"flex_jax.federated.state"}),
        ("flex_jax.ops.grouped", "from flex_jax import load_pretrained", {"flex_jax"}),
        ("flex_jax.experiment", "from flex_jax import METHODS", {"flex_jax"}),
        ("flex_jax.main", "import flex_jax", {"flex_jax"}),
        ("flex_jax.main", "import flex_jax.export", {"flex_jax.export"}),
        ("flex_jax.data.batches", "from flex_jax.grafting import select", {"flex_jax.grafting"}),
        ("flex_jax.building", "from flex_jax import tiny, training", {"flex_jax.training"}),
        ("flex_jax.evaluation.evaluate", "from flex_jax.results import X", set()),
        ("flex_jax.data.batches", "from flex_jax.tiny import tasks\nfrom . import prompts", set()),
        ("flex_jax.methods.flex", "import jax\nfrom flex_jax.errors import InputError", set()),
    ],
)
def test_the_check_sees_upward_imports(module, source, found):
    names = upward(module, imports(source, module, False))
    assert {name if name in found else layer(name) for name in names} == found


@pytest.mark.parametrize("folder", ["flex_jax", "tests", "configs", "tools", "examples", "benchmarks"])
def test_every_file_can_be_read_in_one_sitting(folder):
    lengths = {str(path): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    most = 320 if folder == "flex_jax" else 400
    assert lengths and not {path: length for path, length in lengths.items() if length > most}
