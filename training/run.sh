#!/usr/bin/env bash
# Train the demo model on one GPU, from wherever the last call stopped, for at most LIMIT seconds.
#
#   bash training/run.sh           go on with the plan; exits 0 with everything saved
#   bash training/run.sh smoke     every stage and file with tiny step counts, in about a minute
#
# Needs training/work/scenes.npz and prompts.npz (python -m training.dataset, training.prompts).
#   LIMIT=555      seconds for this call; saving and packing can take 35 more
#   KEEP=1         at the limit leave the training running; the next call finds it and waits on
#   OUT=folder     at the end pack results there (training.collect)
#   DRY_RUN=1      tiny networks, to try the script on a CPU
#   VAE_SECONDS, FLOW_SECONDS, DISTIL_SECONDS, AWARE_SECONDS: training time of the whole plan;
#                  give every call of one plan the same
set -euo pipefail
cd "$(dirname "$0")/.."

work=training/work
limit=${LIMIT:-555}
vae_options=(--seconds "${VAE_SECONDS:-220}")
flux_options=(
    --flow-seconds "${FLOW_SECONDS:-780}"
    --distil-seconds "${DISTIL_SECONDS:-80}"
    --aware-seconds "${AWARE_SECONDS:-180}"
)
# The VAE is on the critical path: its compilation gets the processor first.
head_start=${HEAD_START:-30}

if [[ ${1:-} == smoke ]]; then
    work=training/work/smoke
    rm -rf "$work"
    mkdir -p "$work"
    cp training/work/scenes.npz training/work/prompts.npz "$work"
    vae_options=(--seconds 4 --no-compile --save-every 1)
    flux_options=(
        --flow-seconds 4 --distil-seconds 2 --aware-seconds 2 --save-every 1
        --num-scenes 4096 --num-judged 24 --max-sampling-steps 2 --no-compile
    )
    head_start=0
fi
if [[ -n ${DRY_RUN:-} ]]; then # tiny networks, for a CPU
    vae_options+=(--dry-run --batch-size 2)
    flux_options+=(--dry-run --batch-size 4 --num-scenes 16 --num-judged 2)
fi

state=$work/state
mkdir -p "$state"
export PYTHONPATH="$PWD/src:$PWD" PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR="$PWD/training/work/cache/inductor"
export TRITON_CACHE_DIR="$PWD/training/work/cache/triton"

is_running() {
    [[ -f $state/$1.pid ]] && kill -0 "$(cat "$state/$1.pid")" 2>/dev/null
}

# Starts a module in a session of its own, so that KEEP can leave it running; notes its exit code.
start() {
    local name=$1 module=$2
    shift 2
    rm -f "$state/$name.exit" "$state/$name.pid"
    # shellcheck disable=SC2016
    setsid bash -c '
        state=$1 name=$2 module=$3; shift 3
        python3 -m "$module" "$@" & child=$!
        echo "$child" > "$state/$name.pid"
        wait "$child"; echo "$?" > "$state/$name.exit"
    ' _ "$state" "$name" "$module" --work "$work" "$@" >> "$state/$name.out" 2>&1 &
    while [[ ! -f $state/$name.pid ]]; do sleep 0.1; done
}

# Being stopped (143), or killed while it compiles (137), is no failure: nothing is lost.
failed() {
    [[ -f $state/$1.exit && ! $(cat "$state/$1.exit") =~ ^(0|137|143)$ ]]
}

stop() {
    local name waited=0
    for name in vae flux; do
        if is_running "$name"; then kill -TERM "$(cat "$state/$name.pid")" || true; fi
    done
    while is_running vae || is_running flux; do
        if ((++waited > 25)); then
            for name in vae flux; do
                if is_running "$name"; then kill -KILL "$(cat "$state/$name.pid")" || true; fi
            done
        fi
        sleep 1
    done
}

# Trains until all is done, something fails, or this second of the script's life.
train_until() {
    local until=$1
    is_running vae || start vae training.train_autoencoder "${vae_options[@]}"
    if ! is_running flux; then
        if [[ ! -f $state/autoencoder.json ]]; then sleep "$head_start"; fi
        start flux training.train_transformer "${flux_options[@]}"
    fi
    while is_running flux && ! failed vae && ((SECONDS < until)); do sleep 0.5; done
    if [[ -z ${KEEP:-} ]] || failed vae; then stop; fi
    sleep 0.5 # the wrapper notes the exit code
}

if [[ ${1:-} == smoke ]]; then
    unset KEEP
    train_until 25 # stopped in the middle, to be resumed
    train_until "$limit"
    python3 -m training.package_demo --work "$work" \
        --shipped "$work/shipped.safetensors" --bf16 "$work/bf16.safetensors"
    OUT=$work/pieces
else
    train_until "$limit"
fi

tail -n 12 "$state/vae.out"
tail -n 40 "$state/flux.out"
grep -h warning: "$state"/*.out | sort -u || true
if [[ -n ${OUT:-} ]]; then python3 -m training.collect pack "$OUT" --work "$work"; fi
if failed vae || failed flux; then
    echo "training failed: see $state/*.out" >&2
    exit 1
fi
