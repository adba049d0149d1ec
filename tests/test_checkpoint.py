"""Checkpoints: asynchronous writing, failing disks, damaged files, pruning."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import checkpoint_ranks
import pytest
from gloo_ranks import run_ranks
from safetensors.torch import load_file

from msc.datasets import files
from msc.launch import cli
from msc.pretrain import cost, validation
from msc.pretrain.checkpoints import directory as checkpoint_directory
from msc.pretrain.checkpoints.format import CheckpointConfig
from msc.pretrain.config import load
from msc.pretrain.presets import preset
from msc.pretrain.run_folder import RunFolder


@pytest.mark.parametrize(
    ("step", "keep", "keep_every", "pruned"),
    [
        (50, 2, 0, [10, 20, 30]),
        (50, 2, 20, [10, 30]),
        (50, 9, 0, []),
        (30, 1, 0, [10, 20]),  # 40 and 50 are from before a rollback
    ],
)
def test_pruned_steps(step, keep, keep_every, pruned, tmp_path):
    for each in (10, 20, 30, 40, 50):
        (tmp_path / "checkpoints" / checkpoint_directory.checkpoint_name(each)).mkdir(parents=True)
    checkpoint_directory.prune(tmp_path, step, keep, keep_every)
    left = map(checkpoint_directory.step_of, checkpoint_directory.list_checkpoints(tmp_path))
    assert sorted({10, 20, 30, 40, 50} - set(left)) == pruned


def test_keep_every_must_be_a_multiple_of_every():
    CheckpointConfig(every=500, keep_every=2000)
    with pytest.raises(ValueError, match=r"keep_every is 700.*multiple of checkpoint.every \(500\)"):
        CheckpointConfig(every=500, keep_every=700)


@pytest.mark.gloo
def test_training_continues_while_a_checkpoint_is_written(tmp_path):
    """What is written is the state at `save`, whatever changes meanwhile; a second save waits for the first."""
    for seconds, published, step, values in run_ranks(checkpoint_ranks.write_beside, 2, str(tmp_path)):
        assert seconds[0] < 0.25 < 0.4 < seconds[1]
        assert published == "step-00000001"
        assert (step, values) == (2, {2.0})


@pytest.mark.gloo
def test_failed_write_is_logged_retried_and_then_raised_on_every_rank(tmp_path, capfd):
    for errors in run_ranks(checkpoint_ranks.fail_on_one_rank, 2, str(tmp_path)):
        assert [bool(text) for text in errors] == [False, False, True, False, False, True]
        for text in (errors[2], errors[5]):
            assert "earlier ones stay" in text and "rank 1" in text and "File too large" in text
    assert capfd.readouterr().err.count("could not be written") == 3, "once each, by one rank"
    assert [path.name for path in checkpoint_directory.list_checkpoints(tmp_path)] == ["step-00000001", "step-00000004"]
    assert checkpoint_directory.latest(tmp_path).name == "step-00000004"
    assert not any(checkpoint_directory.verify(path) for path in checkpoint_directory.list_checkpoints(tmp_path))
    assert not list(RunFolder(tmp_path).checkpoints.glob(".*")), "nothing unfinished stays"


@pytest.mark.gloo
def test_failure_on_rank_0_is_known_to_all_ranks(tmp_path, capfd):
    for errors in run_ranks(checkpoint_ranks.fail_on_rank_0, 2, str(tmp_path)):
        assert "rank 0: stale handle" in errors[0] and errors[1] == ""
    assert [path.name for path in checkpoint_directory.list_checkpoints(tmp_path)] == ["step-00000002"]
    assert "cleaning up after the checkpoint of step 2 failed: stale handle" in capfd.readouterr().err


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    run = tmp_path_factory.mktemp("written") / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    run_ranks(checkpoint_ranks.write_several, 2, str(run), 5)
    return run


FORKS = """
import os
import torch
from types import SimpleNamespace
from msc.pretrain.checkpoints.async_writer import pinned_buffer

calls = []
torch.cuda.cudart = lambda: SimpleNamespace(cudaHostRegister=lambda *call: calls.append(call) or 0)
buffer = pinned_buffer(5000)
buffer[:] = torch.arange(5000.0)
assert calls == [(buffer.data_ptr(), 20000, 1)] and buffer.sum() == 5000 * 4999 / 2
child = os.fork()
if child == 0:
    buffer[0].item()
    os._exit(0)
print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


def test_pinned_memory_is_not_inherited_by_forks():
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True)
    assert done.stdout.split() == [str(int(signal.SIGSEGV))], done.stderr


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def of_another_format(path):
    meta = json.loads((path / "meta.json").read_bytes())
    meta.pop("sha256")
    (path / "meta.json").write_text(json.dumps({**meta, "format": 1}))


DAMAGE = {
    "another format": (of_another_format, "has checkpoint format 1, and this version reads 2"),
    "a flipped byte": (lambda path: flip(path / "rank-00001.safetensors", -10), "rank-00001.*checksum"),
    "a truncated file": (lambda path: (path / "rank-00000.safetensors").write_bytes(b"x" * 99), "it has 99 of"),
    "a missing file": (lambda path: (path / "rank-00001.safetensors").unlink(), "rank-00001.safetensors is missing"),
    "a flipped digit of meta.json": (
        lambda path: flip(path / "meta.json", (path / "meta.json").read_bytes().index(b'"clock": 8') + 9),
        "meta.json does not match its checksum",
    ),
    "a truncated meta.json": (lambda path: (path / "meta.json").write_bytes(b'{"format": 1, "st'), "truncated"),
    "no meta.json": (lambda path: (path / "meta.json").unlink(), "meta.json is missing"),
}  # fmt: skip


