"""Ray-cast mazes: made-up worlds seen by a walker, with the actions that steer the camera and its pose.

Unlimited data with a known answer: what an action does to the picture, and what a place seen long ago looks like when
the walker comes back. A pure function of a seed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

STAY, LEFT, RIGHT, FORWARD, BACK = range(5)
ACTIONS = ("stay", "left", "right", "forward", "back")
INVERSE = (STAY, RIGHT, LEFT, BACK, FORWARD)
TURNS = 24  # headings, 15° apart
STEP = 0.25  # cells a step forward or back goes
MARGIN = 0.2  # cells that the walker keeps from walls
FIELD_OF_VIEW = math.pi / 2


class Walks(NamedTuple):
    """Clips of walks. The action of a frame leads to it from the frame before; the first frame's is STAY."""

    video: Tensor  # uint8 [N, T, 3, H, W]
    actions: Tensor  # int64 [N, T]
    positions: Tensor  # float64 [N, T, 2], x and y in cells
    headings: Tensor  # int64 [N, T], in turns of 15°, from +x to +y


def ray_cast_maze(
    seed: int,
    clips: int,
    frames: int,
    height: int,
    width: int,
    size: int = 9,
    out_and_back: float = 0.5,
    mazes: int | None = None,
    texels: int = 8,
) -> Walks:
    """Walks through mazes of `size × size` cells, so many of them in turn (None: one for every clip).

    Every wall has a colour and a texture of its own, so that a picture tells the place. texels: of a wall's side, 1 for
    plain walls. out_and_back: share of the walks that turn
    round in the middle and come back by the inverse actions; their frame T-1-k shows what frame k did.
    """
    if size < 5 or size % 2 == 0:
        raise ValueError(f"the maze's size is {size}; it must be odd and at least 5, as every other cell may be a wall")
    source = torch.Generator().manual_seed(seed)
    mazes = mazes or clips
    own = torch.arange(clips) % mazes
    walls = torch.stack([_maze(size, source) for _ in range(mazes)])[own]
    textures = torch.rand(mazes, size * size, texels, texels, 3, generator=source)
    tints = 0.25 + 0.75 * torch.rand(mazes, size * size, 1, 1, 3, generator=source)
    textures = ((0.4 + 0.6 * textures) * tints)[own]
    positions, headings, actions = _walk(walls, frames, source)
    back = torch.rand(clips, generator=source) < out_and_back
    actions[back], positions[back], headings[back] = _turned_back(actions[back], positions[back], headings[back])
    video = torch.stack([
        render(walls[i], textures[i], positions[i], headings[i], height, width)
        for i in range(clips)
    ])  # fmt: skip
    return Walks(video, actions, positions, headings)


