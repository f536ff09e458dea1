"""Training that becomes NaN or infinite: a client is left out of the round, and a run ends at its last good state."""

from collections.abc import Sequence

import jax
import numpy as np

from flex_jax.errors import Diverged
from flex_jax.federated.aggregation import check_cohort
from flex_jax.federated.method import Settings
from flex_jax.federated.state import ClientState
from flex_jax.results import ClientScores

REMEDY = "lower config.optimizer.learning_rate or config.optimizer.clip_norm"


def check_round(
    settings: Settings, names: list[str], number: int, cohort: np.ndarray, measured: dict[str, dict]
) -> np.ndarray:
    """Returns which clients of a cohort, bool [C], are left out of a round because their update is not finite.

    Raises Diverged if too few others are left, fewer than half or than the aggregation needs, or if the server's new
    state is not finite. The state after the round before is stored.
    """
    finite = measured["clients"]["finite"]
    left = int(finite.sum())
    if 2 * left < len(finite) or check_cohort(settings.aggregation, settings.byzantine, left):
        wrong = ", ".join(names[client] for client in cohort[~finite][:5].tolist())
        raise Diverged(
            f"diverged in round {number + 1}: of {len(finite)} clients {len(finite) - left} have an update that is not "
            f"finite ({wrong}): {REMEDY}; the state after round {number} is stored"
        )
    if not measured["server"]["finite"]:
        raise Diverged(
            f"diverged in round {number + 1}: the server's new state is not finite: lower the method's server rate or "
            f"config.server.clip_norm, or {REMEDY}; the state after round {number} is stored"
        )
    return ~finite


def put_back(states: ClientState, left_out: np.ndarray, former: ClientState) -> ClientState:
    """Returns the states of a cohort [C] after a round, with the former ones of the clients that are left out."""
    rows = np.flatnonzero(left_out)
    return jax.tree.map(lambda new, old: new.at[rows].set(old), states, former)


def left_out_line(run: str, client: str, number: int) -> str:
    """Returns what to tell when a client is left out of a round."""
    return (
        f"{run}, round {number + 1}: the update of client {client} is not finite, so it is left out and its "
        f"state is as before; if it happens again, {REMEDY}"
    )


def check_scores(names: Sequence[str], scores: Sequence[ClientScores]) -> None:
    """Raises Diverged if the final loss of a client is not finite."""
    wrong = [name for name, client in zip(names, scores, strict=True) if not np.isfinite(client["eval_loss"] or 0)]
    if wrong:
        raise Diverged(
            f"diverged: the evaluation loss of {len(wrong)} of {len(scores)} clients is not finite "
            f"({', '.join(wrong[:5])}): {REMEDY}"
        )
