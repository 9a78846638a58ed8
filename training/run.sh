#!/usr/bin/env bash
# Train the demo model on one GPU, from wherever the last call stopped, for at most LIMIT seconds.
#
#   bash training/run.sh           go on with the plan; exits 0 with everything saved
#   bash training/run.sh smoke     every stage and file with tiny step counts, in a minute or two
#
# Needs training/work/scenes.npz and prompts.npz (python -m training.dataset, training.prompts).
#   INIT=file      begin from the weights of this all-in-one file; no VAE is trained
#   TEXT=file      with INIT: these text encoders (training.train_text), a new transformer
#   RULE=1.25      strength of guidance, instead of a search on validation prompts
#   LIMIT=555      seconds for this call; saving and packing can take 35 more
#   KEEP=1         at the limit leave the training running; the next call finds it and waits on
#   OUT=folder     at the end pack results there (training.collect)
#   PROFILE=1      log the slowest kernels of every stage
#   DRY_RUN=1      tiny networks (with INIT the file's own), to try the script on a CPU
#   VAE_SECONDS, FLOW_SECONDS, DISTIL_SECONDS, AWARE_SECONDS: training time of the whole plan;
#                  give every call of one plan the same, and the same INIT
set -euo pipefail
cd "$(dirname "$0")/.."

limit=${LIMIT:-555}
init=${INIT:-}
if [[ -n $init ]]; then flow_seconds=1150; else flow_seconds=780; fi
vae_options=(--seconds "${VAE_SECONDS:-220}")
flux_options=(
    --flow-seconds "${FLOW_SECONDS:-$flow_seconds}"
    --distil-seconds "${DISTIL_SECONDS:-90}"
    --aware-seconds "${AWARE_SECONDS:-200}"
)
if [[ -n ${RULE:-} ]]; then flux_options+=(--rule "$RULE"); fi
if [[ -n ${PROFILE:-} ]]; then flux_options+=(--profile); fi
# The VAE is on the critical path: its compilation gets the processor first.
head_start=${HEAD_START:-30}

if [[ ${1:-} == smoke ]]; then
    vae_options=(--seconds 4 --no-compile --save-every 1)
    flux_options+=(
        --flow-seconds 4 --distil-seconds 2 --aware-seconds 2 --save-every 1
        --num-scenes 4096 --num-judged 24 --max-sampling-steps 2 --no-compile
    )
    head_start=0
fi
if [[ -n ${DRY_RUN:-} ]]; then
    vae_options+=(--dry-run --batch-size 2)
    flux_options+=(--batch-size 4 --num-scenes 16 --num-judged 2)
    if [[ -z $init ]]; then flux_options+=(--dry-run); fi
fi

export PYTHONPATH="$PWD/src:$PWD" PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR="$PWD/training/work/cache/inductor"
export TRITON_CACHE_DIR="$PWD/training/work/cache/triton"

# Chooses the folder of a plan, and what it begins from.
use() {
    work=$1 init=$2 state=$1/state
    mkdir -p "$state"
}

# A new folder for a trial plan.
use_trial() {
    rm -rf "$1"
    use "$1" "$2"
    cp training/work/scenes.npz training/work/prompts.npz "$work"
}

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

start_flux() {
    local options=("${flux_options[@]}")
    if [[ -n $init ]]; then
        options+=(--init "$init")
        if [[ -n ${TEXT:-} ]]; then options+=(--text "$TEXT"); fi
    elif [[ ! -f $state/autoencoder.json ]]; then
        sleep "$head_start"
    fi
    start flux training.train_transformer "${options[@]}"
}

# Trains until all is done, something fails, or this second of the script's life.
train_until() {
    local until=$1
    if [[ -z $init ]]; then is_running vae || start vae training.train_autoencoder "${vae_options[@]}"; fi
    is_running flux || start_flux
    while is_running flux && ! failed vae && ((SECONDS < until)); do sleep 0.5; done
    if [[ -z ${KEEP:-} ]] || failed vae; then stop; fi
    sleep 0.5 # the wrapper notes the exit code
}

report() {
    if [[ -f $state/vae.out ]]; then tail -n 12 "$state/vae.out"; fi
    tail -n "${1:-40}" "$state/flux.out"
    grep -h warning: "$state"/*.out | sort -u || true
    if failed vae || failed flux; then
        if [[ -n ${OUT:-} ]]; then python3 -m training.collect pack "$OUT" --work "$work"; fi
        echo "training failed: see $state/*.out" >&2
        exit 1
    fi
}

if [[ ${1:-} == smoke ]]; then
    unset KEEP
    trial=training/work/smoke
    if [[ -z $init ]]; then
        use_trial $trial ""
        train_until 25 # stopped in the middle, to be resumed
        train_until "$limit"
        report 12
        package=$trial/bf16.safetensors
        python3 -m training.package_demo --work "$work" \
            --shipped "$work/shipped.safetensors" --bf16 "$package"
        init=$package
    fi
    use_trial $trial-warm "$init"
    train_until "$limit"
    OUT=$work/pieces
else
    use training/work "$init"
    train_until "$limit"
fi

report
if [[ -n ${OUT:-} ]]; then python3 -m training.collect pack "$OUT" --work "$work"; fi
