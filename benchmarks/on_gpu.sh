#!/usr/bin/env bash
# Everything that needs a GPU, in one go: bash benchmarks/on_gpu.sh FOLDER [STAGE=SECONDS ...]
#
# Stages run in the order given, each for at most its seconds, and log to FOLDER/STAGE.log; what
# fails does not stop the next. `SECTIONS` and `PART` pick parts of `step` and `memory`; in the folder
# `KEPT` weights and results stay, so that another call goes on. Without any: tests=300 kernels=120 step=560 memory=540.
set -u
cd "$(dirname "$0")/.." || exit
out=$1
shift
[ $# -gt 0 ] || set -- tests=300 kernels=120 step=560 memory=540
mkdir -p "$out"
export PYTHONPATH=src:tests:.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}

stage() {
    case $1 in
    tests) python3 -m pytest tests/gpu -q -n 6 -p no:cacheprovider -p no:benchmark --color=no -rfE ;;
    kernels) python3 -m benchmarks.kernels ;;
    step) python3 -m benchmarks.step --out "$out" --limit "$2" --commit "$commit" ${SECTIONS:+--only "$SECTIONS"} ;;
    memory)
        python3 -m benchmarks.memory "${KEPT:-$out}/memory.jsonl" --seconds $(($2 - 15)) --commit "$commit" \
            ${PART:+--part "$PART"} ${KEPT:+--folder "$KEPT"}
        if [ -n "${KEPT:-}" ]; then cp "$KEPT/memory.jsonl" "$out"; fi
        ;;
    esac
}
export -f stage
export out commit

{
    nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm --format=csv,noheader
    python3 -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
    echo "commit $commit"
} >"$out/machine.txt"
for each in "$@"; do
    name=${each%=*} seconds=${each#*=} began=$SECONDS
    timeout -k 5 "$seconds" bash -c "stage $name $seconds" >"$out/$name.log" 2>&1
    echo "$name: exit $? after $((SECONDS - began)) s" | tee -a "$out/machine.txt"
done
