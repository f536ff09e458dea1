"""Compares the time to choose all clients' experts with a forward pass that uses all experts.

    python benchmarks/grafting.py benchmarks/shapes/small.json --clients 4 --examples 16 --sequence 128

Weights and tokens are random, in batches of 8 examples per client. The forward pass runs over the same calibration
tokens, with all E experts of every layer active for every token. `ratio` is the time of the choice over the time of
the forward pass. A ratio near 1 is expected, because the choice too needs the output of each expert on each token.
Prints one JSON line.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from measure import device, draw_bars, emit, random_params, seconds

from flex_jax.grafting.selection import by_reconstruction
from flex_jax.models.checkpoint import empty_params, read_model_config
from flex_jax.models.decoder import Decoder

BATCH = 8


def main() -> None:
    """Measures both times and prints their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a config.json")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    shape = read_model_config(options.model)
    params = random_params(jax.eval_shape(partial(empty_params, shape, dtype=options.dtype)))
    rng, grid = np.random.default_rng(0), (options.clients, BATCH, options.sequence)
    steps = options.examples // BATCH
    batches = [
        (rng.integers(0, shape.vocab_size, grid).astype(np.int32), np.ones(grid, np.int32)) for _ in range(steps)
    ]
    model = Decoder(shape)
    every = Decoder(replace(shape, num_experts_per_tok=shape.num_experts, n_group=0))

    @jax.jit
    def forward(params, tokens):
        features = partial(every.apply, {"params": params}, method=Decoder.features)
        return jax.vmap(lambda tokens: features(tokens).hidden.sum())(tokens)

    graft_s = seconds(lambda: by_reconstruction(model, params, lambda: batches, 1), repeats=3)
    forward_s = seconds(lambda: [forward(params, tokens) for tokens, _ in batches], repeats=3)
    result = {
        "model": options.model.stem,
        "tokens": steps * int(np.prod(grid)),
        "graft_s": round(graft_s, 4),
        "forward_all_experts_s": round(forward_s, 4),
        "ratio": round(graft_s / forward_s, 3),
        "device": device(),
    }
    if options.plot:
        values = {"grafting": graft_s, "forward, all experts": forward_s}
        draw_bars(options.plot, f"{options.model.stem}: choosing experts", "seconds", values)
    emit(result)


if __name__ == "__main__":
    main()
