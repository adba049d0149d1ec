"""What is wrong with this machine, and how to put it right: `msc doctor`.

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
from typing import Literal

from msc.datasets.files import free_bytes

GIB = 2**30
DISTRIBUTION = "msc-video"
# Distribution and the module that is imported to try it.
NEEDED = "torch deepspeed webdataset submitit mlflow av safetensors numpy pydantic pyyaml:yaml matplotlib"
PACKAGES = [(name, module or name) for name, _, module in (row.partition(":") for row in NEEDED.split())]
KERNELS = (
    ("flash-attn 2", "flash_attn"),
    ("flash-attn 3", "flash_attn_interface"),
    ("flash-attn 4", "flash_attn.cute"),
    ("transformer-engine", "transformer_engine.pytorch"),
)


@dataclass(frozen=True)
class Check:
    """One thing looked at. state: "ok", "note" (works, worth knowing), "problem" (something will be slow or
    fail), "broken" (nothing will work). `fix` says what to do about the last two."""

    name: str
    state: Literal["ok", "note", "problem", "broken"]
    found: str
    fix: str = ""


def examine(folder: Path | None = None) -> list[Check]:
    """Every check, in the order in which a person would ask. `folder` (default: this one) holds the runs."""
    folder = Path.cwd() if folder is None else folder
    return [
        *python_checks(),
        *package_checks(),
        *device_checks(),
        *compiler_checks(),
        *codec_checks(),
        *kernel_checks(),
        *space_checks(folder),
    ]


def healthy(checks: list[Check]) -> bool:
    return all(check.state != "broken" for check in checks)


def as_json(checks: list[Check]) -> str:
    return json.dumps({"healthy": healthy(checks), "checks": [asdict(check) for check in checks]}, indent=2)


def as_text(checks: list[Check]) -> str:
    """A table, each trouble followed by its fix, and one line that sums up."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:8}{check.name:{width}}  {check.found}")
        if check.fix:
            lines.append(f"{'':8}{'':{width}}  -> {check.fix}")
    count = {state: sum(check.state == state for check in checks) for state in ("broken", "problem")}
    if not any(count.values()):
        lines.append("everything needed is there")
    else:
        lines.append(f"{count['broken']} broken, {count['problem']} to look at: see the lines with ->")
    return "\n".join(lines)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries greet on both streams while they are imported; `--json` must stay JSON."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def attempt(module: str) -> str:
    """Import a module for real: "" if it works, else why not, in one line."""
    try:
        with quiet():
            importlib.import_module(module)
    except Exception as error:  # a broken binary raises anything from ImportError to OSError or RuntimeError
        reason = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {reason}"
    return ""


def required_versions(requirements: list[str]) -> dict[str, str]:
    """{distribution: version specifier} of the requirements that no extra brings."""
    from packaging.requirements import Requirement  # comes with deepspeed and mlflow

    parsed = [Requirement(requirement) for requirement in requirements]
    return {found.name: str(found.specifier) for found in parsed if found.marker is None}


