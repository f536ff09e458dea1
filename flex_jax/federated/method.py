"""The contract of a federated method: who owns which adapter, how a client trains, how the server updates.

A method is plain data and pure functions, so that it reads like its paper. Every default is FedAvg's. JAX traces all
functions but `check`. Those of a client are written for one client and run under `vmap` over the cohort. Those of a
round run in one jit; `select_download` and `compose` also serve evaluation and export.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from flex_jax.federated.compression import ByteCount, tree_bytes
from flex_jax.federated.ownership import Ownership, merge
from flex_jax.federated.state import ClientState, ServerState
from flex_jax.models.adapters import LORA, ProjectionAdapter
from flex_jax.models.decoder import Decoder


class Settings(NamedTuple):
    """How uploads are compressed, weighted and aggregated, with any method that does not refuse it in `check`."""

    compression: str = "none"
    compression_fraction: float = 0.1
    weighting: str = "examples"
    aggregation: str = "mean"
    byzantine: int = 1
    clip_norm: float = 0.0


class Download(NamedTuple):
    """What the server sends to a client."""

    shared: dict
    extra: dict  # the server's extra state, if `ServerRule.extra_visibility` is "broadcast"


class Upload(NamedTuple):
    """What a client sends to the server."""

    delta: dict  # trained shared tree minus downloaded shared tree
    extra: dict = {}


class Trained(NamedTuple):
    """The two trees that a client optimises. They may differ from what is stored: FDLoRA's has fusion weights."""

    personal: dict
    shared: dict


class ClientContext(NamedTuple):
    """What a client has at the start of its round."""

    download: Download
    replicated: dict  # the server's extra state, if `ServerRule.extra_visibility` is "replicated"
    state: ClientState
    round: jax.Array  # [] int32: finished rounds
    learning_rate: jax.Array
    num_steps: int


class ClientResult(NamedTuple):
    """What a client has at the end of its round."""

    upload: Upload
    personal: dict
    extra: dict


class Mean(Protocol):
    """The aggregation that the config asks for: a weighted mean, or a robust rule in its place."""

    def __call__(self, stacked: dict, *, weights: jax.Array | None = None) -> dict:
        """Combines trees with a leading axis C. `weights` [C] sum to one; by default those of the clients."""
        ...


class ServerContext(NamedTuple):
    """What the server has at the end of a round."""

    uploads: Upload  # leading axis C; `delta`, not `extra`, is already clipped to config.server.clip_norm
    weights: jax.Array  # [C] float32, sum to one; 0 for a client that is left out: then its upload is zeros
    mean: Mean
    num_clients: int  # N: clients of the federation, not of the cohort


Loss = Callable[[dict], jax.Array]  # trained leaves, which it composes with the frozen ones -> mean nats per token


class InitClientExtra(Protocol):
    """(shared tree, number of the client) -> its extra state, a dict of arrays."""

    def __call__(self, shared: dict, client_id: jax.Array, /) -> dict: ...


class SelectDownload(Protocol):
    """(what the server offers, the client's state) -> what the client downloads; evaluation uses the same."""

    def __call__(self, offered: Download, client: ClientState, /) -> Download: ...


class InitTrained(Protocol):
    """(context, loss on the first batch) -> the trees that the client trains, at their first step."""

    def __call__(self, context: ClientContext, loss: Loss, /) -> Trained: ...


class Objective(Protocol):
    """(context, trained trees, loss on a batch) -> (what is minimised, the loss to report)."""

    def __call__(self, context: ClientContext, trained: Trained, loss: Loss, /) -> tuple[jax.Array, jax.Array]: ...


class Optimizer(Protocol):
    """(context, clipping, AdamW) -> the optax transformation of the client's steps on a `Trained`."""

    def __call__(
        self, context: ClientContext, clip: optax.GradientTransformation, adamw: optax.GradientTransformation, /
    ) -> optax.GradientTransformation: ...


class MakeResult(Protocol):
    """(context, trained trees) -> what the client uploads and stores."""

    def __call__(self, context: ClientContext, trained: Trained, /) -> ClientResult: ...


class WireBytes(Protocol):
    """(context, compressed upload) -> bytes on the wire of (upload, download)."""

    def __call__(self, context: ClientContext, upload: Upload, /) -> tuple[ByteCount, ByteCount]: ...


