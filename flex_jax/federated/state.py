"""The plain data of federated training."""

from typing import NamedTuple

import jax


class Frozen(NamedTuple):
    """What no one trains, stored once for all clients."""

    params: dict  # the pretrained backbone
    adapters: dict  # adapters of role "frozen"


class ServerState(NamedTuple):
    shared: dict
    kept: dict  # what a method's server keeps beside it: moments, control variates


class ClientState(NamedTuple):
    """What a client keeps to itself. In RoundState every leaf has a leading axis, one row a client."""

    personal: dict
    grafts: dict  # which pretrained experts its slots came from; int32, fixed
    kept: dict  # what a method's client keeps beside them: control variates, a rank
    residual: dict  # what a lossy compression has not sent yet


NO_CLIENTS = ClientState({}, {}, {}, {})


class ClientUpdate(NamedTuple):
    """What comes out of one client's round. The server is handed `upload` and the number of examples, nothing else."""

    upload: dict  # compressed: "delta", trained shared - received shared, and what the method sends beside it
    state: ClientState
    metrics: dict[str, jax.Array]


class RoundState(NamedTuple):
    """What a round is given and gives back; the backbone is not in it."""

    round: jax.Array  # [] int32: rounds done
    server: ServerState
    clients: ClientState  # the rows of the cohort, in its order; those of all others lie on disk
    key: jax.Array  # the run's key; round and client are folded into it, it never changes
