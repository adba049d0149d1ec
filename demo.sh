#!/usr/bin/env bash
# From video to a trained model that can be steered, on this machine: `make demo`.
# Words after the name go to `msc train`, such as ./demo.sh train.clips=64 for a quick look.
set -euo pipefail
cd "$(dirname "$0")"
export PATH="$PWD/.venv/bin:$PATH"
demo=demo_run
run=$demo/run
clip=0
say() { printf '\n== %s (after %d s)\n' "$*" "$SECONDS"; }

rm -rf $demo
mkdir $demo

# A dot that four actions steer: what minutes of two CPU cores can learn, and what can be checked by looking. Each
# video has its actions beside it.
say "a world: videos and their actions"
python - $demo/videos <<'E_PYTHON'
import sys
from msc.datasets.synthetic import write_steered_dots

write_steered_dots(sys.argv[1], seed=0, clips=60, frames=120, height=32, width=32)
E_PYTHON

say "videos and actions to shards"
msc convert $demo/videos --out $demo/shards --signal actions \
    --autoencoder pixels --frames 12 --size 32x32 --fps 12 --stride 4 --held-out 0.1 --workers 2

# Two processes share each clip along time: on the CPU, or on two GPUs; one GPU takes the whole clip.
processes=2
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" = 1 ]; then processes=1; fi
say "training on $processes process(es)"
msc train --preset demo --run $run --processes $processes data.shards=$demo/shards parallel.sp=$processes "$@"

say "evaluation on the clips that were held out"
msc evaluate $run --samples 1 --steps 8

say "a held-out clip continued: under its own actions, and under two plans"
msc sample $run --clip $clip --steps 8
for plan in up:4,left:4,down:4 down:4,right:4,up:4; do
    msc sample $run --clip $clip --steps 8 --units 12 --signal actions=$plan --out $demo/${plan%%:*}
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
steered        {demo / "up"}, {demo / "down"}
play           .venv/bin/msc play {run}
weights        {weights} ({weights.stat().st_size / 1e6:.1f} MB)
your videos    .venv/bin/msc convert FOLDER --out shards; .venv/bin/msc train --preset demo data.shards=shards""")
E_PYTHON
