"""TrainRequest: what one `msc train` is to do, whether it comes from a command line, a job or a sweep."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msc.pretrain.run_folder import RunFolder

if TYPE_CHECKING:
    from msc.pretrain.config import Config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainRequest:
    """The options of `msc train`. config: YAML file. overrides: `section.key=value` settings that go over it.

    rollback: step or folder of a checkpoint to go back to; again: even if the run did so before. plan: file of `msc
    plan --json`. processes: ranks to start (None: one per GPU).
    """

    run: Path
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    preset: str | None = None
    resume: bool = False
    rollback: str | None = None
    again: bool = False
    plan: Path | None = None
    processes: int | None = None

    def __post_init__(self) -> None:
        if self.again and self.rollback is None:
            raise ValueError("--again goes back once more to the checkpoint of --rollback: name it with --rollback N")

    @classmethod
    def from_items(
        cls, items: Iterable[str], run: Path | None = None, preset: str | None = None, **options: Any
    ) -> TrainRequest:
        """The request of a command line, whose run folder defaults to runs/ and the name of the file or preset: the
        same in every rank, so nothing random and no time of day."""
        config, overrides = split_items(items)
        name = config.stem if config is not None else preset
        if run is None and name is None:
            raise ValueError("nothing to train: name a configuration file, --preset NAME, or --resume --run DIR")
        return cls(run or Path("runs") / str(name), config, overrides, preset, **options)

    @property
    def resumes(self) -> bool:
        return self.resume or self.rollback is not None

    def command_line(self) -> list[str]:
        """The arguments of `msc` that ask for the same."""
        names = ("preset", "rollback", "plan", "processes")
        options = [(f"--{name}", str(value)) for name in names if (value := getattr(self, name)) is not None]
        switches = [f"--{name}" for name in ("resume", "again") if getattr(self, name)]
        config = [str(self.config)] if self.config else []
        return ["train", *switches, "--run", str(self.run), *chain(*options), *config, *self.overrides]

    def resolve(self) -> Config:
        """The configuration, not yet checked against its shards; of a run that resumes its own, if no other is named.
        ValueError or FileNotFoundError if there is no such checkpoint, file or setting."""
        if self.rollback is not None and "RANK" not in os.environ:  # whether the run has done so, rank 0 decides
            from msc.pretrain.checkpoints import directory, rollback

            if self.again or not rollback.is_already_rolled_back(
                self.run, self.rollback
            ):  # it may have been pruned since
                directory.find(self.run, self.rollback)
        from msc.pretrain.config import load
        from msc.pretrain.presets import preset

        base, config = preset(self.preset) if self.preset else None, self.config
        if self.resumes and config is None and base is None:
            config = RunFolder(self.run).config
            if not config.is_file():
                from msc.pretrain.checkpoints.directory import newest_meta

                if (meta := newest_meta(self.run)) is None:
                    raise FileNotFoundError(f"cannot resume: there is no {config}; name the run folder with --run")
                from msc.pretrain.config import from_flat

                log.warning("there is no %s: resuming with the configuration of the checkpoint of step %d", config,
                            meta.step)  # fmt: skip
                base, config = from_flat(meta.config, f"the checkpoint of step {meta.step}"), None
        return load(base, config, list(self.overrides))


def split_items(items: Iterable[str]) -> tuple[Path | None, tuple[str, ...]]:
    """Positional arguments as (the configuration file, `section.key=value` settings)."""
    items = list(items)
    files = [item for item in items if "=" not in item]
    if len(files) > 1:
        raise ValueError(f"{files[0]} and {files[1]}: one configuration file at most, settings are section.key=value")
    return (Path(files[0]) if files else None), tuple(item for item in items if "=" in item)
