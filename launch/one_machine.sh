#!/usr/bin/env bash
# Runs a config on one machine, on its GPUs or TPU chips if JAX finds any, else on the CPU.
# Give the same command again to resume an interrupted run.
#   launch/one_machine.sh configs/quickstart.py [--workdir DIR] [--config.rounds=3 ...]
set -euo pipefail
cd "$(dirname "$0")/.."

# Caches compiled programs, so that a resumed run starts in seconds.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/flex_jax}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}"
exec python -m flex_jax.main --config "$@"