class InitServerExtra(Protocol):
    """(shared tree, key) -> the server's extra state, a dict of arrays or an optax state."""

    def __call__(self, shared: dict, key: jax.Array, /) -> Any: ...


class ServerUpdate(Protocol):
    """(server state, context) -> server state after the round."""

    def __call__(self, server: ServerState, context: ServerContext, /) -> ServerState: ...


class Build(Protocol):
    """(the model's adapters, key) -> the method's adapters, to whose paths `Method.ownership` applies."""

    def __call__(self, adapters: dict, key: jax.Array, /) -> dict: ...


class Compose(Protocol):
    """(the method's adapters, a client's extra state, replicated state) -> the model's adapters.

    It serves training, evaluation and export, so it gets nothing that only training has. `adapters` may lack leaves
    that the client does not train. For the aggregated model it lacks everything personal, and `client_extra` is empty.
    """

    def __call__(self, adapters: dict, client_extra: dict, replicated: dict, /) -> dict: ...


def init_trained(context: ClientContext, loss: Loss) -> Trained:
    return Trained(personal=context.state.personal, shared=context.download.shared)


def objective(context: ClientContext, trained: Trained, loss: Loss) -> tuple[jax.Array, jax.Array]:
    value = loss(merge(trained.shared, trained.personal))
    return value, value


def optimizer(context: ClientContext, clip, adamw) -> optax.GradientTransformation:
    return optax.chain(clip, adamw)


def delta(context: ClientContext, trained: Trained) -> dict:
    """Returns how the shared tree has changed since its download."""
    return jax.tree.map(jnp.subtract, trained.shared, context.download.shared)


def make_result(context: ClientContext, trained: Trained) -> ClientResult:
    return ClientResult(Upload(delta(context, trained)), trained.personal, context.state.extra)


def wire_bytes(context: ClientContext, upload: Upload) -> tuple[ByteCount, ByteCount]:
    return ByteCount(tree_bytes(upload)), ByteCount(tree_bytes(context.download))


class ClientRule(NamedTuple):
    """How a client trains. `init_extra` makes its first state; the others run in each round, `optimizer` first.

    For the aggregated model, `select_download` gets an empty client state.
    """

    init_extra: InitClientExtra = lambda shared, client_id: {}
    select_download: SelectDownload = lambda offered, client: offered
    init_trained: InitTrained = init_trained
    objective: Objective = objective
    optimizer: Optimizer = optimizer
    make_result: MakeResult = make_result
    wire_bytes: WireBytes = wire_bytes


def server_update(server: ServerState, context: ServerContext) -> ServerState:
    return server._replace(shared=optax.apply_updates(server.shared, context.mean(context.uploads.delta)))


class ServerRule(NamedTuple):
    """How the server updates.

    extra_visibility says who sees the server's extra state: the "server" alone; the clients of the cohort, which
    download it each round ("broadcast"); or all clients, as if from earlier downloads, uncounted ("replicated").
    """

    init_extra: InitServerExtra = lambda shared, key: {}
    extra_visibility: Literal["server", "broadcast", "replicated"] = "server"
    update: ServerUpdate = server_update


class Method(NamedTuple):
    """A federated method.

    Its adapters are one tree. `build` makes it from the model's adapters (LoRA on attention, and slots if the method
    grafts), `ownership` gives each leaf its owner, and `compose` turns it back into the model's adapters.

    Attributes:
        grafts: "none": no slots. "client": each client has a slot for the experts that it grafts. "all": the server has
            a table with a slot for every expert, and each client trains a few of them.
        projection: how a projection of the model reads the adapter leaves at its place; by default LoRA.
        has_global_model: whether the shared adapters alone make a model.
        check: raises InputError if the method cannot work with this model or these settings.
    """

    ownership: Ownership
    grafts: Literal["none", "client", "all"] = "none"
    client: ClientRule = ClientRule()
    server: ServerRule = ServerRule()
    build: Build = lambda adapters, key: adapters
    compose: Compose = lambda adapters, client_extra, replicated: adapters
    projection: ProjectionAdapter = LORA
    has_global_model: bool = True
    check: Callable[[Decoder, Settings], None] = lambda model, settings: None


class MethodSpec(NamedTuple):
    """Model, method and settings of a run. It is hashable: functions compile once for equal specs."""

    model: Decoder
    method: Method
    settings: Settings = Settings()
