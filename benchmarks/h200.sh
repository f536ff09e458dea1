#!/usr/bin/env bash
# Runs all GPU measurements on one GPU in under 9 minutes: the shape of Qwen1.5-MoE-A2.7B, random weights, bfloat16.
#   benchmarks/h200.sh OUT [PEER PYTHON]
# OUT: a folder for the JSON line and the log of each measurement. PEER, PYTHON: as in against_torch.py; without them,
# the PyTorch peer is skipped. If a measurement fails or takes too long, this is printed, and the others still run.
set -uo pipefail
out=$(realpath -m "$1"); peer=${2:+$(realpath "$2")}; python=${3:-}
cd "$(dirname "$0")/.."
mkdir -p "$out"
shape=benchmarks/shapes/Qwen1.5-MoE-A2.7B.json
round=(python benchmarks/round.py "$shape" --config.model.dtype=bfloat16 --config.batch_size=4 --config.sequence_length=512
    --config.local_steps=2 --config.lora.rank=32)
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/cache}"

measure() {  # NAME SECONDS COMMAND...
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    if timeout "$limit" "$@" >"$out/$name.json" 2>"$out/$name.log"; then
        echo "$name ($((SECONDS - started)) s): $(tail -n 1 "$out/$name.json")"
    else
        echo "$name: failed or over $limit s: $(tail -n 1 "$out/$name.log")"
    fi
}

measure operators 50 python benchmarks/operators.py "$shape" --tokens 8192 --dtype bfloat16 --plot "$out/operators.png"
measure round_4 80 "${round[@]}" --config.clients=4 --plot "$out/round_4.png"
if [ -n "$peer" ]; then
    measure against_torch 150 python benchmarks/against_torch.py --peer "$peer" --python "$python" --shape qwen15moe \
        --clients 4 --batch 4 --sequence 512 --steps 2 --rounds 2 --repeats 1 --experts grouped_mm --device cuda
fi
measure round_16 80 "${round[@]}" --config.clients=16
measure round_int8 50 "${round[@]}" --config.clients=4 --config.model.quantisation=int8
measure round_int4 50 "${round[@]}" --config.clients=4 --config.model.quantisation=int4
generate=(python benchmarks/generate.py "$shape" --config.model.dtype=bfloat16 --config.slot.training=lora --clients 16)
if [ -n "$peer" ]; then
    generate+=(--peer "$peer" --python "$python" --shape qwen15moe --device cuda)
fi
measure generate 80 "${generate[@]}"
