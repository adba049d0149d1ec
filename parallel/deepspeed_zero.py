"""DeepSpeed's ZeRO over the whole world, and a view of its sharded state that no stage is needed to read.

DeepSpeed knows nothing of the sequence axis: every rank is one of `world` equal ranks whose gradients it
averages. A rank that passes `world × its share of the global loss` to `backward` so gets the gradient of
the global loss, at any (dp, sp) and any stage. (Its own sequence-parallel settings sum over sp at stages
0-2 and average at stage 3.)
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16", "fp8"]  # of fp8 only the products: see fp8.py
STATE = ("weight", "exp_avg", "exp_avg_sq", "ema")


@dataclass(frozen=True)
class ZeroConfig:
    """stage: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters sharded over all ranks.
    bucket: elements per reduction. overlap: reduce gradients while the backward pass goes on."""

    stage: Literal[0, 1, 2, 3] = 2
    bucket: int = 50_000_000
    overlap: bool = True


def check_zero(config: ZeroConfig, precision: Precision) -> None:
    if config.stage < 2 and precision != "fp32":
        raise ValueError(
            f"parallel.zero.stage {config.stage} with {precision} runs DeepSpeed's BF16_Optimizer, whose gradient "
            "norms and first steps are wrong in 0.19; use stage 2 or 3, or parallel.precision=fp32"
        )


def make_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: ZeroConfig, precision: Precision, accumulate: int,
    clip: float,
) -> Any:  # fmt: skip
    """Wrap a model and its optimizer; torch.distributed must be initialised."""
    settings = _settings(config, precision, accumulate, clip)
    engine, *_ = _deepspeed().initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def shard_parameters(part: nn.Module, config: ZeroConfig, precision: Precision) -> None:
    """At stage 3 keep only this rank's share of a part of the model, so that the whole need never be on any rank.

    All ranks must call it for the same parts in the same order; the weights are those of rank 0.
    """
    if config.stage == 3:
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        zero = _deepspeed().zero
        zero.Init(module=part.to(dtype), config_dict_or_path=_settings(config, precision, 1, 0), dtype=dtype)


def _settings(config: ZeroConfig, precision: Precision, accumulate: int, clip: float) -> dict[str, Any]:
    check_zero(config, precision)
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's loader is not used; only the averaging over ranks is
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip or 1e30,  # 0 would also leave the norm unmeasured
        "bf16": {"enabled": precision != "fp32"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": config.stage,
            "overlap_comm": config.overlap and torch.cuda.is_available(),
            "contiguous_gradients": True,
            "reduce_bucket_size": config.bucket,
            "allgather_bucket_size": config.bucket,
        },
        "zero_allow_untested_optimizer": True,  # ours is torch's AdamW with one more state
        "steps_per_print": 10**12,
        "timers": {"throughput": {"enabled": False}},  # ours is throughput.py; this one waits for the GPU at every pass
    }


def _deepspeed() -> Any:
    """The package, told to use the CPU where there is no GPU, and to be quiet."""
    # Its autotuner would import mlflow, a second and a half at the start of every rank. The tracker starts later.
    with _hidden("mlflow"):
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            load_shm_op()
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # deprecations of torch names that DeepSpeed still calls, once per rank and step
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")
    return deepspeed


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Inside the block a package cannot be imported, as if it were not installed; unless it was before."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop(package, None)


@functools.cache
def load_shm_op() -> None:
    """Compile or load what DeepSpeed's CPU backend would compile anyway, past a lock that a killed process left.

    torch's lock for compiling is a file without an owner: a process that is killed meanwhile leaves it, and every
    later start waits for it forever. Under a lock that ends with its process, whatever lies there is stale.
    """
    from torch.utils.cpp_extension import _get_build_directory, get_default_build_root

    # Of this environment alone: two that shared it would compile it anew in turns, as their paths are in it.
    own = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(get_default_build_root()) / f"msc-{own}"))
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with (folder / "msc.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer that DeepSpeed drives."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def backward(engine: Any, loss: Tensor) -> None:
    """Add the gradient of a micro-batch; DeepSpeed averages over ranks, not over micro-batches."""
    engine.backward(loss, scale_wrt_gas=False)
    if not engine.is_gradient_accumulation_boundary():
        engine.step()  # only counts it


def step(engine: Any, objection: Callable[[float], str]) -> tuple[float, str]:
    """Update weights, moments and averages, after the last micro-batch, unless `objection` to the gradient norm
    says why not; the gradients are dropped either way. Returns the norm before clipping, and the objection.

    Where DeepSpeed itself refuses a norm (stages 1-3, not finite) it is NaN here.
    """
    optimizer = base_optimizer(engine)
    told = hasattr(engine.optimizer, "_global_grad_norm")  # stage 0 clips, but does not tell the norm
    norm = math.nan if told else float(torch.nn.utils.get_total_norm(
        [p.grad for p in engine.module.parameters() if p.grad is not None]
    ))  # fmt: skip
    answers: list[tuple[float, str]] = []
    take = optimizer.step

    def asked_first(closure: None = None) -> None:
        # DeepSpeed knows the norm by now; at stages 1-3 it calls this once for every group of parameters
        if not answers:
            known = float(engine.optimizer._global_grad_norm) if told else norm
            answers.append((known, objection(known)))
        if not answers[0][1]:
            take(closure)

    vars(optimizer)["step"] = asked_first  # over the method, for this one call
    try:
        engine.step()
    finally:
        del vars(optimizer)["step"]
    return answers[0] if answers else (math.nan, objection(math.nan))


# Sharded state --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalSlice:
    """Part of one parameter that lives on this rank: elements [start, start + numel) of it, flattened.

    state: fp32 weight, Adam's moments and the average, as flat views of the live tensors.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    state: dict[str, Tensor]

    @property
    def numel(self) -> int:
        return self.state["weight"].numel()