def _maze(size: int, source: torch.Generator) -> Tensor:
    """Walls of a maze, bool `[y, x]`: paths between the cells of odd numbers, by a random walk that never crosses
    itself, and then a third of the inner walls away, so that there are several ways."""
    walls = torch.ones(size, size, dtype=torch.bool)
    walls[1, 1] = False
    path = [(1, 1)]
    while path:
        y, x = path[-1]
        ways = [(dy, dx) for dy, dx in ((0, 2), (0, -2), (2, 0), (-2, 0))
                if 0 < y + dy < size and 0 < x + dx < size and walls[y + dy, x + dx]]  # fmt: skip
        if not ways:
            path.pop()
            continue
        dy, dx = ways[int(torch.randint(len(ways), (), generator=source))]
        walls[y + dy // 2, x + dx // 2] = walls[y + dy, x + dx] = False
        path.append((y + dy, x + dx))
    inner = torch.rand(size, size, generator=source) < 1 / 3
    inner[[0, -1]], inner[:, [0, -1]] = False, False
    return walls & ~inner


def _walk(walls: Tensor, frames: int, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random walks of all clips side by side: positions, headings, actions. A walker goes forward where the way is
    free, turns where it is blocked, and then mostly keeps turning the same way."""
    clips, size = len(walls), walls.shape[-1]
    everyone = torch.arange(clips)
    free = (~walls).flatten(1).double()
    cell = torch.multinomial(free, 1, generator=source)[:, 0]
    position = torch.stack((cell % size, cell // size), -1) + 0.5
    position = position.double()
    heading = torch.randint(TURNS, (clips,), generator=source)
    turning = torch.where(torch.rand(clips, generator=source) < 0.5, LEFT, RIGHT)
    action = torch.full((clips,), STAY)
    positions, headings, actions = [position], [heading], [action]
    for _ in range(frames - 1):
        ahead = position + STEP * _direction(heading)
        blocked = ~_is_free(walls, ahead, everyone)
        draw = torch.rand(clips, generator=source)
        turning = torch.where(draw < 0.05, torch.where(turning == LEFT, RIGHT, LEFT), turning)
        keeps_turning = ((action == LEFT) | (action == RIGHT)) & (draw > 0.35)
        action = torch.where(blocked | keeps_turning | (draw > 0.85), turning, FORWARD)
        position = torch.where((action == FORWARD)[:, None], ahead, position)
        heading = (heading + (action == RIGHT).long() - (action == LEFT).long()) % TURNS
        positions, headings, actions = [*positions, position], [*headings, heading], [*actions, action]
    return torch.stack(positions, 1), torch.stack(headings, 1), torch.stack(actions, 1)


def _turned_back(actions: Tensor, positions: Tensor, headings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of walks and then its inverse. Of an even number of frames the two in the middle are one place."""
    frames = actions.shape[1]
    mirrored = torch.cat((torch.arange((frames + 1) // 2), torch.arange(frames // 2 - 1, -1, -1)))
    inverse = torch.tensor(INVERSE)[actions]
    out = actions.clone()
    for frame in range((frames + 1) // 2, frames):  # it undoes what led away from the mirrored frame
        undone = frames - frame
        out[:, frame] = inverse[:, undone] if undone < (frames + 1) // 2 else STAY
    return out, positions[:, mirrored], headings[:, mirrored]


def _direction(heading: Tensor) -> Tensor:
    """Unit vectors `[..., 2]`."""
    angle = heading.double() * (2 * math.pi / TURNS)
    return torch.stack((angle.cos(), angle.sin()), -1)


def _is_free(walls: Tensor, position: Tensor, clip: Tensor) -> Tensor:
    """Whether a walker at `[N, 2]` keeps his distance from the walls of his maze."""
    corners = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]], dtype=torch.float64) * MARGIN
    x, y = (position[:, None] + corners).floor().long().unbind(-1)
    return ~walls[clip[:, None], y, x].any(1)


def render(walls: Tensor, textures: Tensor, positions: Tensor, headings: Tensor, height: int, width: int) -> Tensor:
    """What is seen from places in one maze, uint8 `[T, 3, H, W]`.

    walls: bool `[y, x]`; textures: `[cells, texels, texels, 3]` in [0, 1]; positions `[T, 2]`; headings `[T]`.
    """
    forward = _direction(headings)  # T 2
    right = torch.stack((-forward[:, 1], forward[:, 0]), -1)
    plane = math.tan(FIELD_OF_VIEW / 2) * (2 * (torch.arange(width) + 0.5) / width - 1)
    rays = forward[:, None] + plane.double()[:, None] * right[:, None]  # T W 2; a step of 1 is 1 cell deep
    depth, cell, along, side = _cast(walls, positions, rays)
    rows = (torch.arange(height) + 0.5) / height * 2 - 1  # -1 above, 1 below
    # walls are as high as cells are wide; pixels are square, so the vertical field of view follows from the horizontal
    place = rows[:, None] * depth[:, None].float() * (math.tan(FIELD_OF_VIEW / 2) * height / width)  # T H W, -.5 to .5
    on_wall = place.abs() < 0.5
    texels = textures.shape[1]
    u = (along * texels).long().clamp(0, texels - 1)
    v = ((place + 0.5) * texels).long().clamp(0, texels - 1)
    wall = textures[cell[:, None].expand(v.shape), v, u[:, None].expand(v.shape)]
    shade = (1 / (1 + 0.15 * depth.float()) * torch.where(side, 1.0, 0.8))[:, None, :, None]
    # floor and ceiling: where the ray of a pixel meets them
    reach = 0.5 / (rows.abs() * math.tan(FIELD_OF_VIEW / 2) * height / width)
    ground = positions[:, None, None].float() + reach[:, None, None] * rays[:, None].float()  # T H W 2
    tile = ((ground * 2).floor().long().sum(-1) % 2).float()
    floor = torch.stack((0.30 + 0.15 * tile, 0.25 + 0.15 * tile, 0.20 + 0.10 * tile), -1)
    ceiling = torch.tensor([0.35, 0.45, 0.60]).expand(floor.shape)
    flat = torch.where((rows > 0)[:, None, None], floor, ceiling) / (1 + 0.15 * reach[:, None, None])
    picture = torch.where(on_wall[..., None], wall * shade, flat)
    return (picture * 255).to(torch.uint8).permute(0, 3, 1, 2).contiguous()


def _cast(walls: Tensor, positions: Tensor, rays: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where rays `[T, W, 2]` meet a wall, by the grid's lines that they cross (Amanatides and Woo 1987): depth, number
    of the wall's cell, place along its side in [0, 1), and whether that side faces x. Each `[T, W]`."""
    start = positions[:, None].expand_as(rays)
    cell = start.floor().long()
    step = torch.where(rays < 0, -1, 1)
    per_cell = 1 / rays.abs().clamp(min=1e-9)
    beyond = torch.where(rays < 0, start - cell, cell + 1 - start) * per_cell  # depth at the next line of x and of y
    depth, facing_x = torch.zeros_like(rays[..., 0]), torch.zeros_like(rays[..., 0], dtype=torch.bool)
    open_rays = torch.ones_like(facing_x)
    for _ in range(2 * walls.shape[-1]):
        crosses_x = beyond[..., 0] < beyond[..., 1]
        depth = torch.where(open_rays, beyond.amin(-1), depth)
        facing_x = torch.where(open_rays, crosses_x, facing_x)
        moved = torch.stack((crosses_x, ~crosses_x), -1) & open_rays[..., None]
        cell = torch.where(moved, cell + step, cell)
        beyond = torch.where(moved, beyond + per_cell, beyond)
        open_rays = open_rays & ~walls[cell[..., 1], cell[..., 0]]
        if not open_rays.any():
            break
    point = start + depth[..., None] * rays
    along = torch.where(facing_x, point[..., 1], point[..., 0])
    return depth, cell[..., 1] * walls.shape[-1] + cell[..., 0], along - along.floor(), facing_x
