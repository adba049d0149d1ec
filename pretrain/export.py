"""`msc export`: weights that need nothing of the run folder, with a proof that they are the trained ones."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from msc.datasets.files import check_replaceable, partial_folder, publish

from .model import MSCTransformer
from .runs import Trained, open_run


def export(run: Path, out: Path | None = None) -> str:
    """Write `config.json`, `ema.safetensors` and `raw.safetensors` of a run's newest checkpoint.

    The folder is loaded again with `MSCTransformer.from_pretrained` and must give bit-identical outputs.
    """
    replace_own = out is None  # the run's own folder may be renewed; any other must be new or empty
    out = run / "export" if out is None else out
    check_replaceable(out, overwrite=replace_own, proof="config.json")
    trained = {which: open_run(run, which) for which in ("ema", "raw")}
    any_one = trained["ema"]
    with partial_folder(out) as aside:
        sizes = write(aside, trained)
        publish(aside, out)
    count = sum(p.numel() for p in any_one.model.parameters())
    return (
        f"{count:,} parameters of step {any_one.step} written to {out}: "
        + ", ".join(f"{which}.safetensors ({size / 1e6:.1f} MB)" for which, size in sizes.items())
        + "\nloaded again with MSCTransformer.from_pretrained: outputs bit-identical"
    )


def write(aside: Path, trained: dict[str, Trained]) -> dict[str, int]:
    """Fill an empty folder and prove that it loads to the same models; returns the files' sizes in bytes."""
    any_one = trained["ema"]
    facts = {
        "model": any_one.model.config_dict(),
        "data": asdict(any_one.space),
        "training": {"step": any_one.step, "clips": any_one.clock},
    }
    (aside / "config.json").write_text(json.dumps(facts, indent=1))
    for which, loaded in trained.items():
        save_file(
            {name: value.contiguous() for name, value in loaded.model.state_dict().items()},
            aside / f"{which}.safetensors",
        )
    sizes = {}
    for which, loaded in trained.items():
        check_same(loaded.model.cpu(), MSCTransformer.from_pretrained(aside, which), which)
        sizes[which] = (aside / f"{which}.safetensors").stat().st_size
    return sizes


@torch.no_grad()
def check_same(trained: MSCTransformer, loaded: MSCTransformer, which: str) -> None:
    """Raise RuntimeError unless both models compute the same on a small random clip."""
    config = trained.config
    side = config.patch * math.lcm(*(scale.space for scale in config.scales))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4 * config.frames_per_unit, config.channels, side, side, generator=generator)
    t = torch.rand(1, 4, generator=generator).repeat_interleave(config.frames_per_unit, 1)
    if not torch.equal(trained(x, t), loaded(x, t)):
        raise RuntimeError(f"the exported {which} weights do not reproduce the trained model; please report this")
