"""Exported weights: the same from any checkpoint, in one file or many, and nothing but clear errors from bad ones."""

from __future__ import annotations

import json
import pickle
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fake_checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

from msc.datasets import files
from msc.pretrain.checkpoints import directory as checkpoint_directory
from msc.pretrain.checkpoints import format as checkpoint_format
from msc.pretrain.evaluation.confidence import with_total
from msc.pretrain.evaluation.evaluate import table_of, with_differences
from msc.pretrain.export import export as exports
from msc.pretrain.export import model_card
from msc.pretrain.export.export import export, split
from msc.pretrain.model import exported_weights
from msc.pretrain.model.transformer import MSCTransformer

SMALL = 40_000  # bytes of a file, so that the small model takes several


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return SimpleNamespace(
        path=(path := tmp_path_factory.mktemp("runs") / "small"), models=fake_checkpoints.write_run(path, 3, "flat")
    )


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """One folder with a single file, one with several; not to be written to."""
    folder = tmp_path_factory.mktemp("exported")
    export(run.path, folder / "whole")
    export(run.path, folder / "split", "both", max_shard_size=SMALL)
    return folder


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, 3, 8, 12, generator=generator), torch.rand(2, 5, generator=generator)


def same(model, other):
    with torch.no_grad():
        return torch.equal(model(*inputs()), other(*inputs()))


# The same weights whatever the checkpoint ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "cut", "dtype", "limit"),
    [(1, "even", "fp32", 10**9), (4, "even", "fp32", SMALL), (3, "flat", "bf16", SMALL), (7, "flat", "fp16", 10**9)],
)
def test_every_checkpoint_gives_the_trained_weights(ranks, cut, dtype, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "PART", 1000)  # so that tensors are read and written in several parts
    models = fake_checkpoints.write_run(tmp_path / "run", ranks, cut, classes=3, text_width=5)
    told = export(tmp_path / "run", None, "both", dtype, limit)
    assert "parameters of step 40" in told
    assert ("outputs of the loaded model" in told) == (dtype == "fp32" and limit > SMALL)
    for which, model in models.items():
        files = sorted((tmp_path / "run" / "export").glob(f"{'model' if which == 'ema' else 'raw'}*.safetensors"))
        assert len(files) > 2 if limit == SMALL else len(files) == 1
        assert all(file.stat().st_size < limit + 10_000 for file in files)
        stored = {name: value for file in files for name, value in load_file(file).items()}
        expected = {name: value.to(exports.DTYPES[dtype]) for name, value in model.state_dict().items()}
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[name], expected[name]) for name in expected)
        loaded = MSCTransformer.from_pretrained(tmp_path / "run" / "export", which, torch.float32)
        assert same(loaded, fake_checkpoints.model_with(model, stored)) and not loaded.training


def test_never_more_than_a_part_of_a_tensor_is_read(run, tmp_path, monkeypatch):
    read, asked = checkpoint_format.ParameterReader.read, []

    def noting(self, name, key, start, numel):
        asked.append(numel)
        return read(self, name, key, start, numel)

    monkeypatch.setattr(checkpoint_format.ParameterReader, "read", noting)
    monkeypatch.setattr(exports, "PART", 1000)
    export(run.path, tmp_path / "out", max_shard_size=SMALL)
    numel = sum(p.numel() for p in run.models["ema"].parameters())
    assert max(asked) == 1000 and sum(asked) == 2 * numel, "once to write it, once to compare"


def test_files_are_split_as_hugging_face_splits_them(run, exported):
    hub_of = pytest.importorskip("huggingface_hub")
    theirs = hub_of.split_torch_state_dict_into_shards(run.models["ema"].state_dict(), max_shard_size=SMALL)
    index = json.loads((exported / "split" / "model.safetensors.index.json").read_text())
    assert index == {"metadata": theirs.metadata, "weight_map": theirs.tensor_to_filename}
    fresh = MSCTransformer(run.models["ema"].config)
    hub_of.load_torch_model(fresh, exported / "split")
    assert same(fresh, run.models["ema"])


def test_a_tensor_larger_than_a_file_is_alone():
    assert split({"a": 3, "b": 9, "c": 3, "d": 2, "e": 1}, 5) == [["a"], ["b"], ["c", "d"], ["e"]]


