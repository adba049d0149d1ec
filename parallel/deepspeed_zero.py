"""DeepSpeed ZeRO over all ranks, and access to its sharded state that is the same at every stage.

DeepSpeed does not know the sequence axis: it averages the gradients of `world size` equal ranks. A rank that passes
`world size × its share of the global loss` to `backward` therefore gets the gradient of the global loss, at any
(dp, sp) and stage. (DeepSpeed's own sequence-parallel settings sum over sp at stages 0-2 and average at stage 3.)
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


@dataclass(frozen=True)
class ZeroConfig:
    """stage: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters sharded over all ranks.
    bucket: elements per reduction. overlap: reduce gradients during the backward pass."""

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
    settings = _settings(config, precision, accumulate, clip)
    engine, *_ = _deepspeed().initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def shard_parameters(part: nn.Module, config: ZeroConfig, precision: Precision) -> None:
    """At stage 3 keep only this rank's shard of a part of the model, so that no rank ever holds the whole model.

    All ranks must call it for the same parts in the same order; the weights are those of rank 0.
    """
    if config.stage == 3:
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        settings = _settings(config, precision, 1, 0)
        _deepspeed().zero.Init(module=part.to(dtype), config_dict_or_path=settings, dtype=dtype)


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
    """Import DeepSpeed: quiet, for the CPU where there is no GPU, and without mlflow, which its autotuner would import
    (1.5 s at the start of every rank; the tracker imports it later)."""
    hide_mlflow = "mlflow" not in sys.modules
    if hide_mlflow:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            load_shm_op()
        import deepspeed
    finally:
        if hide_mlflow:
            sys.modules.pop("mlflow", None)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # deprecations of torch names that DeepSpeed still calls, once per rank and step
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")
    return deepspeed


@functools.cache
def load_shm_op() -> None:
    """Compile or load the extension of DeepSpeed's CPU backend, removing a stale lock.

    torch's lock for compiling is a file without an owner: if its process is killed, every later start waits for it
    forever. Under a lock that ends with its process, any such file is stale.
    """
    from torch.utils.cpp_extension import _get_build_directory, get_default_build_root

    # One folder per environment, whose paths are in the build: two in one folder would compile it in turns.
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(get_default_build_root()) / f"msc-{environment}"))
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


def step(engine: Any, skip_reason: Callable[[float], str]) -> tuple[float, str]:
    """Update weights, moments and averages after the last micro-batch, unless `skip_reason` of the gradient norm is
    not empty; gradients are dropped either way. Returns the norm before clipping, and the reason.

    A norm that is not finite, which DeepSpeed itself rejects at stages 1-3, is NaN.
    """
    optimizer = base_optimizer(engine)
    has_norm = hasattr(engine.optimizer, "_global_grad_norm")  # stage 0 clips, but does not return the norm
    gradients = [] if has_norm else [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = math.nan if has_norm else float(torch.nn.utils.get_total_norm(gradients))
    result: tuple[float, str] | None = None
    optimizer_step = optimizer.step

    def step_unless_skipped(closure: None = None) -> None:
        # DeepSpeed knows the norm here; at stages 1-3 it calls this once for every group of parameters
        nonlocal result
        if result is None:
            value = float(engine.optimizer._global_grad_norm) if has_norm else norm
            result = value, skip_reason(value)
        if not result[1]:
            optimizer_step(closure)

    vars(optimizer)["step"] = step_unless_skipped  # over the method, for this one call
    try:
        engine.step()
    finally:
        del vars(optimizer)["step"]
    return result or (math.nan, skip_reason(math.nan))


# Sharded state --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalSlice:
    """The part of a parameter on this rank: flattened elements [start, start + numel) of a parameter of `shape`.

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
    """This rank's slices of all trainable parameters, at any ZeRO stage.

    At stage 0 every rank holds everything; `share = (rank, world size)` then takes an even part of it.
    """
    zero, optimizer, slices = engine.optimizer, base_optimizer(engine), []
    parameters, (rank, world_size) = dict(engine.module.named_parameters()), share or (0, 1)
    for name, shape in parameter_shapes(engine).items():
        parameter = parameters[name]
        # start and numel: of what this rank holds of the parameter; first: where it begins in its flat master tensor
        if hasattr(parameter, "ds_id"):  # stage 3 splits every parameter evenly, and pads the last part
            group, first, numel = zero.grad_position[zero.get_param_id(parameter)]
            master, start = zero.fp32_partitioned_groups_flat[group], engine.global_rank * numel
            numel = max(0, min(numel, math.prod(shape) - start))
        elif hasattr(parameter, "_hp_mapping"):  # stages 1 and 2 split the concatenation of all parameters
            if (mapping := parameter._hp_mapping) is None:
                continue
            master, address = (
                zero.single_partition_of_fp32_groups[mapping.param_group_index],
                mapping.hp_fragment_address,
            )
            start, first, numel = mapping.lp_fragment_address.start, address.start, address.numel
        else:
            start, end = (math.prod(shape) * r // world_size for r in (rank, rank + 1))
            master, first, numel = parameter, start, end - start
        state = optimizer.state[master]
        if "exp_avg" not in state:  # no step has been taken; a fused one wants its count on the device
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            state["ema"] = master.detach().clone()
        if numel:
            values = {"weight": master} | {key: state[key] for key in ("exp_avg", "exp_avg_sq", "ema")}
            views = {key: value.data.view(-1).narrow(0, first, numel) for key, value in values.items()}
            slices.append(LocalSlice(name, start, shape, views))
    return slices


def parameter_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Of all trainable parameters in the model's order, whole, also where ZeRO-3 left an empty tensor."""
    parameters = engine.module.named_parameters()
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters if p.requires_grad}


def adam_steps(engine: Any) -> int:
    """Adam's step count, for its bias correction: steps that were not skipped."""
    states = base_optimizer(engine).state.values()
    return int(max((float(state["step"]) for state in states if "step" in state), default=0))


def set_adam_steps(engine: Any, steps: int) -> None:
    """Set Adam's step count, after the state was written into `local_slices`."""
    for state in base_optimizer(engine).state.values():
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=state["exp_avg"].device)


def copy_masters_to_model(engine: Any) -> None:
    """Copy changed fp32 masters to the parameters that the model computes with, on all ranks. A collective."""
    zero = engine.optimizer
    if hasattr(zero, "fp16_partitioned_groups_flat"):
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if persistent := [p for p in zero.persistent_parameters if p.requires_grad]:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()


@contextmanager
def averaged_weights(engine: Any) -> Iterator[None]:
    """Compute with the averaged weights inside the block. A collective."""

    def swap() -> None:
        for part in local_slices(engine):
            weight = part.state["weight"].clone()
            part.state["weight"].copy_(part.state["ema"])
            part.state["ema"].copy_(weight)
        copy_masters_to_model(engine)

    swap()
    yield
    swap()  # not in a `finally`: a rank that failed must not wait for the others here
