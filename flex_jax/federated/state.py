"""The plain data of federated training."""

from typing import Any, NamedTuple

import jax


class Frozen(NamedTuple):
    """What nobody trains. It is stored once for all clients."""

    params: dict  # the pretrained backbone
    adapters: dict  # adapters with the owner "frozen"


class ServerState(NamedTuple):
    """What the server has between rounds."""

    shared: Any  # the aggregated adapters, a nested dict
    extra: Any  # what the method's server needs in addition: moments, control variates


class ClientState(NamedTuple):
    """What a client has between rounds. In RoundState every leaf has a leading axis C of clients."""

    personal: dict  # the personal adapters
    grafts: dict  # int32 indices of the pretrained experts that its slots came from; they never change
    extra: dict  # what the method's client needs in addition: control variates, a rank
    residual: dict  # what a lossy compression has not sent yet


NO_CLIENTS = ClientState({}, {}, {}, {})


class ClientUpdate(NamedTuple):
    """The result of one client's round. The server gets `upload` and the number of examples, nothing else."""

    upload: Any  # a compressed `Upload`
    state: ClientState
    metrics: dict[str, jax.Array]


class RoundState(NamedTuple):
    """The input and output of a round, without the backbone."""

    round: jax.Array  # [] int32: finished rounds
    server: ServerState
    clients: ClientState  # states of the cohort, in its order; those of all other clients are on disk
    key: jax.Array  # the run's key. It never changes: round and client are folded into it


class RoundInputs(NamedTuple):
    """The arguments of a round function, in their order."""

    frozen: Any  # `Frozen`: one copy for all clients
    state: Any  # `RoundState`; its clients are the states of the cohort, leading axis C
    batches: Any  # `Batch`, leading axes [C, steps, B, S]
    cohort: Any  # [C] int32: numbers of the clients
    num_examples: Any  # [C] float32: their training examples