def local_slices(engine: Any, share: tuple[int, int] | None = None) -> list[LocalSlice]:
    """This rank's parts of all trainable parameters, at any ZeRO stage.

    At stage 0 every rank holds everything; `share = (rank, world)` then takes an even part of it.
    """
    optimizer = base_optimizer(engine)
    found = []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = tuple(_shape(parameter))
        for start, flat, at, numel in _parts(engine, parameter, share):
            if numel:
                state = {key: value.narrow(0, at, numel) for key, value in _state(optimizer, flat).items()}
                found.append(LocalSlice(name, start, shape, state))
    return found


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, also where ZeRO-3 left an empty tensor behind."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _parts(
    engine: Any, parameter: nn.Parameter, share: tuple[int, int] | None
) -> Iterator[tuple[int, Tensor, int, int]]:
    """(start in the parameter, flat master tensor, start in it, elements) of what this rank holds."""
    zero = engine.optimizer
    if hasattr(parameter, "ds_id"):  # stage 3: every parameter is cut evenly, the last part padded
        group, at, numel = zero.grad_position[zero.get_param_id(parameter)]
        start = engine.global_rank * numel
        yield (
            start,
            zero.fp32_partitioned_groups_flat[group],
            at,
            max(0, min(numel, _shape(parameter).numel() - start)),
        )
    elif hasattr(parameter, "_hp_mapping"):  # stages 1 and 2: the concatenation of all parameters is cut
        mapping = parameter._hp_mapping
        if mapping is not None:
            flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            address = mapping.hp_fragment_address
            yield mapping.lp_fragment_address.start, flat, address.start, address.numel
    else:
        rank, world = share or (0, 1)
        start, end = (parameter.numel() * r // world for r in (rank, rank + 1))
        yield start, parameter, start, end - start


def _state(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """Master weights and optimizer state as flat tensors; the state is made if no step has been taken."""
    state = optimizer.state[master]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)  # a fused step wants it there
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        state["ema"] = master.detach().clone()
    return {"weight": master.data.view(-1)} | {key: state[key].data.view(-1) for key in STATE[1:]}


def parameter_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Of all trainable parameters, whole, in the model's order."""
    return {name: tuple(_shape(p)) for name, p in engine.module.named_parameters() if p.requires_grad}


def adam_steps(engine: Any) -> int:
    states = base_optimizer(engine).state.values()
    return int(max((float(state["step"]) for state in states if "step" in state), default=0))


def set_adam_steps(engine: Any, steps: int) -> None:
    """Set Adam's step count (its bias correction) after the state was written into `pieces`."""
    for state in base_optimizer(engine).state.values():
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=state["exp_avg"].device)


def copy_masters_to_model(engine: Any) -> None:
    """Carry changed fp32 masters over to the parameters that the model computes with, on all ranks."""
    zero = engine.optimizer
    if hasattr(zero, "fp16_partitioned_groups_flat"):
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        persistent = [p for p in zero.persistent_parameters if p.requires_grad]
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()


@contextmanager
def averaged_weights(engine: Any) -> Iterator[None]:
    """Compute with the averaged weights inside the block; training weights return untouched after it."""
    _swap(engine)
    yield
    # Not in a `finally`: swapping is collective, and a rank that failed must not wait for the others here.
    _swap(engine)


def _swap(engine: Any) -> None:
    optimizer = base_optimizer(engine)
    masters = {id(flat): flat for p in engine.module.parameters() for _, flat, _, _ in _parts(engine, p, None)}
    for master in masters.values():
        state = _state(optimizer, master)
        weight = state["weight"].clone()
        state["weight"].copy_(state["ema"])
        state["ema"].copy_(weight)
    copy_masters_to_model(engine)
