"""Ray-cast mazes: actions lead where they say, walks come back, and pictures are what geometry demands."""

import math

import pytest
import torch

from msc.datasets.maze import ACTIONS, BACK, FORWARD, INVERSE, LEFT, RIGHT, STEP, TURNS, ray_cast_maze, render


@pytest.fixture(scope="module")
def walks():
    return ray_cast_maze(3, 12, 31, 24, 32, out_and_back=0.5)


def test_a_walk_is_a_function_of_its_seed(walks):
    again = ray_cast_maze(3, 12, 31, 24, 32, out_and_back=0.5)
    assert all(map(torch.equal, walks, again))
    assert not torch.equal(walks.video, ray_cast_maze(4, 12, 31, 24, 32).video)


def test_actions_lead_where_they_say(walks):
    """The first place and the actions give all others."""
    turned = (walks.actions == RIGHT).long() - (walks.actions == LEFT).long()
    assert torch.equal((walks.headings[:, :1] + turned.cumsum(1)) % TURNS, walks.headings)
    went = (walks.actions == FORWARD).double() - (walks.actions == BACK).double()
    angle = walks.headings.double() * (2 * math.pi / TURNS)
    moves = STEP * went[..., None] * torch.stack((angle.cos(), angle.sin()), -1)
    torch.testing.assert_close(walks.positions[:, :1] + moves.cumsum(1), walks.positions, rtol=0, atol=1e-9)
    assert all((walks.actions == ACTIONS.index(name)).any() for name in ("left", "right", "forward", "back"))


@pytest.mark.parametrize("frames", [30, 31])
def test_a_walk_out_and_back_shows_the_same_again(frames):
    walks = ray_cast_maze(5, 6, frames, 24, 32, out_and_back=1.0)
    assert torch.equal(walks.video, walks.video.flip(1))
    middle = (frames + 1) // 2
    later, undone = walks.actions[:, frames // 2 + 1 :], walks.actions[:, 1:middle].flip(1)
    assert torch.equal(later, torch.tensor(INVERSE)[undone])
    different = (walks.video[:, 0].float() - walks.video[:, middle - 1].float()).abs().mean((1, 2, 3))
    assert (different > 10).all(), "they do go somewhere"


def test_a_wall_straight_ahead_is_as_high_as_its_depth_says():
    """A field of view of 90°: a wall of height 1 at depth d takes 1 / (2 d) of a square picture."""
    walls = torch.ones(5, 9, dtype=torch.bool)
    walls[1:4, 1:8] = False
    white = torch.ones(45, 8, 8, 3)
    for x, depth in ((4.0, 4.0), (6.0, 2.0), (7.0, 1.0)):
        place = torch.tensor([[x, 2.5]], dtype=torch.float64)
        picture = render(walls, white, place, torch.tensor([0]), 64, 64)[0]
        column = picture[:, :, 32].float()
        is_wall = (column.amax(0) - column.amin(0)) < 1  # white, whatever the shade; floor and ceiling have a colour
        assert abs(int(is_wall.sum()) - 64 / (2 * depth)) <= 1


def test_a_full_turn_shows_the_same_and_what_is_right_comes_from_the_right():
    walls = torch.ones(5, 5, dtype=torch.bool)
    walls[1:4, 1:4] = False
    textures = torch.rand(25, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    place = torch.tensor([[2.2, 2.8]], dtype=torch.float64).expand(TURNS + 1, 2)
    turning = render(walls, textures, place, torch.arange(TURNS + 1) % TURNS, 32, 256)
    assert torch.equal(turning[0], turning[TURNS])
    # a quarter turn to the right brings what was at the right edge to the left one
    first, after = turning[0].float(), turning[TURNS // 4].float()
    assert (first[:, :, -1] - after[:, :, 0]).abs().mean() < 25 < (first[:, :, 0] - after[:, :, -1]).abs().mean()


def test_a_size_that_gives_no_maze_is_named():
    with pytest.raises(ValueError, match="size is 8; it must be odd"):
        ray_cast_maze(0, 1, 2, 8, 8, size=8)
