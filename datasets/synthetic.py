"""Made-up videos with known properties, as pure functions of a seed; for tests and first trials."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .files import write_atomically
from .maze import ACTIONS, TURNS, ray_cast_maze
from .signal_files import POSITION, QUATERNION
from .video import encode_mp4


def gaussian_fields(
    seed: int,
    clips: int,
    frames: int,
    height: int,
    width: int,
    channels: int = 1,
    beta: float = 2.0,
    speed: float = 1.0,
) -> Tensor:
    """Translating periodic Gaussian fields, float32 [N, T, C, H, W], mean 0 and variance 1 in expectation.

    The power spectrum falls as 1/f^beta (0: white noise, 2: like natural pictures). Each clip moves at
    `speed` pixels per frame in a direction of its own; fractions of a pixel are exact (Fourier shift).
    """
    source = torch.Generator().manual_seed(seed)
    fy = torch.fft.fftfreq(height)[:, None]
    fx = torch.fft.rfftfreq(width)[None, :]
    amplitude = (fy**2 + fx**2).clamp_min((1 / max(height, width)) ** 2) ** (-beta / 4)
    amplitude[0, 0] = 0  # no mean
    full = torch.cat([amplitude, amplitude[:, 1 : (width + 1) // 2]], dim=1)  # the half that rfft leaves out
    amplitude = amplitude / full.square().mean().sqrt()
    spectrum = torch.fft.rfft2(torch.randn(clips, 1, channels, height, width, generator=source)) * amplitude
    angle = 2 * math.pi * torch.rand(clips, generator=source)
    time = torch.arange(frames).view(1, frames, 1, 1, 1)
    dy, dx = ((speed * f(angle)).view(clips, 1, 1, 1, 1) * time for f in (torch.sin, torch.cos))
    shift = torch.exp(-2j * math.pi * (fy * dy + fx * dx))
    return torch.fft.irfft2(spectrum * shift, s=(height, width))


def turning_camera(
    seed: int, clips: int, frames: int, height: int, width: int, speed: int = 3, turn: int = 24, beta: float = 2.0
) -> Tensor:
    """A camera that turns around itself, float32 [N, T, 1, H, W], mean 0 and variance 1 in expectation.

    It looks at a round panorama of `turn · speed` columns, `speed` columns further in every frame: frame u shows
    what frame `u - turn` showed. The columns that enter on the right cannot be told from the frames just before
    (unless `turn · speed` is hardly wider than a frame), only from one full turn ago.
    """
    around = turn * speed
    panorama = gaussian_fields(seed, clips, 1, height, around, 1, beta)[:, 0]
    columns = (torch.arange(frames)[:, None] * speed + torch.arange(width)) % around
    return panorama[..., columns].permute(0, 3, 1, 2, 4)  # N 1 H T W -> N T 1 H W


def curtains(
    seed: int, clips: int, frames: int, height: int, width: int, shown: int = 2, hidden: int = 16, beta: float = 2.0
) -> Tensor:
    """A still picture that hides and returns, float32 [N, T, 1, H, W]; mean 0, and variance 1 while it is shown.

    A 1/f^beta field is seen for `shown` frames, then a plain curtain (0) for `hidden` frames, and so on. The first
    frame of a return cannot be told from the `hidden` frames before it.
    """
    picture = gaussian_fields(seed, clips, 1, height, width, 1, beta)
    is_shown = torch.arange(frames) % (shown + hidden) < shown
    return picture * is_shown.view(1, frames, 1, 1, 1)


def moving_textures(seed: int, clips: int, frames: int, height: int, width: int, shapes: int = 3) -> Tensor:
    """Textured discs over a 1/f background, uint8 [N, T, 3, H, W].

    Background and discs move each at a speed of their own. The first disc crosses behind an upright bar wide
    enough to hide it for about a third of the clip: only what was seen long before tells how it comes out.
    """
    source = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=source)

    background = gaussian_fields(seed + 1, clips, frames, height, width, 3, speed=0.3)
    texture = gaussian_fields(seed + 2, clips * shapes, 1, height, width, 3, beta=1.5)
    texture = texture.view(clips, shapes, 3, height, width)
    colour = uniform(-1.5, 1.5, clips, shapes, 3, 1, 1)
    side = min(height, width)
    radius = side * uniform(0.10, 0.16, clips, shapes)
    y0, x0 = uniform(0.2, 0.8, clips, shapes) * height, uniform(0.0, 1.0, clips, shapes) * width
    vy, vx = (uniform(-0.5, 0.5, clips, shapes) * side / frames for _ in range(2))
    # The first disc crosses the picture once, at a constant height, behind the bar.
    x0[:, 0], vx[:, 0], vy[:, 0] = 0.0, width / max(1, frames - 1), 0.0
    bar = width / 3 / 2 + radius[:, 0]  # half the width: hidden for a third of the way
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width).view(1, -1)
    video = 0.6 * background
    for frame in range(frames):
        for shape in reversed(range(shapes)):  # the first disc is drawn last, then the bar
            cy = (y0[:, shape] + vy[:, shape] * frame) % height
            cx = x0[:, shape] + vx[:, shape] * frame
            cx = cx if shape == 0 else cx % width
            inside = (rows - cy.view(-1, 1, 1)) ** 2 + (columns - cx.view(-1, 1, 1)) ** 2
            inside = (inside < radius[:, shape].view(-1, 1, 1) ** 2)[:, None]
            # The texture moves with its disc, whole pixels at a time.
            y, x = (rows - cy.int().view(-1, 1, 1)) % height, (columns - cx.int().view(-1, 1, 1)) % width
            at = (y * width + x).view(clips, 1, -1).expand(-1, 3, -1)
            moved = texture[:, shape].flatten(2).gather(2, at.long()).view(clips, 3, height, width)
            video[:, frame] = torch.where(inside, colour[:, shape] + 0.5 * moved, video[:, frame])
        hidden = ((columns - width / 2).abs() < bar.view(-1, 1, 1))[:, None]
        video[:, frame] = torch.where(hidden.expand(-1, 3, height, -1), torch.tensor(-0.8), video[:, frame])
    return (127.5 + 60 * video).round().clamp(0, 255).to(torch.uint8)


MOVES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows and columns of a dot's step


def steered_dots(
    seed: int, clips: int, frames: int, height: int, width: int, speed: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """A bright dot that actions steer over a dark picture without edges: video, uint8 [N, T, 3, H, W]; actions, numbers
    in MOVES, int64 [N, T]; and the dot's centre, row and column, int64 [N, T, 2].

    The action of a frame leads to it: by `speed` pixels from where the dot was a frame before. Actions are held for
    some frames, at random.
    """
    source = torch.Generator().manual_seed(seed)
    actions = torch.randint(len(MOVES), (clips, frames), generator=source)
    held = torch.rand(clips, frames, generator=source) < 0.75
    for frame in range(1, frames):
        actions[:, frame] = torch.where(held[:, frame], actions[:, frame - 1], actions[:, frame])
    size = torch.tensor([height, width])
    first = (torch.rand(clips, 1, 2, generator=source) * size).long()
    steps = speed * torch.tensor(list(MOVES.values()))[actions]
    steps[:, 0] = 0
    centre = (first + steps.cumsum(1)) % size
    rows = (torch.arange(height).view(-1, 1) - centre[..., :1, None] + height // 2) % height - height // 2
    columns = (torch.arange(width) - centre[..., 1:, None] + width // 2) % width - width // 2
    distance = (rows.square() + columns.square()).sqrt()
    light = (max(2.0, min(height, width) / 10) + 0.5 - distance).clamp(0, 1)  # the edge is smooth
    colour = torch.tensor([255.0, 200.0, 60.0]).view(3, 1, 1)
    video = 24 + light[:, :, None] * (colour - 24)
    return video.round().to(torch.uint8), actions, centre


def write_steered_dots(
    folder: str | Path, seed: int, clips: int, frames: int, height: int, width: int, fps: float = 12.0, speed: int = 2
) -> list[Path]:
    """Write `steered_dots` as `dot-000.mp4` with `dot-000.actions.csv`, and so on; the paths of the videos."""
    videos, actions, _ = steered_dots(seed, clips, frames, height, width, speed)
    names = list(MOVES)
    signals = ({"actions": (("action",), [[names[x]] for x in own])} for own in actions.tolist())
    return _write(folder, "dot", videos, fps, signals)


def write_mazes(
    folder: str | Path, seed: int, clips: int, frames: int, height: int, width: int, fps: float = 12.0,
    size: int = 9, out_and_back: float = 0.5,
) -> list[Path]:  # fmt: skip
    """Write walks through mazes (maze.py) as `maze-000.mp4` with `maze-000.actions.csv` and `maze-000.pose.csv` (x
    forward, z up), and so on; the paths of the videos."""
    walks = ray_cast_maze(seed, clips, frames, height, width, size, out_and_back)
    half = walks.headings.double() * (math.pi / TURNS)
    zero = torch.zeros_like(half)
    poses = torch.stack((*walks.positions.unbind(-1), zero, zero, zero, half.sin(), half.cos()), -1)
    signals = (
        {"actions": (("action",), [[ACTIONS[x]] for x in own]), "pose": ((*POSITION, *QUATERNION), pose)}
        for own, pose in zip(walks.actions.tolist(), poses.tolist(), strict=True)
    )
    return _write(folder, "maze", walks.video, fps, signals)


def write_videos(
    folder: str | Path, seed: int, clips: int, frames: int, height: int, width: int, fps: float = 12.0
) -> list[Path]:
    """Write `moving_textures` as `synthetic-000.mp4` and so on into `folder`; the paths written."""
    return _write(folder, "synthetic", moving_textures(seed, clips, frames, height, width), fps)


def _write(
    folder: str | Path, name: str, videos: Tensor, fps: float,
    signals: Iterable[Mapping[str, tuple[Sequence[str], Sequence[Sequence[object]]]]] = (),
) -> list[Path]:  # fmt: skip
    """Write videos, and for each its signals by name: the header and the rows of a file beside it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-{i:03d}.mp4" for i in range(len(videos))]
    for path, video in zip(paths, videos, strict=True):
        write_atomically(path, encode_mp4(video, fps))
    for path, own in zip(paths, signals, strict=False):
        for signal, (header, rows) in own.items():
            lines = [",".join(map(str, row)) for row in (header, *rows)]
            write_atomically(path.with_suffix(f".{signal}.csv"), "\n".join([*lines, ""]).encode())
    return paths
