#!/usr/bin/env bash
# From video to a trained model that can be steered, on this machine: `make demo`.
# Words after the name go to `msc train`, such as ./demo.sh train.clips=64 for a quick look.
set -euo pipefail
cd "$(dirname "$0")"
export PATH="$PWD/.venv/bin:$PATH"
demo=demo_run
run=$demo/run
clip=3
say() { printf '\n== %s (after %d s)\n' "$*" "$SECONDS"; }

rm -rf $demo
mkdir $demo

# A small maze of plain coloured walls, and somebody who wanders through it: what he does is beside every video.
say "a world, and walks through it"
python - $demo/walks <<'E_PYTHON'
import sys
from msc.datasets.synthetic import write_mazes

one_maze = {"size": 7, "mazes": 1, "texels": 1, "out_and_back": 0.3}
write_mazes(sys.argv[1], seed=0, clips=100, frames=120, height=24, width=32, **one_maze)
E_PYTHON

say "videos and actions to shards"
msc convert $demo/walks --out $demo/shards --signal actions \
    --autoencoder pixels --frames 12 --size 24x32 --fps 12 --stride 4 --held-out 0.1 --workers 2

# Two processes share each clip along time: on the CPU, or on two GPUs; one GPU takes the whole clip.
processes=2
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" = 1 ]; then processes=1; fi
say "training on $processes process(es)"
msc train --preset demo --run $run --processes $processes data.shards=$demo/shards parallel.sp=$processes "$@"

say "evaluation on the clips that were held out"
msc evaluate $run --samples 1 --steps 8

say "a held-out clip continued: as it was, turning left, turning right"
msc sample $run --clip $clip --steps 8
for way in left right; do
    msc sample $run --clip $clip --steps 8 --units 12 --signal actions=$way --out $demo/turned-$way
done

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
ahead = {name: rows[name]["mean"][1:] for name in ("sample", "copy last", "sample, others' signals")}


def decibels(values):
    return ", ".join(f"{value:.1f}" for value in values)


def newest(folder, pattern):
    """The last file written below `folder` that matches."""
    return max((run / folder).rglob(pattern), key=lambda path: path.stat().st_mtime)


weights = run / "export" / "model.safetensors"
print(f"""\
it took        {seconds // 60} min {seconds % 60} s
data           {clips["train"]} clips to train on, {clips["held_out"]} held out: {demo / "shards"}, to be seen in its contact.png
held-out loss  {loss} (lower is better)
next frames    PSNR in dB on held-out clips, 1 to {len(ahead["sample"])} frames ahead (higher is better)
  generated    {decibels(ahead["sample"])}
  last frame   {decibels(ahead["copy last"])} (repeated)
  misled       {decibels(ahead["sample, others' signals"])} (generated under the actions of another clip)
run folder     {run}
curves         .venv/bin/mlflow ui --backend-store-uri sqlite:///{demo / "mlflow.db"}   then http://127.0.0.1:5000
video          {newest("samples", "*.mp4")}
contact sheet  {newest("samples", "*.png")}
turned         {demo / "turned-left"}, {demo / "turned-right"}
play           .venv/bin/msc play {run}
weights        {weights} ({weights.stat().st_size / 1e6:.1f} MB)
your videos    .venv/bin/msc convert FOLDER --out shards; .venv/bin/msc train --preset demo data.shards=shards""")
E_PYTHON
