"""Requests: the options of `msc sample`, `msc play` and `msc evaluate` as dataclasses, named as the flags.

Imports no torch, so that a command line can be read and checked without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Solver = Literal["euler", "heun"]
Weights = Literal["ema", "raw"]  # averaged, or as trained last


@dataclass(frozen=True)
class SampleConfig:
    """What to generate, and after which context.

    video, clip, nothing: continue a video file or a held-out clip, or start without context; without any of them, of
        prompts and of labels, held-out clip 0.
    prompt, prompts, label: a video for each, or `count` in all that take turns. prompts: a text file of one per line.
    text: folder of the text encoder (default: the one that the shards were made with).
    signal: of the new units, `NAME=FILE` or `NAME=VALUE:UNITS,...` each (default: those of the clip that is continued,
        as far as it has them); signal_guidance: `NAME=SCALE` each.
    units, context: units to generate and units of context (default: half a training clip, and what completes it).
    batch: videos generated at once. out: folder (default: samples/ in the run).
    steps, solver, guidance, context_level: see `sampler.Sampling`. reach: units a query sees back at most (None: all).
    """

    video: Path | None = None
    clip: int | None = None
    nothing: bool = False
    prompt: tuple[str, ...] = ()
    prompts: Path | None = None
    text: Path | None = None
    label: tuple[str, ...] = ()
    signal: tuple[str, ...] = ()
    signal_guidance: tuple[str, ...] = ()
    count: int | None = None
    batch: int = 1
    units: int | None = None
    context: int | None = None
    context_level: float = 0.0
    reach: int | None = None
    steps: int = 16
    solver: Solver = "euler"
    guidance: float = 1.0
    seed: int = 0
    out: Path | None = None
    weights: Weights = "ema"

    def __post_init__(self) -> None:
        if sum((self.video is not None, self.clip is not None, self.nothing)) > 1:
            raise ValueError("--video, --clip and --nothing exclude each other: give one of them")
        if self.nothing and self.context:
            raise ValueError(f"--nothing starts without context, but --context is {self.context}")
        if self.prompts is not None and self.prompt:
            raise ValueError("--prompts names a file, --prompt is one itself: give one of them")
        if self.video is not None and not self.video.is_file():
            raise FileNotFoundError(f"{self.video} does not exist: --video names a video file")

    @property
    def context_clip(self) -> int | None:
        """The held-out clip to continue: clip 0 where neither a start nor a condition is given."""
        conditioned = self.nothing or self.prompt or self.prompts or self.label or self.video is not None
        return 0 if self.clip is None and not conditioned else self.clip

    def read_prompts(self) -> tuple[str, ...]:
        """The prompts given, or the lines of the file of prompts without empty ones."""
        if self.prompts is None:
            return self.prompt
        try:
            lines = self.prompts.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.prompts} is not a text file in UTF-8: {error}") from None
        if not (texts := tuple(line.strip() for line in lines if line.strip())):
            raise ValueError(f"{self.prompts} holds no prompt: write one in every line")
        return texts


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure of a run.

    clips: at most so many held-out clips. steps, samples: of the roll-outs that continue clips from half of them.
    checkpoint: a step or a folder (default: the newest). against: another run, measured on the same clips with the same
    noise. features: file of a network for Fréchet distances; it is a program and is run (see `frechet.open_features`).
    """

    clips: int = 64
    steps: int = 16
    samples: int = 4
    weights: Weights = "ema"
    checkpoint: str | None = None
    against: Path | None = None
    features: Path | None = None


@dataclass(frozen=True)
class PlayConfig:
    """What to play, and where to serve it.

    clip, nothing: start from a held-out clip (default: clip 0) or without context. context: units of the clip to start
    from (default: half). reach: units a query sees back at most (default: a training clip, so that memory is bounded).
    steps, seed, context_level: see `sampler.Sampling`. host: to listen on; anyone who reaches it and knows the token
    may play. token: of the address (default: a random one).
    """

    clip: int | None = None
    nothing: bool = False
    context: int | None = None
    reach: int | None = None
    steps: int = 8
    seed: int = 0
    context_level: float = 0.0
    weights: Weights = "ema"
    host: str = "127.0.0.1"
    port: int = 8765
    token: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"--port is {self.port}; it must be from 0 to 65535")
