"""The fixtures of a small federation."""

from tests.federated.fixtures import abstract, batches, examples, one_round, prepared, round_of, run_rounds, spec_of  # noqa: F401
