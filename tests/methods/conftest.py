"""The federation of tests/federated, for methods."""

from tests.federated.conftest import batches, examples, one_round, prepared, recipe_of, round_of  # noqa: F401  (fixtures)
