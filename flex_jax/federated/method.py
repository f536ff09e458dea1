"""What a federated method is: which adapters exist and who owns them, how a client trains, how the server updates.

Everything is pure functions of plain data, so that a method reads like its paper. The defaults are FedAvg's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flex_jax.federated.compression import tree_bytes
from flex_jax.federated.placement import Placement, merge
from flex_jax.federated.state import ClientState
from flex_jax.models.decoder import Decoder


class ClientSettings(NamedTuple):
    """The numbers of config.client, under their names."""

    proximal_mu: float = 0.01
    ditto_lambda: float = 0.1
    mixing_alpha: float = 0.5
    personal_layers: int = 1
    weight_learning_rate: float = 1.0
    personal_steps: float = 0.5
    sync_every: int = 10
    ranks: tuple[int, ...] = ()
    rank_decay: float = 0.99
    rank_lambda: float = 5e-3
    lora_experts: int = 4
    held_experts: int = 2
    compression: str = "none"
    compression_fraction: float = 0.1


class ServerSettings(NamedTuple):
    """The numbers of config.server, under their names."""

    weighting: str = "examples"
    aggregation: str = "mean"
    byzantine: int = 1
    clip_norm: float = 0.0
    learning_rate: float = 1e-3
    tau: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99


class Settings(NamedTuple):
    """The numbers that methods are configured with; names as in the papers that they cite."""

    client: ClientSettings = ClientSettings()
    server: ServerSettings = ServerSettings()


DEFAULTS = Settings()
Loss = Callable[[dict], jax.Array]  # of a tree of trained adapters, to which the frozen ones are added


class Received(NamedTuple):
    """What a client has at hand when its round begins."""

    download: dict  # from the server: "shared" and what a method's server broadcasts beside it
    known: dict  # what all clients have alike from earlier downloads: stored once, not sent again
    client: ClientState  # its own
    round: jax.Array  # rounds done
    learning_rate: jax.Array
    steps: int
    settings: Settings


class Outcome(NamedTuple):
    """What comes out of a client's training."""

    upload: dict  # "delta", the change of the shared tree, and what the method sends beside it
    personal: dict
    kept: dict


def begin(received: Received, loss: Loss) -> dict:
    return {"shared": received.download["shared"], "personal": received.client.personal}


def objective(received: Received, trained: dict, loss: Loss) -> tuple[jax.Array, jax.Array]:
    value = loss(merge(trained["shared"], trained["personal"]))
    return value, value


def optimizer(received: Received, clip, adamw) -> optax.GradientTransformation:
    return optax.chain(clip, adamw)


def change(received: Received, trained: dict) -> dict:
    """How the shared tree has changed since it was received."""
    return jax.tree.map(jnp.subtract, trained["shared"], received.download["shared"])


def finish(received: Received, trained: dict) -> Outcome:
    return Outcome({"delta": change(received, trained)}, trained["personal"], received.client.kept)


class ClientRule(NamedTuple):
    """How a client trains.

    init: (shared tree, settings, number of the client) -> what it keeps beside its personal adapters.
    take: received -> what of the broadcast download it is sent.
    begin: (received, loss on the first batch) -> {"shared", "personal"}, the trees that it trains.
    objective: (received, trained, loss on a batch) -> (what is minimised, the loss to report).
    optimizer: (received, clipping, AdamW) -> the optax chain of a round on the trained trees.
    finish: (received, trained) -> `Outcome`.
    sent: (received, upload) -> bytes of (upload, download).
    """

    init: Callable[[dict, Settings, Any], dict] = lambda shared, settings, client: {}
    take: Callable[[Received], dict] = lambda received: received.download
    begin: Callable[[Received, Loss], dict] = begin
    objective: Callable[[Received, dict, Loss], tuple[jax.Array, jax.Array]] = objective
    optimizer: Callable[..., optax.GradientTransformation] = optimizer
    finish: Callable[[Received, dict], Outcome] = finish
    sent: Callable[[Received, dict], tuple[Any, Any]] = lambda received, upload: (
        tree_bytes(upload),
        tree_bytes(received.download),
    )


class Arrived(NamedTuple):
    """What the server has at hand at the end of a round."""

    uploads: dict  # of the cohort, with a leading axis C
    weights: jax.Array  # [C], summing to one
    mean: Callable[..., dict]  # of a stacked tree: weighted, or what config.server.aggregation puts in its place
    clients: int  # N, of the federation
    settings: Settings


def update(shared: dict, kept: dict, arrived: Arrived) -> tuple[dict, dict]:
    return optax.apply_updates(shared, arrived.mean(arrived.uploads["delta"])), kept


class ServerRule(NamedTuple):
    """How the server updates.

    init: (shared tree, settings, key) -> what the server keeps beside it.
    broadcast: that -> what every client of a cohort downloads beside the shared tree.
    known: that -> what all clients have alike from earlier downloads.
    update: (shared, kept, arrived) -> (shared, kept).
    """

    init: Callable[[dict, Settings, jax.Array], dict] = lambda shared, settings, key: {}
    broadcast: Callable[[dict], dict] = lambda kept: {}
    known: Callable[[dict], dict] = lambda kept: {}
    update: Callable[[dict, dict, Arrived], tuple[dict, dict]] = update


class Method(NamedTuple):
    """The choices that make a federated method.

    A method's adapters are one tree. `build` makes it of the model's own (LoRA on attention, and the slots where there
    are any), a key and the settings; `placement` gives each leaf its role; `compose` makes the model's adapters of it
    again, for training and for evaluation. The tree that compose is given may lack what the method does not train, and
    for the aggregated model lacks what is personal.
    """

    placement: Placement
    grafts: str = "none"  # "own": slots for the experts a client grafts; "all": for every expert, clients take theirs
    client: ClientRule = ClientRule()
    server: ServerRule = ServerRule()
    build: Callable[[dict, jax.Array, Settings], dict] = lambda adapters, key, settings: adapters
    compose: Callable[[dict, Received], dict] = lambda tree, received: tree
    common: bool = True  # whether the shared part alone makes a model


class Recipe(NamedTuple):
    """All that is static about a run; hashable, so that functions compile once for equal ones."""

    model: Decoder
    method: Method
    settings: Settings = DEFAULTS
