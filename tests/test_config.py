"""Strict, layered configuration."""

from __future__ import annotations

import pytest

from msc.pretrain.config import Config, dump, flat, load
from msc.pretrain.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_dump_and_load_are_inverse(name, tmp_path):
    config = preset(name)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(file=tmp_path / "config.yaml") == config


def test_later_layers_win(tmp_path):
    (tmp_path / "my.yaml").write_text("optimizer: {lr: 0.5, warmup: 7}\n")
    config = load(preset("demo"), tmp_path / "my.yaml", ["optimizer.lr=1e-4", "model.scales=[{heads: 4, window: 1}]"])
    assert (config.optimizer.lr, config.optimizer.warmup, config.model.width) == (1e-4, 7, 128)
    assert config.model.scales[0].window == 1


def test_shards_are_a_folder_or_a_list_with_weights(tmp_path):
    assert [shard_set.path for shard_set in load(overrides=["data.shards=/a"]).data.sets] == ["/a"]
    config = load(overrides=["data.shards=[{path: /a, weight: 3}, {path: 'https://h/b'}]"])
    assert [(shard_set.path, shard_set.weight) for shard_set in config.data.sets] == [("/a", 3.0), ("https://h/b", 1.0)]
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(file=tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optimiser.lr=1"], "unknown key optimiser; did you mean optimizer"),
        (["optimizer.learning_rate=1"], "unknown key optimizer.learning_rate"),
        (["train.sed=1"], "did you mean train.seed"),
        (["optimizer=3"], "optimizer must be a table"),
        (["train.batch"], "section.key=value"),
        (["train.batch=0"], "train.batch is 0"),
        (["model.scales=[{heads: 0}]"], "heads is 0"),
        (["model.width=100", "model.scales=[{heads: 3}]"], "100 does not divide"),
        (["data.shards=[{path: a, weight: 0}]"], "the weight of a is 0.0, it must be positive"),
        (
            ["data.shards=[{path: a, wieght: 2}]"],
            r"unknown key data.shards\[0\].wieght; did you mean data.shards\[0\].weight",
        ),
        (["data.shards=[{weight: 2}]"], r"data.shards\[0\].path is missing"),
        (["data.commands=[rm]"], "data.commands has 'rm'"),
        (["optimizer.lr=.nan"], "optimizer.lr"),
        (["optimizer.betas=[1.0, 0.9]"], "optimizer.betas"),
        (["optimizer.eps=-1"], "optimizer.eps"),
        (["optimizer.weight_decay=.inf"], "optimizer.weight_decay"),
        (["train.seed=18446744073709551616"], "train.seed is 18446744073709551616"),
        (["parallel.timeout=.inf"], "parallel.timeout is inf"),
        (["parallel.zero.stage=4"], "parallel.zero.stage is 4; it must be one of 0, 1, 2, 3"),
    ],
)
def test_errors_name_key_and_value(overrides, message):
    with pytest.raises(ValueError, match=message):
        load(preset("demo"), overrides=overrides)


def test_an_unknown_preset_lists_the_valid_ones():
    with pytest.raises(ValueError, match="unknown preset 'huge'.*demo"):
        preset("huge")


def test_flat_names_every_leaf():
    assert flat(Config())["parallel.zero.stage"] == Config().parallel.zero.stage
