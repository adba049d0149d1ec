"""Recorder of Doom: a player wanders through VizDoom's `my_way_home` and writes what it sees, does and where it is.

    pip install vizdoom av
    python examples/doom/record.py --out doom --minutes 20
    msc convert doom --out shards --frames 48 --signal actions --signal pose,kind=pose

`doom-SEED-000.mp4` comes with `.actions.csv`, a row a frame: the action that led to it, and `.pose.csv`: position in
map units (a player is 32 wide) and heading. Some episodes walk back by the inverse of all actions, unless a corner
stops them. Several processes with seeds of their own record side by side. vizdoom is MIT-licensed; the pictures are of
Freedoom, BSD-licensed.
"""

import argparse
import math
import random
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

TICS = 3  # of the game's 35 a second for each frame
FPS = Fraction(35, TICS)
TURN = 3  # degrees a tic
INVERSE = {"stay": "stay", "left": "right", "right": "left", "forward": "back", "back": "forward"}
BUTTONS = {"stay": (0, 0, 0), "left": (-TURN, 0, 0), "right": (TURN, 0, 0), "forward": (0, 1, 0), "back": (0, 0, 1)}
SLOW, SLIP = 8.0, 2.0  # map units: who goes less in a frame has met a wall; who is nearer to a place is there


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for videos and their signals")
    parser.add_argument("--minutes", type=float, default=20, help="of video in all (20)")
    parser.add_argument("--seconds", type=float, default=40, help="of an episode (40)")
    parser.add_argument("--size", default="48x64", metavar="HxW", help="height and width in even pixels (48x64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out-and-back", type=float, default=0.3, metavar="SHARE", help="of episodes (0.3)")
    args = parser.parse_args()
    try:
        height, width = map(int, args.size.split("x"))
        import av  # noqa: F401
        import vizdoom
    except ValueError:
        parser.error(f"--size is {args.size}, expected such as 48x64")
    except ImportError as error:
        print(f"{error.name} is missing: pip install vizdoom av", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    source, game = random.Random(args.seed), start_game(vizdoom, args.seed)
    for number in range(max(1, round(args.minutes * 60 / args.seconds))):
        game.new_episode()
        frames = round(args.seconds * FPS)
        episode = play(game, source, frames, source.random() < args.out_and_back)
        write(args.out / f"doom-{args.seed}-{number:03d}.mp4", episode, height, width)
        away = math.dist(episode[0][2][:2], episode[-1][2][:2])
        print(f"doom-{args.seed}-{number:03d}: {len(episode)} frames, ends {away:.0f} units from its start")
    game.close()
    return 0


def start_game(vizdoom: Any, seed: int) -> Any:
    """The game, without window, sound, weapon and time limit."""
    game = vizdoom.DoomGame()
    game.load_config(str(Path(vizdoom.scenarios_path, "my_way_home.cfg")))
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_available_buttons([getattr(vizdoom.Button, name) for name in (
        "TURN_LEFT_RIGHT_DELTA", "MOVE_FORWARD", "MOVE_BACKWARD"
    )])  # fmt: skip
    game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in (
        "POSITION_X", "POSITION_Y", "POSITION_Z", "ANGLE"
    )])  # fmt: skip
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_render_weapon(False)
    game.set_episode_timeout(0)
    game.set_seed(seed)
    game.init()
    return game


def play(game: Any, source: random.Random, frames: int, out_and_back: bool) -> list[tuple[str, Any, list[float]]]:
    """(action that led to it, picture [H, W, 3], x y z angle) of every frame; fewer where the goal is found."""
    state = game.get_state()
    episode = [("stay", state.screen_buffer, list(state.game_variables))]
    action, hold = "stay", 2
    while len(episode) < frames:
        mirrored = frames - 1 - len(episode)  # the frame to come back to
        if out_and_back and mirrored < len(episode) - 1:
            action = INVERSE[episode[mirrored + 1][0]]
            if action == "back" and ahead(episode[mirrored], episode[-1]) < SLIP:  # where it had met a wall
                action = "stay"
        else:
            going = len(episode) > 2 and all(name == "forward" for name, _, _ in episode[-3:])
            blocked = going and ahead(episode[-2], episode[-1]) < SLOW
            if blocked or not hold:
                weights = (1, 1, 0 if blocked else 2 if action == "forward" else 10, 0.2)  # mostly on after a turn
                action = source.choices(("left", "right", "forward", "stay"), weights)[0]
                hold = source.randint(5, 25) if action == "forward" else source.randint(2, 9)
            hold -= 1
        game.make_action(list(BUTTONS[action]), TICS)
        if game.is_episode_finished():
            break
        state = game.get_state()
        episode.append((action, state.screen_buffer, list(state.game_variables)))
    return episode


def ahead(behind: tuple[str, Any, list[float]], now: tuple[str, Any, list[float]]) -> float:
    """How many map units one frame's place is before another's, in the direction in which the player looks."""
    (x, y, *_), (now_x, now_y, _, angle) = behind[2], now[2]
    return (now_x - x) * math.cos(math.radians(angle)) + (now_y - y) * math.sin(math.radians(angle))


def write(path: Path, episode: list[tuple[str, Any, list[float]]], height: int, width: int) -> None:
    """The video and its signals, which appear with it."""
    import av
    from av.video.reformatter import Interpolation

    partial = path.with_suffix(".partial")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "12"}
        for _, picture, _ in episode:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(width, height, "yuv420p", interpolation=Interpolation.AREA)))
        container.mux(stream.encode())
    path.with_suffix(".actions.csv").write_text("\n".join(["action", *(action for action, _, _ in episode), ""]))
    lines = ["x,y,z,qx,qy,qz,qw"]
    for _, _, (x, y, z, angle) in episode:
        half = math.radians(angle) / 2
        lines.append(f"{x:.3f},{y:.3f},{z:.3f},0,0,{math.sin(half):.8f},{math.cos(half):.8f}")
    path.with_suffix(".pose.csv").write_text("\n".join([*lines, ""]))
    partial.rename(path)


if __name__ == "__main__":
    sys.exit(main())
