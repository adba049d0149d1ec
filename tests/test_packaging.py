"""The package as others meet it: names, imports, directions, and files that must agree."""

import ast
import configparser
import importlib.util
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pretrain", "parallel", "datasets", "launch")
LINT = Path(sys.executable).with_name("lint-imports")


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    return parser


def names(folder: Path, source: Path = ROOT) -> Path:
    """A folder with `msc` made of links: static tools do not see an editable install of a namespace."""
    (folder / "msc").mkdir(parents=True)
    for package in PACKAGES:
        (folder / "msc" / package).symlink_to(source / package)
    return folder


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [LINT, "--config", ROOT / "setup.cfg", "--no-cache", "--no-logo"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env={"PYTHONPATH": str(folder)})


def test_imports_go_one_way(tmp_path: Path) -> None:
    done = lint_imports(names(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("datasets/shards/index.py", "import msc.pretrain.model.transformer"),
        ("datasets/shards/index.py", "import msc.parallel.mesh"),
        ("parallel/mesh.py", "from msc.datasets.shards import index"),
        ("pretrain/model/transformer.py", "from msc.launch.processes import launcher"),
        ("pretrain/model/transformer.py", "from msc.parallel import mesh"),
        ("pretrain/model/scales.py", "from msc.parallel import mesh"),
        ("pretrain/model/scales.py", "from msc.pretrain.evaluation import evaluate"),
        ("pretrain/kernels/dispatch.py", "from msc.pretrain.model import transformer"),
        # cycles: of two modules of a folder, and of two folders through modules that are in no cycle themselves
        ("pretrain/model/layers.py", "from msc.pretrain.model import transformer"),
        ("datasets/shards/tar.py", "from msc.datasets.loading import shard_reader"),
    ],
)
def test_an_import_against_the_direction_or_in_a_cycle_fails_the_check(module: str, line: str, tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / module).open("a") as out:
        out.write(f"\n\ndef hidden():\n    {line}\n")
    done = lint_imports(names(tmp_path / "names", tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout


def test_the_four_folders_have_no_init_and_no_module_is_named_like_a_library() -> None:
    for package in PACKAGES:
        modules = sorted((ROOT / package).rglob("*.py"))
        assert modules, f"{package} is empty"
        assert not (ROOT / package / "__init__.py").exists(), "would shadow Hugging Face's datasets"
        # A folder run by path puts itself first on sys.path: no file in it may be named like a library.
        clashing = {path.stem for path in modules} & (sys.stdlib_module_names | {"torch", "numpy", "av", "mlflow"})
        assert not clashing - ALLOWED_NAMES


# The design's names; harmless, as nothing is run by path and nobody imports them without `msc.`.
ALLOWED_NAMES = {"statistics"}


def test_the_name_datasets_is_left_to_others() -> None:
    program = "import importlib.util, msc.datasets.prepare.clip_ranges; print(importlib.util.find_spec('datasets'))"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert str(ROOT / "datasets") not in done.stdout


def test_importing_a_module_starts_nothing() -> None:
    """At the top of a module there are definitions and nothing that does something."""
    harmless = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
        ast.If,
        ast.Try,
    )
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                documented = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                # a registration of an operator's gradient, which torch has no decorator for
                registers = isinstance(node, ast.Expr) and ast.unparse(node).startswith("library.register_autograd(")
                assert documented or registers or isinstance(node, harmless), (
                    f"{path.name}:{node.lineno} runs when imported"
                )


def test_neither_the_compiler_nor_mlflow_delays_a_start() -> None:
    """Training imported, and a model of labelled clips counted, as every command that trains does first."""
    program = (
        "import sys, msc.pretrain.train; from msc.pretrain import cost; "
        "from msc.pretrain.model.config import ModelConfig; "
        "cost.parameters(ModelConfig(channels=3, classes=2)); "
        "print(*{'torch._dynamo', 'torch._inductor', 'mlflow', 'deepspeed'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_import_is_declared() -> None:
    """What the code imports from outside is a requirement or an extra, so that a plain install is whole."""
    given = metadata.packages_distributions()
    declared = {canonical(Requirement(line).name) for line in metadata.requires("msc-video") or []}
    brought = {"packaging", "pyarrow", "huggingface-hub"}  # by deepspeed, mlflow and diffusers
    optional = {"flash_attn", "flash_attn_interface", "transformer_engine", "transformers"}
    optional |= {"triton"}  # a part of torch's builds for GPUs
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for module in imported(ast.parse(path.read_text())) - set(sys.stdlib_module_names) - optional - {"msc"}:
                assert module in given, f"{path.name} imports {module}, which is not installed"
                owners = {canonical(name) for name in given[module]}
                assert owners & (declared | brought), f"{path.name} imports {module}: {owners} is not in setup.cfg"


def imported(tree: ast.AST) -> set[str]:
    """First names of all absolute imports, in functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_every_requirement_within_its_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^,*]+", str(pin.specifier)) for pin in pinned), "exact pins only"
    versions = {canonical(pin.name): str(pin.specifier).removeprefix("==") for pin in pinned}
    assert len(versions) == len(pinned), "a package is pinned twice"
    options, extras = setup_cfg()["options"], setup_cfg()["options.extras_require"]
    wanted = options["install_requires"] + extras["autoencoders"] + extras["demo"] + extras["dev"]
    for line in wanted.splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            version = versions.get(canonical(requirement.name))
            assert version, f"{requirement.name} is not pinned in constraints.txt"
            assert requirement.specifier.contains(version), f"{version} is outside of {requirement}"


def test_the_four_folders_are_what_is_installed() -> None:
    listed = setup_cfg()["options"]["packages"].split()
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert sorted(listed) == sorted("msc." + ".".join(folder.relative_to(ROOT).parts) for folder in folders)
    for name in listed:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        path = ROOT / Path(*name.split(".")[1:])
        assert Path(next(iter(spec.submodule_search_locations or []))).resolve() == path


def test_the_command_is_installed() -> None:
    [point] = [point for point in metadata.entry_points(group="console_scripts") if point.name == "msc"]
    assert point.value == "msc.launch.cli:main"
