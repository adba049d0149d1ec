"""Doctor: checks of this machine and its installation, each with a remedy: `msc doctor`.

Everything is tried for real (imports, a compiler, a codec), not read from metadata: what is installed and
does not load is the usual trouble.
"""

import contextlib
import importlib
import io
import json
import os
import platform
import resource
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from msc.datasets.files import free_bytes
from msc.datasets.text_table import text_table

GIB = 2**30
DISTRIBUTION = "msc-video"
# Distribution and the module that is imported to try it.
NEEDED = "torch deepspeed webdataset submitit mlflow av safetensors numpy pydantic pyyaml:yaml matplotlib scipy"
PACKAGES = [(name, module or name) for name, _, module in (row.partition(":") for row in NEEDED.split())]
# Versions before these load, and fail later.
FIXED_IN = {"deepspeed": ("0.19.8", "ZeRO 1 and 2 give NaN from the first step (overlapping, bf16, compiled blocks)")}
KERNELS = {
    "flash-attn 2": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
    "transformer-engine": "transformer_engine.pytorch",
}

State = Literal["ok", "note", "problem", "broken"]


@dataclass(frozen=True)
class Check:
    """state: "ok", "note" (works, worth knowing), "problem" (something will be slow or fail) or "broken" (nothing will
    work). fix: what to do about the last two."""

    name: str
    state: State
    detail: str
    fix: str = ""