def version_fits(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def python_checks() -> list[Check]:
    version = platform.python_version()
    fits = sys.version_info >= (3, 11)
    machine = f"{platform.system()} {platform.machine()}"
    if sys.platform.startswith("linux"):
        system = Check("system", "ok", machine)
    else:
        system = Check("system", "problem", machine, "train on Linux: signals and process care are Linux's here")
    return [
        Check("python", "ok", f"{version} at {sys.executable}")
        if fits
        else Check("python", "broken", version, "make a virtual environment with Python 3.11 or newer"),
        system,
    ]


def package_checks() -> list[Check]:
    try:
        wanted = required_versions(metadata.requires(DISTRIBUTION) or [])
        own = Check("msc", "ok", f"{metadata.version(DISTRIBUTION)} at {Path(__file__).parent.parent}")
    except metadata.PackageNotFoundError:
        wanted = {}
        own = Check("msc", "problem", "is not installed", "pip install -c constraints.txt -e .")
    return [own, *(package_check(name, module, wanted.get(name, "")) for name, module in PACKAGES)]


def package_check(name: str, module: str, specifier: str = "") -> Check:
    """Whether a needed package is there, loads, and has a version that satisfies `specifier`."""
    install = f"pip install -c constraints.txt '{name}{specifier}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "broken", "is not installed", install)
    if reason := attempt(module):
        found = f"{version} does not load: {reason}"
        return Check(name, "broken", found, f"{install} --force-reinstall --no-deps")
    if specifier and not version_fits(version, specifier):
        return Check(name, "problem", f"{version}, but {specifier} is needed", install)
    return Check(name, "ok", version)


def device_checks() -> list[Check]:
    if attempt("torch"):
        return []
    import torch

    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if torch.cuda.is_available():
        checks = []
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            memory, sm = properties.total_memory / GIB, f"{properties.major}{properties.minor}"
            checks.append(Check(f"gpu {i}", "ok", f"{properties.name}, {memory:.0f} GiB, sm_{sm}"))
        checks.append(Check("cuda", "ok", f"{torch.version.cuda}"))
        if not torch.distributed.is_nccl_available():
            checks.append(
                Check("nccl", "problem", "this torch has none", "needed for more than one GPU: another torch")
            )
        return checks
    if present and torch.version.cuda is None:
        return [Check("gpu", "problem", f"{present} present, but this torch has no CUDA", "install a CUDA torch")]
    if present and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        found = f"{present} present, but torch (CUDA {torch.version.cuda}) cannot use them"
        fix = "see whether `nvidia-smi` works, and whether the driver is new enough for that CUDA"
        return [Check("gpu", "problem", found, fix)]
    return [Check("gpu", "note", f"none: the CPU is used, {os.cpu_count()} cores (good for trying out)")]


def compiler_checks() -> list[Check]:
    """DeepSpeed compiles its communication for CPU ranks at the first start; GPU ranks compile nothing."""
    if attempt("torch"):
        return []
    import torch

    needed: Literal["note", "broken"] = "note" if torch.cuda.is_available() else "broken"
    compiler = os.environ.get("CXX", "g++")
    programs = Path(sys.executable).parent  # `msc train` puts it on PATH
    ninja = shutil.which("ninja", path=f"{programs}{os.pathsep}{os.environ.get('PATH', '')}")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return [
        Check("compiler", "ok", found)
        if (found := shutil.which(compiler))
        else Check("compiler", needed, f"no {compiler}", "install a C++ compiler (Debian: apt-get install g++)"),
        Check("ninja", "ok", ninja)
        if ninja
        else Check("ninja", needed, "not on PATH", "pip install -c constraints.txt ninja"),
        Check("python headers", "ok", str(header))
        if header.exists()
        else Check("python headers", needed, f"no {header}", "install them (Debian: apt-get install python3-dev)"),
    ]


def codec_checks() -> list[Check]:
    if attempt("av"):
        return []
    import av

    try:
        av.Codec("libx264", "w")
    except Exception:  # the class that PyAV raises has moved between its modules
        fix = "pip install --force-reinstall --only-binary=:all: av (its wheels bring the codec)"
        return [Check("h264", "broken", "this PyAV cannot write it", fix)]
    return [Check("h264", "ok", "libx264")]


def kernel_checks() -> list[Check]:
    """Optional kernels by real import; and the attention that training would use."""
    checks = []
    for name, module in KERNELS:
        reason = attempt(module)
        if not reason:
            checks.append(Check(name, "ok", "loads"))
        elif is_missing(module, reason):
            checks.append(Check(name, "note", "not installed (optional)"))
        else:
            fix = f"rebuild {name} for this torch: pip install with --no-build-isolation --force-reinstall"
            checks.append(Check(name, "problem", f"does not load: {reason}", fix))
    if not attempt("torch"):
        checks.append(attention_check())
    return checks


def is_missing(module: str, reason: str) -> bool:
    """Whether the module itself is not there, rather than something that it needs."""
    parts = module.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(reason == f"ModuleNotFoundError: No module named {name!r}" for name in names)


def attention_check() -> Check:
    """Which kernel "auto" picks, and which can be asked for by name."""
    try:
        with quiet():
            import torch

            from msc.pretrain.kernels import flash
            from msc.pretrain.kernels.dispatch import choose_kernel

            device = "cuda" if torch.cuda.is_available() else "cpu"
            named = ["sdpa", "flex"] if device == "cuda" else ["sdpa"]
            with contextlib.suppress(ValueError):
                if device == "cuda":
                    named.append(f"flash ({flash.load(flash.capability())[0]})")
            found = f"{choose_kernel(device)} on {device}; parallel.attention may be {', '.join(named)}"
            return Check("attention", "ok", found)
    except Exception as error:  # whatever it is, training would meet it too
        return Check("attention", "broken", f"{type(error).__name__}: {error}", "report this with the text above")


def space_checks(folder: Path) -> list[Check]:
    import psutil

    checks = [
        free_space("disk", folder, 20, "checkpoints need about 16 bytes a parameter: free some, or --run elsewhere")
    ]
    shared = Path("/dev/shm")
    if shared.is_dir():
        # Loader workers hand their batches over in it; containers often have 64 MiB.
        checks.append(
            free_space("shared memory", shared, 1, "start the container with --shm-size=8g, or data.workers=0")
        )
    checks += open_files()
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < 4 * GIB:
        checks.append(Check("memory", "problem", found, "end other programs, or train with fewer processes"))
    else:
        checks.append(Check("memory", "ok", found))
    return checks


def open_files() -> list[Check]:
    """For how many ranks the first of them could keep connections."""
    if attempt("torch"):
        return []
    from msc.parallel.process_group import OPEN_FILES_BASE, OPEN_FILES_PER_RANK

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:
        return [Check("open files", "ok", "no limit")]
    ranks = max(0, hard - OPEN_FILES_BASE) // OPEN_FILES_PER_RANK
    found = f"{hard:,} for a process at most (ulimit -Hn), enough for {ranks:,} ranks"
    fix = "" if ranks >= 64 else "raise it for jobs: limits.conf, or LimitNOFILE of slurmd"
    return [Check("open files", "problem" if fix else "ok", found, fix)]


def free_space(name: str, folder: Path, enough_gib: float, fix: str) -> Check:
    free = free_bytes(folder)
    found = f"{free / GIB:.1f} GiB free at {folder}"
    if not os.access(folder, os.W_OK):
        return Check(name, "broken", f"{folder} cannot be written to", "work in a folder that is yours")
    if free < enough_gib * GIB:
        return Check(name, "problem", found, fix)
    return Check(name, "ok", found)
