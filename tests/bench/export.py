"""Exporting a ZeRO-3 checkpoint of four ranks in one process: seconds, and peak memory against the largest file.

    python tests/bench/export.py [--width 512] [--depth 12] [--shard 20MB]

Trains one step to get the checkpoint; every export runs in a process of its own. "anonymous" is memory that the process
took and cannot give back (the peak over samples every millisecond); "resident" also counts what it had mapped of files
at the time, which the system may drop whenever it needs the room (the kernel's own peak). Both beside what the process
holds after the export of a tiny model: Python, torch and all that is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fake_checkpoints

MEASURED = """
import json, resource, sys, threading, time
from pathlib import Path

def kilobytes(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))

from msc.pretrain.export import export
run, out, dtype, limit, tiny = sys.argv[1:]
export.export(Path(tiny), Path(out + "-tiny"), dtype=dtype, max_shard_size=int(limit))
before = kilobytes("RssAnon"), kilobytes("VmRSS")
peak, ended = [before[0]], threading.Event()

def watch():
    while not ended.is_set():
        peak.append(kilobytes("RssAnon"))
        time.sleep(0.001)

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
began = time.perf_counter()
print(export.export(Path(run), Path(out), dtype=dtype, max_shard_size=int(limit)), file=sys.stderr)
seconds = time.perf_counter() - began
ended.set()
watcher.join()
resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, (max(peak) - before[0]) * 1024, (resident - before[1]) * 1024]))
"""


def train(folder: Path, width: int, depth: int) -> Path:
    """A run of one step, ZeRO-3 on four ranks."""
    from msc.datasets.prepare.convert import ConvertConfig, convert
    from msc.datasets.synthetic import write_videos
    from msc.pretrain.diffusion.autoencoder import open_autoencoder

    videos = write_videos(folder / "videos", seed=0, clips=4, frames=8, height=16, width=16)
    autoencoder = open_autoencoder("pixels")
    config = ConvertConfig(
        sources=tuple(map(str, videos)), out=str(folder / "shards"), frames=4, height=16, width=16, fps=12.0, stride=2,
        held_out=0.0, autoencoder="pixels",
    )  # fmt: skip
    convert(config, autoencoder.encode, 1)
    msc = Path(sys.executable).with_name("msc")
    command = [
        msc, "train", "--preset", "demo", "--run", folder / "run", "--processes", "4",
        f"data.shards={folder / 'shards'}", f"model.width={width}", f"model.depth={depth}", "data.workers=0",
        "parallel.zero.stage=3", "train.clips=4", "train.batch=4", "train.micro=1", "train.evaluate=0",
        "metrics.tracking_uri=none",
    ]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "run"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--shard", type=float, default=20, help="MB of a file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = train(folder, args.width, args.depth)
        fake_checkpoints.write_run(folder / "tiny")
        ranks = sum(file.stat().st_size for file in (run / "checkpoints").rglob("rank-*"))
        print(f"checkpoint of 4 ranks, ZeRO-3: {ranks / 1e6:,.0f} MB")
        print(f"{'':<22} {'model':>9} {'files':>6} {'largest':>9} {'seconds':>8} {'anonymous':>16} {'resident':>16}")
        for dtype, limit in (("fp32", args.shard * 1e6), ("bf16", args.shard * 1e6), ("fp32", 1e12)):
            out = folder / f"{dtype}-{limit:.0f}"
            command = [sys.executable, "-c", MEASURED, str(run), str(out), dtype, f"{limit:.0f}", str(folder / "tiny")]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ})
            seconds, anonymous, resident = json.loads(done.stdout)
            sizes = [file.stat().st_size for file in out.glob("*.safetensors")]
            title = f"{dtype}, " + (f"files of {limit / 1e6:g} MB" if limit < 1e12 else "one file, proved")
            memory = "".join(f"{b / 1e6:>9,.1f} MB {b / max(sizes):>4.2f}×" for b in (anonymous, resident))
            model = f"{sum(sizes) / 1e6:>6,.0f} MB {len(sizes):>6} {max(sizes) / 1e6:>6,.1f} MB"
            print(f"{title:<22} {model} {seconds:>8.1f} {memory}")


if __name__ == "__main__":
    main()
