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
    ["flex_jax.errors", "flex_jax.tiny"],
    ["flex_jax.config", "flex_jax.ops", "flex_jax.command"],
    ["flex_jax.models"],
    ["flex_jax"],  # the public names of flex_jax/__init__.py
    ["flex_jax.data", "flex_jax.grafting"],
    ["flex_jax.tiny.corpus"],  # speaks the prompt of flex_jax.data
    ["flex_jax.federated"],
    ["flex_jax.methods"],
    ["flex_jax.evaluation"],
    ["flex_jax.reporting"],
    ["flex_jax.simulation"],
    ["flex_jax.experiment", "flex_jax.trained"],
    ["flex_jax.main", "flex_jax.generate", "flex_jax.export", "flex_jax.tiny.pretrain"],
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
CONFIG_READERS = {f"flex_jax.{name}" for name in ("simulation", "experiment", "trained", "main", "tiny.pretrain")}


def layer(module):
    """The entry of LAYERS that a module belongs to."""
    names = [name for name in LEVELS if module == name or (name != "flex_jax" and module.startswith(f"{name}."))]
    assert names, f"{module} has no layer: add it to LAYERS"
    return max(names, key=len)


def imports(source, module, is_package):
    """The modules that a source imports, also inside functions; `from a import b` gives a.b where that is one."""
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
    if module not in CONFIG_READERS:
        assert "flex_jax.config" not in imported, "lower layers take plain values"


@pytest.mark.parametrize("module", ["language", "tasks"])
def test_the_embedded_data_needs_only_python(module):
    name = f"flex_jax.tiny.{module}"
    imported = imports(MODULES[name].read_text(), name, False)
    others = {item for item in imported if item.split(".")[0] not in sys.stdlib_module_names}
    assert all(item.startswith("flex_jax.tiny.") for item in others)


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("flex_jax.models.moe", "from flex_jax.methods import flex", {"flex_jax.methods"}),
        ("flex_jax.models.moe", "def f():\n    import flex_jax.experiment", {"flex_jax.experiment"}),
        ("flex_jax.models.moe", "from ..federated.state import X", {"flex_jax.federated.state"}),
        ("flex_jax.ops.grouped", "from flex_jax import load_pretrained", {"flex_jax"}),
        ("flex_jax.data.batches", "from flex_jax.grafting import select", {"flex_jax.grafting"}),
        ("flex_jax.data.batches", "from flex_jax.tiny import tasks, pretrain", {"flex_jax.tiny.pretrain"}),
        ("flex_jax.data.batches", "from flex_jax.tiny import tasks\nfrom . import prompts", set()),
        ("flex_jax.methods.flex", "import jax\nfrom flex_jax.errors import InputError", set()),
    ],
)
def test_the_check_sees_upward_imports(module, source, found):
    names = upward(module, imports(source, module, False))
    assert {name if name in found else layer(name) for name in names} == found


@pytest.mark.parametrize("folder", ["flex_jax", "tests", "configs"])
def test_no_file_is_longer_than_400_lines(folder):
    lengths = {str(path): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert lengths and not {path: length for path, length in lengths.items() if length > 400}
