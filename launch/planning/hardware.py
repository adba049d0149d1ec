"""Hardware: GPU data sheets, and the share of their rates that a training step reaches.

Every efficiency is marked MEASURED (docs/benchmarks.md) or ESTIMATE, and so in every plan. The measured ones come
from steps with FlexAttention on one H100 SXM:

    products    of the kernels of a compiled step of `base` with 8 layers and 65,536 tokens: 51.3 ms
    attention   compiled dense steps of `base`: 8 layers, 65,536 tokens 0.8221 s; 4 layers, 262,144 tokens 6.1814 s
    passes      compiled, multi-scale: `base` with 24 layers, 65,536 tokens 0.3199 s;
                eager, recomputed: `base` with 4 layers, 131,072 tokens 0.1972 s
    launches    compiled: `pilot`, 16,384 tokens 0.0397 s; eager: the same 0.185 s, with the kernels of November 23

Further steps, not used for these constants, test them (tests/test_plan.py): -19 to +10 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from msc.pretrain.tracking.throughput import PEAK_FLOPS


@dataclass(frozen=True)
class Device:
    """One GPU in its usual machine. peak: dense bf16 FLOP/s; fp32: without tensor cores. memory: bytes. bandwidth:
    bytes/s of its memory. node: GPUs that share a machine and its links. link, network: bytes/s that a GPU sends to
    another in the machine, and out of it."""

    name: str
    peak: float
    fp32: float
    memory: float
    bandwidth: float
    node: int
    link: float
    network: float
    source: str


def _peak(name: str) -> float:
    return next(peak for prefix, peak in PEAK_FLOPS if prefix == name)


# Links: half of the data sheets' "bidirectional" figures. Network: one adapter per GPU as in NVIDIA's DGX machines,
# HDR 200 Gb/s for A100, NDR 400 Gb/s for the others; yours may differ: --network.
KINDS = {
    "a100": Device("A100 SXM 80 GB", _peak("A100"), 19.5e12, 80e9, 2.039e12, 8, 300e9, 25e9,
                   "NVIDIA A100 80GB and DGX A100 data sheets"),
    "h100": Device("H100 SXM 80 GB", _peak("H100"), 67e12, 80e9, 3.35e12, 8, 450e9, 50e9,
                   "NVIDIA H100 and DGX H100 data sheets"),
    "h200": Device("H200 SXM 141 GB", _peak("H200"), 67e12, 141e9, 4.8e12, 8, 450e9, 50e9,
                   "NVIDIA H200 and DGX H200 data sheets"),
    "b200": Device("B200 180 GB", _peak("B200"), 75e12, 180e9, 8e12, 8, 900e9, 50e9,
                   "NVIDIA DGX B200 data sheet, an eighth of the machine"),
}  # fmt: skip


@dataclass(frozen=True)
class Efficiency:
    """products, attention: share of the peak. passes: how often a step moves, through memory, the bytes that it keeps
    for the backward pass. launches: least seconds of a block per scale, forward and backward, that the CPU needs to
    start it."""

    products: float
    attention: float
    passes: float
    launches: float


# MEASURED, but for products and attention of eager steps: an ESTIMATE, as the same kernels serve both.
EAGER = Efficiency(products=0.78, attention=0.29, passes=11.0, launches=0.0051)
COMPILED = Efficiency(products=0.78, attention=0.29, passes=6.0, launches=0.0011)

# MEASURED on one H200, torch 2.11: `parallel.recompute=cheap` moves so many times the bytes (`base`, 4 layers, 65,536
# tokens: 0.0557 s for 0.0526; `2b`, 2 layers, 0.0839 for 0.0841: wider models are planned slower than they are)
CHEAP = 1.2

# ESTIMATE: launches of a further region of windows in space, relative to those of a scale. It makes a step of `demo`
# (12 frames, not compiled) on one H100 the 0.135 s that were measured.
REGION = 0.47
# ESTIMATE: launches of a block whose past comes from other ranks. It makes an eager step on two H100 (`base`, 4 layers,
# 131,072 tokens, halos) the 0.1256 s that were measured; what else it may have waited for was not looked at. Compiled
# steps took the CPU 1.4 to 2.4 times as long as on one, by machine and length; eager ones on four 1.7 times.
SHARDED = 1.54
LINKS = 0.7  # ESTIMATE: share of a link's speed that large collectives reach
OVERLAP = 0.8  # ESTIMATE: share of the backward pass behind which gradients can travel
UPDATE = 60.0  # ESTIMATE: bytes through memory per parameter and update (AdamW with an average, fp32)
LIVE = 10**9  # parameters that DeepSpeed keeps gathered at stage 3 (stage3_max_live_parameters, its default)
RESERVED = 4e9  # ESTIMATE: bytes that CUDA, NCCL and kernels' workspaces take
USABLE = 0.92  # ESTIMATE: share of the memory that fragmentation leaves

MEASURED = (
    f"compiled (eager), one H100: {COMPILED.passes:g} ({EAGER.passes:g}) passes over kept activations, "
    f"{COMPILED.launches * 1e3:.1f} ({EAGER.launches * 1e3:.1f}) ms per scale and block to launch; "
    f"compiled: products at {COMPILED.products:.0%} of the peak, attention at {COMPILED.attention:.0%}"
)
ESTIMATED = (
    "products and attention of eager steps as compiled, "
    f"{REGION:g} times a scale's launches per further region of windows in space, {SHARDED:g} times all with "
    "parallel.sp > 1, "
    f"links at {LINKS:.0%}, waiting for an exchange of all ranks as parallel.wait_s, "
    f"{OVERLAP:.0%} of the backward pass hides gradients, {UPDATE:g} bytes per parameter and update, "
    f"{RESERVED / 1e9:g} GB reserved, {USABLE:.0%} of the memory usable; "
    "other kinds and widths do as `pilot` and `base` on that GPU"
)


def gpu_kind(name: str) -> Device:
    if name.lower() not in KINDS:
        raise ValueError(f"unknown kind of GPU {name!r}; known: {', '.join(KINDS)}")
    return KINDS[name.lower()]


def gpu_of_driver_name(name: str) -> Device | None:
    """The device that a driver calls `name`, such as "NVIDIA H100 80GB HBM3"; None where it is another build of one."""
    if any(other in name for other in ("NVL", "PCIe", "PCIE", "40GB", "GB200")):
        return None
    return next((device for kind, device in KINDS.items() if kind.upper() in name), None)
