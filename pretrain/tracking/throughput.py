"""Throughput meter: tokens and clips per second, waiting for data, memory, model FLOPs utilisation (MFU)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch

# Dense bf16 FLOP/s of one device (half of the data sheets' figures "with sparsity"); the first match counts.
# NVIDIA data sheets: HGX B200, H200 (SXM, NVL), H100 (SXM, NVL, PCIe), A100.
PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
)

# Shown in MLflow above the curves of a run.
DESCRIPTION = """\
| metric | |
| --- | --- |
| `loss` | of the last steps' frames; `loss/t_0.4_0.6`: of those with a noise level between 0.4 and 0.6 |
| `held_out/` | the same of the averaged weights, on held-out clips that always get the same noise |
| `quality/` | results of `msc evaluate`, as table, row and column. Held-out loss: `loss_by_noise`, \
`loss_by_position`, `loss_by_context`; roll-outs: `psnr_by_horizon`, `ssim_by_horizon`, `drift`, `frechet` |
| `clock`, `skipped`, `broken` | clips seen; skipped steps; unreadable clips |
| `data_wait` | share of a step spent waiting for clips |
| `saving/stall_s` | how long training stopped for a checkpoint |

Sample videos and contact sheets are in `samples` of the artifacts, the settings in `config.yaml`."""


def mfu(flops_per_second: float, device: str) -> float | None:
    """Share of a device's peak that the model's own FLOPs make up; None where the device is not in the table.

    flops_per_second: of one device, unmasked and without recomputation. device: torch's name of it.
    """
    peak = next((peak for name, peak in PEAK_FLOPS if name in device), None)
    return flops_per_second / peak if peak else None


class Meter:
    """Throughput since the last `read`: call `step` after every optimizer step. device: a torch.device."""

    def __init__(self, device: Any):
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self.steps, self.waited, self.began = 0, 0.0, time.perf_counter()
        self.tokens = self.clips = self.flops = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def step(self, tokens: float, clips: float, flops: float) -> None:
        """tokens, clips: of this step, over all ranks. flops: of it on one device."""
        self.steps += 1
        self.tokens += tokens
        self.clips += clips
        self.flops += flops

    def read(self) -> dict[str, float]:
        """tokens_per_s, clips_per_s, step_s, data_wait (share), memory_gib, mfu where known; starts anew."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        values = {
            "tokens_per_s": self.tokens / seconds,
            "clips_per_s": self.clips / seconds,
            "step_s": seconds / max(self.steps, 1),
            "data_wait": self.waited / seconds,
            **memory(self.device),
        }
        if self.device.type == "cuda":
            share = mfu(self.flops / seconds, torch.cuda.get_device_name(self.device))
            values |= {} if share is None else {"mfu": share}
        self._reset()
        return values


def memory(device: Any) -> dict[str, float]:
    """GiB: the peak allocated on a GPU and what torch reserved there, or this process's resident memory."""
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
        return {"memory_gib": peak / 2**30, "memory_reserved_gib": reserved / 2**30}
    return {"memory_gib": psutil.Process().memory_info().rss / 2**30}