def test_what_is_loaded_is_chosen(run, exported):
    assert same(MSCTransformer.from_pretrained(exported / "split"), run.models["ema"])
    assert same(MSCTransformer.from_pretrained(exported / "split", "raw"), run.models["raw"])
    half = MSCTransformer.from_pretrained(str(exported / "whole"), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="holds ema weights, not 'raw'"):
        MSCTransformer.from_pretrained(exported / "whole", "raw")


def test_a_model_in_use_does_not_depend_on_its_files(run, exported, tmp_path):
    folder = shutil.copytree(exported / "whole", tmp_path / "copy")
    model = MSCTransformer.from_pretrained(folder)
    file = folder / "model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert same(model, run.models["ema"])


def test_nothing_of_the_model_is_left_out():
    """No weight of it is tied, frozen or a buffer: parameters by name are all there is."""
    for gate in ("none", "logits"):
        config, _ = fake_checkpoints.configured(width=64, gate=gate, classes=3, text_width=5)
        model = MSCTransformer(config.model)
        state = model.state_dict(keep_vars=True)
        assert len({id(value) for value in state.values()}) == len(state)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == state.keys()


@pytest.mark.parametrize("how", ["frozen", "tied"])
def test_a_checkpoint_that_lacks_a_weight_is_refused(how, tmp_path):
    fake_checkpoints.write_run(tmp_path / "run")
    config, _ = fake_checkpoints.configured()
    model = fake_checkpoints.random_model(config.model)
    if how == "frozen":
        model.noise.inner.weight.requires_grad_(False)
    else:
        model.blocks[1].feed_forward.up.weight = model.blocks[0].feed_forward.up.weight
    fake_checkpoints.write_checkpoint(tmp_path / "run", config, {"ema": model, "weight": model}, 1, "even", 50)
    name = "noise.inner.weight" if how == "frozen" else "blocks.1.feed_forward.up.weight"
    with pytest.raises(ValueError, match=rf"step-00000050 and .* do not hold the same tensors: {name}"):
        export(tmp_path / "run")


def test_another_checkpoint_than_the_newest(tmp_path):
    models = fake_checkpoints.write_run(tmp_path / "run", step=40)
    fake_checkpoints.write_run(tmp_path / "run", step=80)
    assert "step 40 " in export(tmp_path / "run", step="40")
    assert same(MSCTransformer.from_pretrained(tmp_path / "run" / "export"), models["ema"])
    with pytest.raises(ValueError, match="has those of steps: 40, 80"):
        export(tmp_path / "run", step="41")


