"""Edited settings of exports and runs: refused by file and field, in bounded time and memory."""

from __future__ import annotations

import json
import resource
import shutil
import time

import fake_checkpoints
import pytest
import yaml

from msc.pretrain.config import load
from msc.pretrain.export.export import export
from msc.pretrain.inference.load import open_run
from msc.pretrain.model.transformer import MSCTransformer

INF, NAN = float("inf"), float("nan")
EDITS = {  # dotted name: values that no model can have; a list's own length is 3 here
    "model.width": ("128", 32.0, None, True, 0, -32, 10**9, 10**30, INF, NAN),
    "model.depth": ("2", 2.0, [], 0, -1, 10**6, 10**18),
    "model.scales": (3, [], [1], {}, [{"heads": 0}], [{"heads": -4}], [{"heads": 10**18}], [{"heads": 4, "size": 1}],
                     [{"heads": 4, "top": 0}], [{"heads": 4, "top": 2, "time": 2}],
                     [{"space": 1}], [{"heads": 4, "space": 0}], [{"heads": 4, "space": 10**9}],
                     [{"heads": 4, "time": 0}], [{"heads": 4, "time": 10**18}], [{"heads": 4, "window": -1}],
                     [{"heads": 4, "window": 10**18}], [{"heads": 4, "window": "all"}],
                     [{"heads": 4, "patch_window": 0}], [{"heads": 4, "patch_window": 1.5}]),
    "model.patch": ("2", 2.0, 0, -2, 10**9),
    "model.frames_per_unit": ("1", 1.0, 0, -1, 4, 10**18),
    "model.mlp_ratio": ("four", None, 0, -4.0, 1e30, INF, NAN, 3.0),
    "model.prediction": ("y", 1, None),
    "model.gate": ("evil", 1, None, ["logits"]),
    "model.rope_theta": ("x", 0, -1e4, INF, NAN, None),
    "model.classes": ("3", 1.0, -1, 5, 10**9),
    "model.text_width": ("5", 1.0, -1, 10**9),
    "model.channels": ("3", 3.0, 0, -3, 10**9),
    "model.latent_mean": (0.0, [0.0], [0.0] * 4, [NAN] * 3, [INF, 0, 0], ["a", "b", "c"]),
    "model.latent_std": (1.0, [1.0], [1.0] * 4, [0.0] * 3, [-1.0] * 3, [NAN] * 3, [INF, 1, 1], [None] * 3),
    "model.gate_constants": (0, [[0, 0]], [[0, 0, 0]] * 3, [[0, 0]] * 4, [[NAN, 0]] * 3, [[INF, 0]] * 3,
                             [["a", 0]] * 3),
    "model.rings": (3, None),
    "data.autoencoder": (3, ["pixels"]),
    "data.frames": ("6", 0, -6, 10**18),
    "data.height": (16.0, 0, -16, 10**9, 15),
    "data.width": (None, 0, 10**9),
    "data.video_height": ("16", 0, 10**9),
    "data.video_width": (1.5, -1, 10**9),
    "data.fps": ("12", 0, -1.0, 1e9, INF, NAN),
    "data.size": (3,),
    "diffusion.mean": ("0", NAN, INF),
    "diffusion.std": (0, -1, INF, NAN, None),
    "diffusion.shift": (0, -1, INF, NAN, "x"),
    "diffusion.clean": (1, -0.5, 1e9, NAN, "x"),
    "diffusion.prefix": (-0.1, 2, NAN, "x"),
    "diffusion.means": (0,),
    "weights": ("ema", [], ["../x"], 3, None),
    "dtype": ("int8", 32),
    "training": (3, []),
    "format": (3, "2", None, INF),
    "model": (None, [], 3),
    "data": (None, [], 3),
    "diffusion": (None, 3),
}  # fmt: skip
CASES = [(name, value) for name, values in EDITS.items() for value in values]
OF_A_RUN = [(name, value) for name, value in CASES if name.startswith(("model", "diffusion"))
            and value is not INF and not (name == "model" or name == "diffusion")]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run and its export."""
    path = tmp_path_factory.mktemp("runs") / "run"
    fake_checkpoints.write_run(path)
    export(path)
    return path


def set_value(values, name, value):
    *sections, key = name.split(".")
    for section in sections:
        values = values[section]
    values[key] = value


def check_refused(read, file, name):
    """ValueError that names the file and the field, within a second and 100 MB."""
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as caught:
        read()
    message = str(caught.value)
    assert str(file) in message and len(message) < 2000
    field = name.rsplit(".", 1)[-1].rstrip("s")
    assert field in message or "token" in message or "latent frames" in message, message
    assert time.process_time() - begun < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_there_are_enough_cases():
    assert len(CASES) > 150


def test_edits_of_an_export_are_refused_by_file_and_field(folders, tmp_path):
    original = json.loads((folders / "export" / "config.json").read_text())
    folder = shutil.copytree(folders / "export", tmp_path / "copy")
    for name, value in CASES:
        values = json.loads(json.dumps(original))
        set_value(values, name, value)
        (folder / "config.json").write_text(json.dumps(values))
        check_refused(lambda: MSCTransformer.from_pretrained(folder), folder / "config.json", name)


def test_each_setting_of_an_exported_model_is_needed(folders, tmp_path):
    folder = shutil.copytree(folders / "export", tmp_path / "copy")
    original = json.loads((folder / "config.json").read_text())
    for name in ("width", "scales", "rope_theta", "gate", "latent_std", "channels"):
        values = {**original, "model": {key: value for key, value in original["model"].items() if key != name}}
        (folder / "config.json").write_text(json.dumps(values))
        check_refused(lambda: MSCTransformer.from_pretrained(folder), folder / "config.json", name)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model":' * 100_000, '{"model": {"width": ' + "9" * 5000 + "}}"])
def test_json_that_no_reader_can_hold(folders, tmp_path, text):
    folder = shutil.copytree(folders / "export", tmp_path / "copy")
    (folder / "config.json").write_text(text)
    check_refused(lambda: MSCTransformer.from_pretrained(folder), folder / "config.json", "")


def test_edits_of_a_run_are_refused_by_file_and_field(folders, tmp_path):
    path = shutil.copytree(folders, tmp_path / "run")
    original = yaml.safe_load((path / "config.yaml").read_text())
    for name, value in OF_A_RUN:
        values = json.loads(json.dumps(original))
        set_value(values, name, value)
        (path / "config.yaml").write_text(yaml.safe_dump(values))
        check_refused(lambda: open_run(path), path / "config.yaml", name)


def test_an_alias_bomb_is_refused(tmp_path):
    """Nine aliases of nine aliases ...: 10^9 values in 300 bytes."""
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    check_refused(lambda: load(file=tmp_path / "c.yaml"), tmp_path / "c.yaml", "a0")


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 100, -1])
def test_a_truncated_file_whose_header_begins_like_a_pickle_is_called_truncated(folders, tmp_path, length):
    folder = shutil.copytree(folders / "export", tmp_path / "copy")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    padded = header + b" " * (-(len(header) - 0x0480) % 0x10000)  # its length ends in the bytes 80 04
    content = len(padded).to_bytes(8, "little") + padded + content[8 + len(header) :]
    assert content[:2] == b"\x80\x04"
    file.write_bytes(content)
    MSCTransformer.from_pretrained(folder)
    file.write_bytes(content[:length])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        MSCTransformer.from_pretrained(folder)
