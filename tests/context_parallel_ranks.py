"""A small model of every kind of scale, and what the tests run on its ranks.

In a module of its own, because processes that a test starts must be able to import it by name.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from msc.parallel import collectives
from msc.parallel.context_parallel import shard_bounds
from msc.pretrain.kernels import rectangle
from msc.pretrain.model import attention, rope
from msc.pretrain.model.conditioning import Condition, SignalConfig
from msc.pretrain.model.config import LayerConfig, ModelConfig
from msc.pretrain.model.noise_gate import GateConstants
from msc.pretrain.model.scales import Scale
from msc.pretrain.model.transformer import MSCTransformer
from msc.pretrain.parallelize import sharded_past_context

SCALES = {
    "windowed": (Scale(2, 1, 1, 2, 3), Scale(2, 2, 1, 1)),
    "window longer than a rank's share": (Scale(4, 2, 1, 9),),
    "pooled in time": (Scale(2, 2, 2, None), Scale(2, 2, 3, 1)),
    "dense": (Scale(4),),
    "dense in spatial windows": (Scale(4, 1, 1, None, 3),),
    "one windowed scale": (Scale(4, 2, 1, 1),),
    "for every layout": (Scale(1, 1, 1, 2), Scale(1), Scale(2, 2, 2, None)),
    "routed": (Scale(2, 1, 1, 2, 3), Scale(2, 1, 1, None, 2, top=3)),
    "routed by units": (Scale(2, 2, 1, 4, None, top=2), Scale(2, 1, 1, None, None, top=1)),
    "default": (Scale(2, 1, 1, 2, 3), Scale(1, 2, 1, 8), Scale(1, 2, 4, None)),
}


class Case(NamedTuple):
    """A model's scales by name, how each is laid out, and how it is run."""

    name: str
    layout: str
    units: int
    frames_per_unit: int = 1
    gate: str = "logits"
    recompute: str = "none"
    dtype: torch.dtype = torch.float64
    width: int = 64
    known: bool = True  # whether ranks know all noise levels, as in training
    layers: LayerConfig | None = None

    @property
    def scales(self):
        return SCALES[self.name]

    def make(self, kernel="auto"):
        sizes = self.units, self.frames_per_unit
        return make(self.scales, *sizes, self.gate, self.dtype, self.width, kernel, self.recompute, self.layers)


SIGNALS = (
    SignalConfig("keys", "discrete", ("left", "right")),
    SignalConfig("pose", "continuous", ("x",), 2, (0.5,), (2.0,)),
)


def make(
    scales, units, frames_per_unit, gate="logits", dtype=torch.float64, width=64, kernel="auto", recompute="none",
    layers=None,
):  # fmt: skip
    """A model with random weights, the same at every call, its inputs, and a direction for gradients."""
    torch.manual_seed(0)
    constants = tuple(GateConstants(0.5 * i, -0.3 * i) for i in range(len(scales)))
    config = ModelConfig(
        width=width, depth=2, scales=scales, patch=1, channels=2, frames_per_unit=frames_per_unit, gate=gate,
        gate_constants=constants, classes=3, text_width=5, signals=SIGNALS, layers=layers or LayerConfig(),
    )  # fmt: skip
    model = MSCTransformer(config, kernel, recompute)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    T = units * frames_per_unit
    wide = torch.promote_types(dtype, torch.float32)  # inputs stay in fp32 where weights are bf16
    x = torch.randn(2, T, 2, 4, 6).to(wide)
    t = torch.rand(2, units).to(wide).repeat_interleave(frames_per_unit, 1)
    signals = {signal.name: torch.randn(2, T, signal.width).to(wide) for signal in SIGNALS}
    signals["keys"][0, : T // 2] = torch.nan  # unknown
    condition = Condition(torch.randn(2, 3, 5).to(wide), torch.tensor([0, 3]), signals)
    return model.to(dtype), x, t, condition, torch.randn(2, T, 2, 4, 6).to(wide)


def backward(model, x, t, condition, direction, past_context, all_t=None):
    x = x.clone().requires_grad_()
    out = model(x, t, condition, past_context, all_t)
    (out * direction).sum().backward()
    return [out.detach().cpu(), x.grad.cpu(), {name: p.grad.cpu() for name, p in model.named_parameters()}]


@contextmanager
def joined(rank, backend):
    """Inside a group of ranks; yields the device. "nccl" needs as many GPUs, "one GPU" is shared by all over gloo."""
    device = torch.device({"gloo": "cpu", "one GPU": "cuda:0", "nccl": f"cuda:{rank}"}[backend])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if backend == "nccl" else "gloo")
    dist.all_reduce(torch.zeros(1, device=device))  # NCCL connects all ranks in the first call, which none may miss
    yield device
    dist.destroy_process_group()


def on_a_rank(rank, ranks, backend, cases):
    """[output, input gradient, parameter gradients] of this rank, and the bytes it sent: (forward, in all)."""
    with joined(rank, backend) as device:
        return [run_case(case, rank, ranks, device) for case in cases]


def run_case(case, rank, ranks, device):
    model, inputs, past = own_part(case, rank, ranks, device, "sdpa")
    with counted() as forward, torch.no_grad():
        model(*inputs[:-1], *past)
    with counted() as everything:
        results = backward(model, *inputs, *past)
    return *results, sum(forward), sum(everything)


def own_part(case, rank, ranks, device, kernel="auto"):
    """Model and inputs of a rank; its past context, and the noise levels of all frames where they are known."""
    model, *inputs = case.make(kernel)
    edges = shard_bounds(case.units, ranks)
    own = slice(edges[rank] * case.frames_per_unit, edges[rank + 1] * case.frames_per_unit)
    x, t, condition, direction = (value.to(device) for value in inputs)
    layouts = case.layout.split("+") if "+" in case.layout else [case.layout] * len(case.scales)
    past = sharded_past_context(dist.group.WORLD, edges, model.config, layouts), t if case.known else None
    return model.to(device), [x[:, own], t[:, own], condition.of_frames(own), direction[:, own]], past


