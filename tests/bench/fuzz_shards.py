"""Coverage-guided fuzzing of everything that reads a shard or an index: `pip install atheris`, then

    python tests/bench/fuzz_shards.py [FOLDER] [-max_total_time=600] [other options of libFuzzer]

Whatever the bytes are, the answer must be a result or a ValueError that says what is wrong; any other exception, a
time-out or memory without bound is a finding, and its input is kept. The first byte chooses what is fuzzed: a tar as it
is; one whose header checksums are put right, so that what lies behind them is reached; an index as it is; a good index
with some of its values replaced. FOLDER keeps inputs that reach new code.
"""

import json
import os
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["msc.datasets"]):
    from msc.datasets.loading.mixture import Shards, ShardSet, batches_per_round
    from msc.datasets.loading.shard_reader import ShardReader
    from msc.datasets.prepare.summary import describe
    from msc.datasets.shards.index import ShardInfo, parse_index, scan, write_index, write_shard
    from msc.datasets.statistics import mix_statistics

import torch
from safetensors.torch import save

from msc.datasets.shards.index import Index
from msc.datasets.statistics import Statistics
from msc.pretrain.model.noise_gate import gate_constants
from msc.pretrain.model.scales import Scale

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
TAR = FOLDER / "train-000000.tar"
SCALES = (Scale(2, 1, 1, 2, 16), Scale(1, 2, 1, 8), Scale(1, 4, 4, None))


def good_shard() -> bytes:
    latent = save({"latent": torch.zeros(4, 3, 2, 2, dtype=torch.float16)})
    text = save({"text": torch.zeros(2, 5, dtype=torch.float16)})
    parts = {"json": json.dumps({"label": 1}).encode(), "latent.safetensors": latent, "text.safetensors": text}
    write_shard(TAR, [(f"clip-{i}", parts) for i in range(2)])
    return TAR.read_bytes()


def good_index(size: int) -> Index:
    shards = [ShardInfo("train-000000.tar", 2, size, "0" * 64)]
    return Index(
        store="latent", autoencoder="pixels", temporal_factor=1, channels=3, frames=4, height=2, width=2,
        video_frames=4, video_height=2, video_width=2, fps=12.0, splits={"train": shards, "held_out": []},
        statistics=Statistics.default(3), settings={}, has_text=5, classes=3,
    )  # fmt: skip


SHARD = good_shard()
INDEX = good_index(len(SHARD))
write_index(FOLDER, INDEX)
FIELDS = json.loads((FOLDER / "index.json").read_text())


def repaired(content: bytes) -> bytes:
    """With right checksums in the headers that a reader would come to."""
    made, offset = bytearray(content), 0
    while offset + 512 <= len(made):
        made[offset + 148 : offset + 156] = b" " * 8
        made[offset + 148 : offset + 156] = b"%06o\0 " % sum(made[offset : offset + 512])
        try:
            size = int(bytes(made[offset + 124 : offset + 136]).split(b"\0")[0] or b"0", 8)
        except ValueError:
            break
        offset += 512 + -(-max(0, size) // 512) * 512
    return bytes(made)


def read_shard(content: bytes) -> None:
    TAR.write_bytes(content)
    for sample in scan(TAR):
        assert sample.parts
        assert all(0 <= offset <= offset + size <= len(content) for offset, size in sample.parts.values())
        assert ".." not in sample.key.split("/") and not sample.key.startswith("/")
    for frames in (None, (1, 3)):
        samples = ShardReader(FOLDER, INDEX, "train", frames)
        for number in range(2):
            try:
                _, media, text, label, _ = samples.read(number)
            except ValueError:
                continue
            assert media.shape == (4 if frames is None else 2, 3, 2, 2)
            assert text is not None and text.shape[1] == 5
            assert label in (0, 1, 2)


def read_index(content: bytes) -> None:
    index = parse_index(content, "index.json")
    assert all("/" not in shard.name for shards in index.splits.values() for shard in shards)
    found = index.statistics
    describe(FOLDER, index)
    gate_constants(SCALES, 2, mix_statistics([(1.0, found), (2.0, found)]))
    batches_per_round(Shards((ShardSet(FOLDER, index),)), "train", 1)


def changed(data: bytes) -> bytes:
    """The good index with up to four of its values replaced by whatever JSON the data holds."""
    source, fields = atheris.FuzzedDataProvider(data), json.loads(json.dumps(FIELDS))
    for _ in range(source.ConsumeIntInRange(1, 4)):
        place, key = fields, source.PickValueInList(sorted(fields))
        while isinstance(place[key], dict | list) and place[key] and source.ConsumeBool():
            place = place[key]
            key = source.PickValueInList(sorted(place) if isinstance(place, dict) else list(range(len(place))))
        text = source.ConsumeUnicodeNoSurrogates(source.ConsumeIntInRange(0, 40))
        kind = source.ConsumeIntInRange(0, 5)
        if kind == 0:
            place[key] = source.ConsumeIntInRange(-(1 << 62), 1 << 62)
        elif kind == 1:
            place[key] = source.ConsumeFloat()
        elif kind == 2:
            place[key] = text
        elif kind == 3:
            place[key] = source.PickValueInList([None, True, [], {}, [[]], 0, 1, -1, "", 1e308, [1, 2], {"": 0}])
        elif kind == 4 and isinstance(place, dict):
            del place[key]
        else:
            place[text if isinstance(place, dict) else key] = source.ConsumeIntListInRange(4, -2, 9)
        if not fields:
            break
    return json.dumps(fields).encode()


def one(data: bytes) -> None:
    kind, rest = data[0] % 4 if data else 0, data[1:]
    try:
        if kind < 2:
            read_shard(repaired(rest) if kind else rest)
        else:
            read_index(changed(rest) if kind == 3 else rest)
    except ValueError:
        pass


def main() -> None:
    corpus = Path(sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else FOLDER / "corpus")
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = [b"\0" + SHARD, b"\1" + SHARD, b"\2" + json.dumps(FIELDS).encode(), b"\3" + bytes(range(64))]
    seeds.append(b"\1" + struct.pack("<Q", 1 << 60) + SHARD[8:])
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [option for option in sys.argv[1:] if option.startswith("-")]
    defaults = ["-max_total_time=600", "-max_len=16384", "-rss_limit_mb=3000", "-timeout=20"]
    defaults = [x for x in defaults if not any(option.startswith(x.split("=")[0] + "=") for option in options)]
    atheris.Setup([sys.argv[0], str(corpus), *defaults, *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    os.chdir(FOLDER)  # where findings are kept
    print(f"findings are kept in {FOLDER}", file=sys.stderr)
    main()