def run_checks(folder: Path | None = None) -> list[Check]:
    """Every check. folder: where the runs are (default: this one)."""
    linux, fix = sys.platform.startswith("linux"), "train on Linux: signals and process control are Linux's here"
    return [
        Check("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        check("system", linux, f"{platform.system()} {platform.machine()}", fix),
        *package_checks(),
        *torch_checks(),
        *codec_checks(),
        *kernel_checks(),
        *space_checks(folder or Path.cwd()),
    ]


def check(name: str, good: object, detail: str, fix: str, otherwise: State = "problem") -> Check:
    """ "ok", or the state `otherwise` with its fix."""
    return Check(name, "ok", detail) if good else Check(name, otherwise, detail, fix)


def is_healthy(checks: list[Check]) -> bool:
    return all(check.state != "broken" for check in checks)


def as_json(checks: list[Check]) -> str:
    """The checks, and what torch.utils.collect_env says of the machine, for a bug report."""
    environment: dict[str, Any] = {}
    if not import_error("torch"):
        from torch.utils.collect_env import get_env_info

        with quiet():
            environment = get_env_info()._asdict()
    report = {"healthy": is_healthy(checks), "checks": [asdict(check) for check in checks], "environment": environment}
    return json.dumps(report, indent=2, default=str)


def as_text(checks: list[Check]) -> str:
    """A table, each trouble followed by its fix, and a summary line."""
    rows: list[tuple[str, str, str]] = []
    for check in checks:
        rows.append((check.state, check.name, check.detail))
        rows += [("", "", f"-> {check.fix}")] if check.fix else []
    broken, problems = (sum(check.state == state for check in checks) for state in ("broken", "problem"))
    summary = f"{broken} broken, {problems} to look at: see the lines with ->"
    return f"{text_table(rows)}\n{summary if broken or problems else 'everything needed is there'}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries print greetings while they are imported; `--json` must stay JSON."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def import_error(module: str) -> str:
    """Import a module for real: "" if that works, else the error in one line."""
    try:
        with quiet():
            importlib.import_module(module)
    except Exception as error:  # a broken binary raises anything from ImportError to OSError or RuntimeError
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return ""


def package_checks() -> list[Check]:
    try:
        versions = required_versions(metadata.requires(DISTRIBUTION) or [])
        own = Check("msc", "ok", f"{metadata.version(DISTRIBUTION)} at {Path(__file__).parent.parent}")
    except metadata.PackageNotFoundError:
        versions = {}
        own = Check("msc", "problem", "is not installed", "pip install -c constraints.txt -e .")
    return [own, *(package_check(name, module, versions.get(name, "")) for name, module in PACKAGES)]


def required_versions(requirements: list[str]) -> dict[str, str]:
    """{distribution: version specifier} of the requirements outside of extras."""
    from packaging.requirements import Requirement

    parsed = [Requirement(requirement) for requirement in requirements]
    return {requirement.name: str(requirement.specifier) for requirement in parsed if requirement.marker is None}


def package_check(name: str, module: str, specifier: str = "") -> Check:
    """Whether a needed package is installed, loads, and has a version that satisfies `specifier`."""
    from packaging.specifiers import SpecifierSet  # comes with deepspeed and mlflow
    from packaging.version import Version

    install = f"pip install -c constraints.txt '{name}{specifier}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "broken", "is not installed", install)
    if reason := import_error(module):
        return Check(name, "broken", f"{version} does not load: {reason}", f"{install} --force-reinstall --no-deps")
    fixed, symptom = FIXED_IN.get(name, ("0", ""))
    if Version(version) < Version(fixed):
        return Check(name, "broken", f"{version}: {symptom}", f"pip install -c constraints.txt '{name}>={fixed}'")
    good = SpecifierSet(specifier).contains(version, prereleases=True)
    return check(name, good, version if good else f"{version}, but {specifier} is needed", install)


def torch_checks() -> list[Check]:
    if import_error("torch"):
        return []
    import torch

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    checks, present = [], len(list(Path("/dev").glob("nvidia[0-9]*")))
    for gpu, i in ((torch.cuda.get_device_properties(i), i) for i in gpus):
        detail = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, sm_{gpu.major}{gpu.minor}"
        checks.append(Check(f"gpu {i}", "ok", detail))
    if torch.cuda.is_available():
        checks.append(Check("cuda", "ok", f"{torch.version.cuda}"))
        if not torch.distributed.is_nccl_available():
            checks.append(Check("nccl", "problem", "not in this torch", "for several GPUs install another torch"))
    elif present and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        fix = "install a CUDA torch, or see whether `nvidia-smi` works and the driver is new enough for that CUDA"
        detail = f"{present} present, but torch (CUDA {torch.version.cuda}) cannot use them"
        checks.append(Check("gpu", "problem", detail, fix))
    else:
        checks.append(Check("gpu", "note", f"none: the CPU is used, {os.cpu_count()} cores (good for trying out)"))
    # DeepSpeed compiles its communication for CPU ranks at the first start; GPU ranks compile nothing.
    missing: State = "note" if torch.cuda.is_available() else "broken"
    return [*checks, *compiler_checks(missing), attention_check(), open_files()]


def compiler_checks(missing: State) -> list[Check]:
    """missing: the state where one is missing."""
    compiler = os.environ.get("CXX", "g++")
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # as `msc train` sets it
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    rows = [
        ("compiler", shutil.which(compiler), compiler, "install a C++ compiler (Debian: apt-get install g++)"),
        ("ninja", shutil.which("ninja", path=programs), "ninja", "pip install -c constraints.txt ninja"),
        ("python headers", header.exists() and header, header, "install them (Debian: apt-get install python3-dev)"),
    ]
    return [check(name, path, str(path or f"no {what}"), fix, missing) for name, path, what, fix in rows]


def attention_check() -> Check:
    """Which kernel "auto" picks, and which can be selected by name."""
    try:
        with quiet():
            import torch

            from msc.pretrain.kernels import flash
            from msc.pretrain.kernels.dispatch import choose_kernel

            device = "cuda" if torch.cuda.is_available() else "cpu"
            names = ["sdpa", "flex"] if device == "cuda" else ["sdpa"]
            with contextlib.suppress(ValueError):
                names += [f"flash ({flash.load(flash.capability())[0]})"] if device == "cuda" else []
            detail = f"{choose_kernel(device)} on {device}; parallel.attention may be {', '.join(names)}"
            return Check("attention", "ok", detail)
    except Exception as error:  # whatever it is, training would meet it too
        return Check("attention", "broken", f"{type(error).__name__}: {error}", "report this with the text above")


def open_files() -> Check:
    """For how many ranks the first of them could keep connections."""
    from msc.parallel.process_group import OPEN_FILES_BASE, OPEN_FILES_PER_RANK

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:
        return Check("open files", "ok", "no limit")
    ranks = max(0, hard - OPEN_FILES_BASE) // OPEN_FILES_PER_RANK
    detail = f"{hard:,} for a process at most (ulimit -Hn), enough for {ranks:,} ranks"
    return check("open files", ranks >= 64, detail, "raise it for jobs: limits.conf, or LimitNOFILE of slurmd")


def codec_checks() -> list[Check]:
    if import_error("av"):
        return []
    import av

    try:
        av.Codec("libx264", "w")
    except Exception:  # the class that PyAV raises has moved between its modules
        fix = "pip install --force-reinstall --only-binary=:all: av (its wheels bring the codec)"
        return [Check("h264", "broken", "this PyAV cannot write it", fix)]
    return [Check("h264", "ok", "libx264")]


def kernel_checks() -> list[Check]:
    """Optional kernels, by import."""
    checks = []
    for name, module in KERNELS.items():
        reason, parts = import_error(module), module.split(".")
        absent = [f"ModuleNotFoundError: No module named {'.'.join(parts[: i + 1])!r}" for i in range(len(parts))]
        if reason in absent:
            checks.append(Check(name, "note", "not installed (optional)"))
        else:  # if not ok, the kernel is there, and something that it needs is not
            fix = f"rebuild {name} for this torch: pip install with --no-build-isolation --force-reinstall"
            checks.append(check(name, not reason, f"does not load: {reason}" if reason else "loads", fix))
    return checks


def space_checks(folder: Path) -> list[Check]:
    import psutil

    rows = [("disk", folder, 20, "checkpoints need about 16 bytes a parameter: free some, or --run elsewhere")]
    if (shared := Path("/dev/shm")).is_dir():  # loader workers hand batches over in it; containers often have 64 MiB
        rows.append(("shared memory", shared, 1, "start the container with --shm-size=8g, or data.workers=0"))
    checks = []
    for name, place, enough_gib, fix in rows:
        if not os.access(place, os.W_OK):
            checks.append(Check(name, "broken", f"{place} cannot be written to", "work in a folder that is yours"))
            continue
        free = free_bytes(place) / GIB
        checks.append(check(name, free >= enough_gib, f"{free:.1f} GiB free at {place}", fix))
    memory = psutil.virtual_memory()
    detail, fix = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free", "end other programs"
    return [*checks, check("memory", memory.available >= 4 * GIB, detail, f"{fix}, or train with fewer processes")]
