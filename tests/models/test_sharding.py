"""How parameters are divided over a mesh: by name, for every family."""

import math
import re
from functools import partial
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from flex_jax.models.checkpoint import empty_params, read_model_config
from flex_jax.models.sharding import AXES, PARAM_DIVISIONS, param_spec, param_specs

SHAPES = sorted((Path(__file__).parents[2] / "benchmarks" / "shapes").glob("*.json"))
MESHES = [AbstractMesh(sizes, AXES) for sizes in ((8, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 2), (1, 3, 1), (1, 64, 2))]


def leaves_with_paths(tree):
    """Yields (path, leaf) of each array. The parts of a quantised matrix have the path of the matrix."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, P)):
        yield "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey)), leaf


def by_rank(mesh, path, shape):
    """The same division by the rank of an array: experts have four dimensions, other matrices two per layer."""
    stacked = 1 if path.split("/")[0].endswith("layers") else 0
    if len(shape) == 4:
        choices = [(("expert",), [1]), (("fsdp",), [2, 3])]
    else:
        choices = [(("fsdp", "expert"), range(stacked, len(shape)))] if len(shape) - stacked == 2 else []
    spec = [None] * len(shape)
    for axes, dimensions in choices:
        axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
        size = math.prod(mesh.shape[axis] for axis in axes)
        fitting = [dimension for dimension in dimensions if axes and shape[dimension] % size == 0]
        if fitting:
            spec[fitting[0]] = axes
    return P(*spec)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda file: file.stem)
def shapes(request):
    config = read_model_config(request.param)
    return [
        jax.eval_shape(partial(empty_params, config, dtype="bfloat16", quantisation=kind)) for kind in (None, "int4")
    ]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh.axis_sizes)))
def test_the_division_by_name_is_that_by_rank(shapes, mesh):
    for params in shapes:
        specs = param_specs(mesh, params)
        for (path, leaf), (same_path, spec) in zip(*map(leaves_with_paths, (params, specs)), strict=True):
            assert path == same_path
            assert spec == param_spec(mesh, path, leaf.shape) == by_rank(mesh, path, leaf.shape), path


def test_every_row_of_the_table_is_used():
    paths = set()
    for file in SHAPES:
        params = jax.eval_shape(partial(empty_params, read_model_config(file), dtype="bfloat16"))
        paths |= {path for path, _ in leaves_with_paths(params)}
    for pattern, _ in PARAM_DIVISIONS:
        assert any(re.fullmatch(pattern, path) for path in paths), pattern


@pytest.mark.parametrize("path", ["layers/moe/gate", "layers/moe/experts/gate_up", "layers/scale", "norm", "tail"])
def test_a_parameter_that_the_table_does_not_know_is_an_error(path):
    with pytest.raises(ValueError, match=f"parameter {path} is covered by no row"):
        param_spec(MESHES[0], path, (2, 4, 4))
