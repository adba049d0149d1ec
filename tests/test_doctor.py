"""Doctor: the real machine, and simulated problems."""

import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from msc.datasets import files
from msc.launch import doctor

Usage = namedtuple("Usage", "total used free")


def test_json_report_of_this_machine() -> None:
    msc = Path(sys.executable).with_name("msc")
    done = subprocess.run([msc, "doctor", "--json"], capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    broken = [check for check in report["checks"] if check["state"] == "broken"]
    assert (done.returncode, report["healthy"], broken) == (0, True, [])
    names = {check["name"] for check in report["checks"]}
    assert {"python", "msc", "torch", "deepspeed", "compiler", "ninja", "flash-attn 2", "attention", "disk"} <= names
    assert {"torch_version", "cpu_info", "nvidia_driver_version"} <= set(report["environment"])


def test_text_report() -> None:
    checks = [
        doctor.Check("python", "ok", "3.12.1"),
        doctor.Check("gpu", "note", "none"),
        doctor.Check("disk", "problem", "1 GiB", "free some"),
        doctor.Check("torch", "broken", "is not installed", "pip install torch"),
    ]
    text = doctor.as_text(checks).splitlines()
    assert [line.split()[0] for line in text[:4]] == ["ok", "note", "problem", "->"]
    assert text[3].endswith("-> free some")
    assert text[5].endswith("-> pip install torch")
    assert text[-1].startswith("1 broken, 1 to look at")
    assert not doctor.is_healthy(checks)
    assert doctor.is_healthy(checks[:3])
    assert doctor.as_text(checks[:2]).splitlines()[-1] == "everything needed is there"


def test_missing_and_broken_packages(monkeypatch, tmp_path: Path) -> None:
    assert doctor.package_check("no-such-package", "no_such_package").state == "broken"
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "1.2.0")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_installed.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    check = doctor.package_check("half-installed", "half_installed")
    assert check.state == "broken"
    assert "libcudart.so.12" in check.detail
    assert "pip install" in check.fix
    (tmp_path / "loads_well.py").write_text("print('a greeting that must not be seen')")
    check = doctor.package_check("loads-well", "loads_well", ">=2.0")
    assert check.state == "problem"
    assert ">=2.0" in check.detail
    assert doctor.package_check("loads-well", "loads_well", ">=1.2").state == "ok"


def test_imports_print_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "talks_on_import.py").write_text("import sys; print('hello'); print('there', file=sys.stderr)")
    assert doctor.import_error("talks_on_import") == ""
    assert capsys.readouterr() == ("", "")


def test_requirements_without_extras() -> None:
    versions = doctor.required_versions(["torch>=2.11", "av>=14,<19", "ruff>=0.12; extra == 'dev'"])
    assert versions.keys() == {"torch", "av"}


@pytest.mark.parametrize(
    ("name", "version", "specifier", "state"),
    [
        ("deepspeed", "0.19.0", "", "broken"),
        ("deepspeed", "0.19.7", ">=0.18", "broken"),
        ("deepspeed", "0.19.8", ">=0.19.8", "ok"),
        ("deepspeed", "0.20.0+cpu", "", "ok"),
        ("numpy", "2.13.0+cpu", ">=2.11", "ok"),
        ("numpy", "19.0", ">=14,<19", "problem"),
    ],
)
def test_versions_of_packages(name: str, version: str, specifier: str, state: str, monkeypatch) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda _: version)
    monkeypatch.setattr(doctor, "import_error", lambda _: "")
    check = doctor.package_check(name, name, specifier)
    assert check.state == state
    assert ("NaN" in check.detail) == (state == "broken")


@pytest.mark.parametrize(
    ("module", "reason", "missing"),
    [
        ("flash_attn.cute", "ModuleNotFoundError: No module named 'flash_attn'", True),
        ("flash_attn.cute", "ModuleNotFoundError: No module named 'flash_attn.cute'", True),
        ("flash_attn", "ModuleNotFoundError: No module named 'einops'", False),
        ("flash_attn", "ImportError: undefined symbol", False),
    ],
)
def test_missing_and_broken_kernels(module: str, reason: str, missing: bool, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "KERNELS", {"kernel": module})
    monkeypatch.setattr(doctor, "import_error", lambda name: reason)
    assert [check.state for check in doctor.kernel_checks()] == ["note" if missing else "problem"]


def test_missing_compiler_is_fatal_on_the_cpu(monkeypatch) -> None:
    import torch

    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for cuda, state in ((False, "broken"), (True, "note")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        compiler = next(check for check in doctor.torch_checks() if check.name == "compiler")
        assert (compiler.state, compiler.detail) == (state, "no no-such-compiler")


def test_little_free_space(monkeypatch, tmp_path: Path) -> None:
    for free, state in ((0.5, "problem"), (500, "ok")):
        usage = Usage(2**50, 0, int(free * doctor.GIB))
        monkeypatch.setattr(files.shutil, "disk_usage", lambda folder, usage=usage: usage)
        disk, shared, *_ = doctor.space_checks(tmp_path)
        assert (disk.state, shared.state) == (state, state)
        assert str(tmp_path) in disk.detail
        assert bool(disk.fix) == (state == "problem")


@pytest.mark.parametrize(("hard", "detail", "state"), [(-1, "no limit", "ok"), (1024, "enough for 87 ranks", "ok"),
                                                      (512, "enough for 2 ranks", "problem")])  # fmt: skip
def test_open_file_limit(hard, detail, state, monkeypatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (256, hard))
    check = doctor.open_files()
    assert (check.state, bool(check.fix)) == (state, state == "problem")
    assert detail in check.detail