# Trouble while exporting --------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    fake_checkpoints.write_run(tmp_path / "run", 2)
    file = checkpoint_directory.latest(tmp_path / "run") / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"rank-00001.*checksum.*--checkpoint"):
        export(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*export*"))


def test_what_fails_leaves_the_export_before_it(run, tmp_path, monkeypatch):
    path = shutil.copytree(run.path, tmp_path / "run")
    export(path, weights="raw")
    before = (path / "export" / "model.safetensors").read_bytes()
    monkeypatch.setattr(exports, "write_file", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        export(path)
    assert (path / "export" / "model.safetensors").read_bytes() == before
    assert [p.name for p in path.iterdir() if p.name.startswith(".")] == []


def test_a_file_that_is_not_what_was_written_is_noticed(run, tmp_path, monkeypatch):
    write = exports.write_file

    def faulty(path, *arguments):
        write(path, *arguments)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(exports, "write_file", faulty)
    with pytest.raises(RuntimeError, match="does not hold final.bias as the checkpoint does"):
        export(run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_too_large_for_fp16_are_named(tmp_path):
    config, _ = fake_checkpoints.configured()
    models = fake_checkpoints.write_run(tmp_path / "run")
    with torch.no_grad():
        models["ema"].embed.weight[0, 0] = 70_000.0
    fake_checkpoints.write_checkpoint(
        tmp_path / "run", config, {"ema": models["ema"], "weight": models["raw"]}, 1, "even", 60
    )
    with pytest.raises(ValueError, match=r"embed.weight holds values up to 7e\+04.*bf16"):
        export(tmp_path / "run", dtype="fp16")
    export(tmp_path / "run", dtype="bf16")


def test_a_full_disk_is_known_beforehand(run, tmp_path, monkeypatch):
    needed = 4 * sum(p.numel() for p in run.models["ema"].parameters())
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=rf"has 1\.0 kB free; the weights take {needed / 1e3:.1f} kB"):
        export(run.path, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    export(run.path, tmp_path / "out")


def test_checkpoints_rotate_while_one_is_exported(tmp_path, monkeypatch):
    """With checkpoint.keep = 1: the one that is read stays until the export is done, and goes with the next."""
    models, write = fake_checkpoints.write_run(tmp_path / "run", step=40), exports.write_weights

    def write_while_training_saves(*arguments):
        fake_checkpoints.write_run(tmp_path / "run", step=80)
        checkpoint_directory.prune(tmp_path / "run", 80, 1, 0)
        return write(*arguments)

    monkeypatch.setattr(exports, "write_weights", write_while_training_saves)
    assert "step 40 " in export(tmp_path / "run", tmp_path / "out")
    assert same(MSCTransformer.from_pretrained(tmp_path / "out"), models["ema"])
    checkpoint_directory.prune(tmp_path / "run", 80, 1, 0)
    assert [path.name for path in checkpoint_directory.list_checkpoints(tmp_path / "run")] == ["step-00000080"]


def test_a_checkpoint_that_is_pruned_just_before_it_is_read(tmp_path, monkeypatch):
    """`latest` named it a moment ago; the newer one is taken."""
    fake_checkpoints.write_run(tmp_path / "run", step=40)
    lock = checkpoint_directory.lock_for_reading

    def lock_after_training_saved(path):
        if path.name == "step-00000040":
            fake_checkpoints.write_run(tmp_path / "run", step=80)
            checkpoint_directory.prune(tmp_path / "run", 80, 1, 0)
        return lock(path)

    monkeypatch.setattr(checkpoint_directory, "lock_for_reading", lock_after_training_saved)
    assert "step 80 " in export(tmp_path / "run", tmp_path / "out")


# Folders that are not what they should be ---------------------------------------------------------------


class Bomb:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def config(change):
    return lambda folder: edit(folder / "config.json", lambda values: change(values["model"]))


def placed(change):
    return lambda folder: edit(folder / "model.safetensors.index.json", lambda values: change(values["weight_map"]))


def text(content):
    return lambda folder: (folder / "config.json").write_text(content)


def content(change):
    def do(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes(), folder / "boom"))

    return do


def rename_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["embed.weight"]
    save_file({**tensors, "embedding.weight": torch.zeros(3)}, folder / "model.safetensors")


def misplace(map):
    map["embed.weight"] = map["final.bias"]


# fmt: off
BAD = {  # what is done to a folder, and what is said of it
    "nothing there":      (shutil.rmtree, "has no config.json"),
    "someone else's":     (text('{"model_type": "bert"}'), "config.json is not one that `msc export` wrote"),
    "config cut short":   (text('{"model": {"wid'), "config.json is truncated"),
    "config not a table": (text("[1]"), "config.json is not a JSON object"),
    "no weights":         (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "truncated":          (content(lambda old, _: old[:-1000]), "model.safetensors is truncated or not a safetensors"),
    "empty":              (content(lambda *_: b""), "truncated or not a safetensors file"),
    "noise":              (content(lambda *_: b"noise" * 1000), "truncated or not a safetensors file"),
    "a pickle":           (content(lambda _, boom: pickle.dumps(Bomb(boom))), "model.safetensors is a pickle whatever"),
    "of torch.save":      (lambda f: torch.save(Bomb(f / "boom"), f / "model.safetensors"), "is a pickle whatever"),
    "another width":      (config(lambda m: m.update(width=64)),
                           r"not match its weights: embed.weight is \[32, 12\] there and \[64, 12\] by model.width"),
    "other names":        (rename_tensor, "embed.weight, which no file holds; embedding.weight, which the model"),
    "a gate of before":   (config(lambda m: m.update(gate="pair")), "model.gate is 'pair'; it must be one of none"),
    "unknown settings":   (config(lambda m: m.update(rings=3)), "config.json: unknown key model.rings"),
    "wrong types":        (config(lambda m: m.update(scales=[1, 2])), r"model.scales\[0\] must be a table"),
    "a part missing":     (lambda f: next(f.glob("model-00002*")).unlink(), "not hold a whole exported model: model-0"),
    "an index besides":   (lambda f: shutil.copy(next(f.glob("model-00001*")), f / "model.safetensors"),
                           "holds model.safetensors and model.safetensors.index.json, of two exports"),
    "an index of more":   (placed(lambda m: m.update(x="model-9.safetensors")), "model-9.safetensors is missing"),
    "an index misplaced": (placed(misplace), "index.json in .* does not match its files: embed.weight"),
    "an index elsewhere": (placed(lambda m: m.update(x="../x.safetensors")), "no weight_map of files beside it"),
}
# fmt: on


@pytest.mark.parametrize("what", BAD)
def test_a_bad_folder_is_a_clear_error_and_runs_nothing(what, exported, tmp_path):
    source = "split" if what.startswith(("a part", "an index")) else "whole"
    folder = shutil.copytree(exported / source, tmp_path / "bad")
    do, said = BAD[what]
    do(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        MSCTransformer.from_pretrained(folder)
    assert not list(tmp_path.rglob("boom"))


def test_the_pickles_of_these_tests_would_have_gone_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "boom")))
    assert (tmp_path / "boom").exists()


def test_an_export_of_another_format_is_refused(run, tmp_path):
    """Its weights have the same names and shapes, and would compute something else."""
    (tmp_path / "config.json").write_text(json.dumps({"weights": ["raw"], "model": run.models["raw"].config_dict()}))
    save_file(run.models["raw"].state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has export format 1, this version reads 2"):
        MSCTransformer.from_pretrained(tmp_path)


def test_a_header_may_begin_like_a_pickle(tmp_path):
    """The first byte of a safetensors file is of its header's length: no reason to refuse it."""
    shape = next(n for n in range(1, 500) if exported_weights.safetensors_header({"x" * n: (1,)})[0] == 0x80)
    path = tmp_path / "x.safetensors"
    path.write_bytes(exported_weights.safetensors_header({"x" * shape: (1,)}) + b"\0\0\0\0")
    with exported_weights.open_safetensors(path) as opened:
        assert list(opened.keys()) == ["x" * shape]


# What it says of itself ---------------------------------------------------------------------------------


def test_the_card_tells_the_facts_and_no_secrets(run, tmp_path):
    path = shutil.copytree(run.path, tmp_path / "first")
    text = (path / "config.yaml").read_text()
    secret = text.replace("tracking_uri: ''", "tracking_uri: https://inside.example").replace(
        "shards: ''", "shards: /home/me/private"
    )
    assert "inside.example" in secret and "private" in secret
    (path / "config.yaml").write_text(secret)
    write_evaluation(path / "evaluation.json", 40, path)
    export(path)
    written = {p.name: p.read_text(errors="replace") for p in (path / "export").iterdir()}
    assert written.keys() == {
        "config.json",
        "README.md",
        "model.safetensors",
        "model_index.json",
        "pipeline.py",
    }
    for text in written.values():
        assert not any(word in text for word in ("inside.example", "/home/me", str(tmp_path)))
    card = written["README.md"]
    for fact in ("| steps | 40 |", "| clips seen | 320 (the set holds 99) |", "16 × 24 pixels at 12 frames/s",
                 "`pixels`", "averaged (ema), in fp32", "The ema weights on 3 held-out clips",
                 "| continuations: PSNR, mean (dB) | sample | 3 ± 2.5 |", "| one clip | 2 |",
                 "width: 32", "Licence of the weights:** to be filled in"):  # fmt: skip
        assert fact in card, fact
    assert "other's" not in card
    facts = json.loads(written["config.json"])
    assert facts["weights"] == ["ema"] and facts["training"]["step"] == 40 and facts["data"]["fps"] == 12.0


def write_evaluation(path, step, against, weights="ema"):
    """As `msc evaluate` does: a table that its code makes of what clips add."""
    values = torch.tensor([[2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])
    clips = {"sample": with_total(values), "other's sample": with_total(values), "one clip": with_total(values[:1])}
    rows = with_differences({("psnr_by_horizon", name): part for name, part in clips.items()})
    assert ("psnr_by_horizon", "sample - other's") in rows
    result = {
        "step": step, "weights": weights, "clips": 3, "against": {"run": str(against), "step": 40},
        "tables": {"psnr_by_horizon": table_of("psnr_by_horizon", rows).json()},
    }  # fmt: skip
    path.write_text(json.dumps(result))


def test_a_card_tells_what_was_measured_of_its_own_weights_only(run, exported, tmp_path):
    assert "## Measured\n\nNothing yet." in (exported / "whole" / "README.md").read_text()
    path = shutil.copytree(run.path, tmp_path / "run")
    card = path / "export" / "README.md"
    write_evaluation(path / "evaluation.json", 80, path)  # of a step that came later
    write_evaluation(path / "evaluation-00000040.json", 40, path, "raw")
    export(path)
    assert "Nothing yet." in card.read_text()
    export(path, weights="both")
    assert card.read_text().count("on 3 held-out clips") == 1 and "The raw weights on 3" in card.read_text()


def test_a_card_that_somebody_edited_is_kept(run, tmp_path):
    path = shutil.copytree(run.path, tmp_path / "run")
    card = path / "export" / "README.md"
    export(path)
    first = card.read_bytes()
    assert "kept" not in export(path, dtype="bf16")
    assert card.read_bytes() != first, "a card that nobody edited is renewed"
    card.write_bytes(first.replace(b"# license: ...", b"license: mit"))
    assert "README.md was edited and is kept" in export(path)
    assert b"license: mit" in card.read_bytes() and (path / "export" / "model.safetensors").is_file()


class Api:
    """Stands in for huggingface_hub's."""

    calls: list = []  # noqa: RUF012
    failure: Exception | None = None

    def create_repo(self, repo, **options):
        self.calls.append(("create", repo, options))

    def file_exists(self, repo, name):
        return "card" in repo

    def upload_folder(self, **options):
        if self.failure is not None:
            raise self.failure
        self.calls.append(("upload", options))
        return "https://hub/me/first"


def test_upload_makes_a_private_repository_and_sends_the_folder(run, tmp_path, monkeypatch):
    hugging = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hugging, "HfApi", Api)
    monkeypatch.setattr(Api, "calls", [])
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    told = export(run.path, tmp_path / "out", push_to="me/first")
    assert "uploaded to me/first: https://hub/me/first" in told and "hf_secret" not in told
    assert Api.calls == [
        ("create", "me/first", {"private": True, "exist_ok": True}),
        ("upload", {"repo_id": "me/first", "folder_path": tmp_path / "out", "commit_message": "msc export of step 40",
                    "delete_patterns": model_card.OWN_WEIGHTS, "ignore_patterns": None}),
    ]  # fmt: skip
    assert "its README.md was not changed" in model_card.push(tmp_path / "out", "me/card", "x")
    assert Api.calls[-1][1]["ignore_patterns"] == ["README.md"]
    assert not [p for p in (tmp_path / "out").iterdir() if b"hf_secret" in p.read_bytes()]
    monkeypatch.setattr(Api, "failure", ConnectionError("no route to host"))
    with pytest.raises(ValueError, match=r"out2 is written, but not uploaded to me/first: no route to host"):
        export(run.path, tmp_path / "out2", push_to="me/first")
    assert (tmp_path / "out2" / "model.safetensors").is_file()


@pytest.mark.parametrize("repository", [None, "me/first"])
def test_the_lines_of_a_card_load_the_weights(run, tmp_path, monkeypatch, repository):
    """From the folder in which the card lies, and from the Hub, of which only the download is left out."""
    hugging = pytest.importorskip("huggingface_hub")
    downloaded = []
    monkeypatch.setattr(hugging, "HfApi", Api)
    monkeypatch.setattr(hugging, "snapshot_download", lambda name: downloaded.append(name) or str(tmp_path / "out"))
    export(run.path, tmp_path / "out", push_to=repository)
    card = (tmp_path / "out" / "README.md").read_text()
    where, model, pipeline = (part.partition("```")[0] for part in card.split("```python\n")[1:])
    if not repository:
        monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    exec(where + model, names)
    assert isinstance(names["model"], MSCTransformer) and downloaded == ([repository] if repository else [])
    assert "from_pretrained(folder, trust_remote_code=True)" in pipeline


def test_an_upload_removes_the_weights_of_other_exports_and_nothing_else(exported):
    utils = pytest.importorskip("huggingface_hub.utils")
    own = [path.name for kind in ("whole", "split") for path in (exported / kind).glob("*.safetensors*")]
    assert "model.safetensors" in own and "raw.safetensors.index.json" in own
    others = ["adapter.safetensors", "vae/model.safetensors", "README.md", "config.json"]
    assert list(utils.filter_repo_objects(own + others, allow_patterns=model_card.OWN_WEIGHTS)) == own


def test_upload_says_when_there_is_no_network(tmp_path, monkeypatch):
    hugging = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hugging, "HfApi", partial(hugging.HfApi, endpoint="http://127.0.0.1:9"))
    with pytest.raises(ValueError, match="is written, but not uploaded to me/first: .*refused"):
        model_card.push(tmp_path, "me/first", "x")


def test_upload_says_when_the_name_is_no_repository(tmp_path):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(ValueError, match="not uploaded to a/b/c"):
        model_card.push(tmp_path, "a/b/c", "x")  # refused before anything is sent