def compiled_on_a_rank(rank, ranks, backend, cases):
    """As on_a_rank, by the kernel that "auto" means, of blocks as they are and of compiled ones, which may fall out of
    their graph for the ring only: two results a case."""
    compiler = "aot_eager" if backend == "gloo" else "inductor"
    found = []
    with joined(rank, backend) as device:
        for case in cases:
            model, inputs, past = own_part(case, rank, ranks, device)
            found.append([backward(model, *inputs, *past)])
            model.zero_grad(set_to_none=True)
            for block in model.blocks:
                block.compile(backend=compiler, fullgraph="ring" not in case.layout)
            found[-1].append(backward(model, *inputs, *past))
    return found


def kept_on_a_rank(rank, ranks, case):
    """Bytes of new tensors that Python holds on to between the forward and the backward pass."""

    def held():
        gc.collect()
        tensors = (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    with joined(rank, "gloo") as device:
        model, (*inputs, _), past = own_part(case, rank, ranks, device)
        before = held()
        out = model(*inputs, *past)
        kept = held() - before - out.nbytes
        del out
        return kept


@contextmanager
def counted():
    """Sizes in bytes of all tensors that this rank sends along time inside the block."""
    sizes, post = [], collectives.start_all_to_all

    def counting(x, route):
        sizes.append(
            x.element_size() * (sum(route.send_counts) - route.send_counts[dist.get_rank()])
        )  # the groups are the world
        return post(x, route)

    collectives.start_all_to_all = counting
    try:
        yield sizes
    finally:
        collectives.start_all_to_all = post


def noise_on_a_rank(rank, ranks, cases):
    """Of every case: how often noise levels travel in a forward pass where a rank knows its own alone and where it
    knows all, and whether the outputs are the same."""
    posted, post = [], collectives.start_all_to_all

    def noting(x, route):
        posted.append(route.what)
        return post(x, route)

    found = []
    with joined(rank, "gloo") as device, torch.no_grad():
        collectives.start_all_to_all = noting
        for case in cases:
            outs, times = [], []
            for known in (False, True):
                model, (*inputs, _), past = own_part(case._replace(known=known), rank, ranks, device)
                posted.clear()
                outs.append(model(*inputs, *past))
                times.append(posted.count("noise levels"))
            found.append((*times, torch.equal(*outs)))
        collectives.start_all_to_all = post
    return found


def events_on_a_rank(rank, ranks, backend, case):
    """What a rank does in a forward and a backward pass, in order: post and wait for messages, place queries and keys,
    attend to keys."""
    events = []

    def noting(owner, name, event):
        original = getattr(owner, name)

        def noted(*arguments):
            events.append(event)
            return original(*arguments)

        setattr(owner, name, noted)

    with joined(rank, backend) as device:
        noting(collectives, "start_all_to_all", "post")
        noting(collectives, "wait_all_to_all", "wait")
        noting(attention, "normalise_and_rotate", "place")
        noting(rope._NormaliseAndRotate, "backward", "place back")
        noting(rectangle, "forward", "attend")
        noting(rectangle, "backward", "differentiate")
        run_case(case, rank, ranks, device)
    return events


def causal_on_a_rank(rank, ranks, backend, cases, cuts):
    """Outputs of a case as it is, and with everything from a cut on changed; float32."""
    results = []
    with joined(rank, backend) as device:
        for case in cases:
            model, *inputs = case.make()
            x, t, condition, _ = (value.to(device) for value in inputs)
            edges = shard_bounds(case.units, ranks)
            own = slice(edges[rank], edges[rank + 1])
            past_context = sharded_past_context(
                dist.group.WORLD, edges, model.to(device).config, [case.layout] * len(case.scales)
            )
            outs = []
            for cut in (case.units, *cuts):
                y, s, c = change_after(x, t, condition, cut)
                with torch.no_grad():
                    all_t = s if case.known else None
                    outs.append(model(y[:, own], s[:, own], c.of_frames(own), past_context, all_t).cpu())
            results.append(outs)
    return results


def in_double(inputs):
    """Tensors and conditions in float64, whole numbers as they are."""

    def wide(x):
        return x.double() if x.is_floating_point() else x

    return [x.map(wide) if isinstance(x, Condition) else wide(x) for x in inputs]


def change_after(x, t, condition, cut):
    y, s = x.clone(), t.clone()
    signals = {name: value.clone() for name, value in condition.signals.items()}
    for value in (y, *signals.values()):
        value[:, cut:] = torch.randn_like(value[:, cut:])
    s[:, cut:] = 1 - s[:, cut:]
    return y, s, replace(condition, signals=signals)


def compiled_gradients(scales, gate, kernel, device, compiler):
    """In float32: largest relative difference of blocks compiled as one graph with a kernel from plain ones with sdpa,
    in the output or in the gradient of a parameter."""
    results = []
    for compiled in (False, True):
        model, *inputs, _ = make(scales, 8, 1, gate, torch.float32, 128, kernel if compiled else "sdpa")
        model = model.to(device)
        if compiled:
            for block in model.blocks:
                block.compile(backend=compiler, fullgraph=True)
        out = model(*(x.to(device) for x in inputs))
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    eager, whole = results
    assert all((a is None) == (b is None) for a, b in zip(whole, eager, strict=True))
    pairs = [(a, b) for a, b in zip(whole, eager, strict=True) if b is not None and b.norm() > 0]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)
