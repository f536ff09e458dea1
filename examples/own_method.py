r"""A method of one's own: a server that steps further, a hyperparameter, and an adapter that is not a LoRA.

    python -m flex_jax.main --config configs/quickstart.py --config.seeds=0, --workdir runs/own_method \
        --config.methods='("flex","examples/own_method.py:fedexp","examples/own_method.py:bias")' \
        --config.hparams.fedexp.max_eta=2.0
    python examples/own_method.py     # that run, with two short rounds

docs/add_a_method.md explains each part.
"""

import jax
import jax.numpy as jnp
import optax

from flex_jax import Method
from flex_jax.federated.method import ServerRule
from flex_jax.models.adapters import ProjectionAdapter


def fedexp(max_eta: float = 10.0) -> Method:
    """FedExP (Jhunjhunwala et al. 2023, arXiv 2301.09604): FedAvg whose server steps further if clients agree.

    Args:
        max_eta: largest step. The paper has none.
    """

    def update(server, context):
        """w + eta_g * mean delta, eta_g = max(1, sum ||delta_i||^2 / (2 C ||mean delta||^2))."""
        deltas = context.uploads.delta  # every leaf has a leading axis C of clients
        mean = context.mean(deltas)
        squares = jax.vmap(lambda delta: optax.tree.norm(delta, squared=True))(deltas)
        eta = jnp.clip(squares.mean() / (2 * optax.tree.norm(mean, squared=True)), 1.0, max_eta)
        return server._replace(shared=optax.apply_updates(server.shared, optax.tree.scale(eta, mean)))

    return Method(ownership=((r".*", "shared"),), server=ServerRule(update=update))


def bias() -> Method:
    """A personal bias [L, D] on the output of attention, in addition to FedAvg's shared LoRA."""

    def build(adapters, key):
        layers = adapters["layers"]
        num_layers, hidden_size, _ = layers["attention"]["q_proj"]["lora_a"].shape
        output = {"o_proj": {"bias": jnp.zeros((num_layers, hidden_size))}}
        return adapters | {"layers": layers | {"attention": layers["attention"] | output}}

    def apply(leaves, lora, x, y, dropout):
        if "bias" in leaves:
            return y + leaves["bias"].astype(y.dtype)
        return y + dropout(x) @ leaves["lora_a"] @ leaves["lora_b"] * (lora.alpha / lora.rank)

    return Method(
        ownership=((r".*/bias", "personal"), (r".*", "shared")), build=build, projection=ProjectionAdapter(apply)
    )


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    from flex_jax.experiment import run
    from flex_jax.main import load, override

    config = load(str(Path(__file__).parents[1] / "configs/quickstart.py"))
    override(config, ["--config.hparams.fedexp.max_eta=2.0", "--config.seeds=0,", "--config.rounds=2"])
    config.methods = ("fedavg", f"{__file__}:fedexp", f"{__file__}:bias")
    with tempfile.TemporaryDirectory() as folder:
        run(config, Path(folder) / "run")