def test_files_are_ordinary_safetensors(written):
    path = checkpoint_directory.latest(written)
    slices = load_file(path / "rank-00001.safetensors")
    assert {name.split("|")[2] for name in slices} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    assert slices["0.weight|32768|weight"].unique().tolist() == [5.0]
    assert checkpoint_directory.verify(path) == []
    meta = checkpoint_directory.CheckpointMeta.read(path)
    assert {"torch", "deepspeed", "python"} <= meta.versions.keys()
    assert meta.bytes == {file: (path / file).stat().st_size for file in meta.files}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_detected(what, written, tmp_path):
    path = shutil.copytree(checkpoint_directory.latest(written), tmp_path / "copy")
    do, message = DAMAGE[what]
    do(path)
    (defect,) = checkpoint_directory.verify(path)
    assert pytest.RaisesExc(ValueError, match=message).matches(ValueError(defect)), defect


@pytest.mark.gloo
def test_the_newest_intact_checkpoint_is_used_and_damaged_ones_are_named(written, tmp_path, capfd):
    run = shutil.copytree(written, tmp_path / "run")
    for path, what in zip(reversed(checkpoint_directory.list_checkpoints(run)), ("a flipped byte", "a truncated file",
                          "no meta.json"),
                          strict=False):  # fmt: skip
        DAMAGE[what][0](path)
    assert run_ranks(checkpoint_ranks.load_damaged, 2, str(run)) == [(2, {2.0})] * 2
    log = capfd.readouterr().err
    for step, why in ((5, "does not match its checksum"), (4, "it has 99 of"), (3, "meta.json is missing")):
        (line,) = (line for line in log.splitlines() if f"step-{step:08d}/" in line)
        assert why in line and f"kept as damaged-step-{step:08d}" in line and "resumes from step-00000002" in line
    assert checkpoint_directory.latest(run).name == "step-00000002"
    assert [path.name for path in checkpoint_directory.list_checkpoints(run)] == ["step-00000001", "step-00000002"]

    for path in checkpoint_directory.list_checkpoints(run):
        DAMAGE["a missing file"][0](path)
    for step, why in run_ranks(checkpoint_ranks.load_damaged, 2, str(run)):
        assert step is None and "no checkpoint of" in why and why.count("is missing") == 2
    assert len(checkpoint_directory.list_checkpoints(run)) == 2, "nothing is moved where none is intact"


@pytest.mark.gloo
def test_checksums_may_take_longer_than_the_collective_timeout(written):
    assert run_ranks(checkpoint_ranks.hash_slowly, 2, str(written)) == [5, 5]


def test_resume_candidates_begin_at_latest(written, tmp_path):
    run = shutil.copytree(written, tmp_path / "run")
    (RunFolder(run).checkpoints / "latest").write_text("step-00000003")
    assert [checkpoint_directory.step_of(path) for path in checkpoint_directory.resume_candidates(run)] == [3, 2, 1]
    (RunFolder(run).checkpoints / "latest").unlink()
    assert [checkpoint_directory.step_of(path) for path in checkpoint_directory.resume_candidates(run)] == [
        5,
        4,
        3,
        2,
        1,
    ]
    assert (
        checkpoint_directory.find(run, "4")
        == checkpoint_directory.find(run, str(RunFolder(run).checkpoints / "step-00000004"))
        == checkpoint_directory.resume_candidates(run)[1]
    )
    with pytest.raises(ValueError, match="7 is not a checkpoint of .*: 1, 2, 3, 4, 5"):
        checkpoint_directory.find(run, "7")


def test_msc_checkpoints_lists_and_verifies(written, tmp_path, capsys):
    run = shutil.copytree(written, tmp_path / "run")
    assert cli.main(["checkpoints", str(run)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:2] == ["step", "clips"] and [row[0] for row in rows[1:]] == ["1", "2", "3", "4", "5"]
    assert rows[5][1:3] == ["8", "80"] and rows[5][5:8] == ["2", "1", "0"] and rows[5][-1] == "next"
    assert cli.main(["checkpoints", str(run), "--verify"]) == 0
    assert capsys.readouterr().out.count("whole") == 5
    DAMAGE["a truncated file"][0](checkpoint_directory.list_checkpoints(run)[1])
    assert cli.main(["checkpoints", str(run)]) == 0
    capsys.readouterr()
    assert cli.main(["checkpoints", str(run), "--verify"]) == 1
    output = capsys.readouterr().out
    assert output.count("whole") == 4 and "it has 99 of" in output
    DAMAGE["a truncated meta.json"][0](checkpoint_directory.list_checkpoints(run)[0])
    assert cli.main(["checkpoints", str(run)]) == 1
    assert cli.main(["checkpoints", str(tmp_path)]) == 2
    assert json.loads((checkpoint_directory.latest(run) / "meta.json").read_text())["world"] == 2


@pytest.mark.parametrize(
    ("there", "free", "more", "clips"),
    [(0, 3.5, 4, 10**6), (0, 4, 0, 10**6), (2, 1.5, 2, 10**6), (3, 1.5, 0, 10**6), (9, 0.5, 1, 10**6), (0, 1.5, 0, 8)],
)
def test_free_space_is_required_for_checkpoints_still_to_be_written(there, free, more, clips, tmp_path, monkeypatch):
    config = load(preset("demo"), overrides=["checkpoint.keep=3", "model.channels=3", f"train.clips={clips}"])
    each = 16 * cost.parameters(config.model)
    monkeypatch.setattr(checkpoint_directory, "resume_candidates", lambda run: [run] * there)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=free * each))
    if not more:
        validation.check_room(config, tmp_path)
        return
    with pytest.raises(OSError, match=f"and {more} more are to come"):
        validation.check_room(config, tmp_path)
