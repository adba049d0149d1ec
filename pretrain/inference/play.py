"""`msc play`: a web page that streams generated frames and takes keys for a run's discrete signals.

One WebSocket is one player. Each unit is generated under the keys that are held when it begins, once the browser has
taken the one before. The past is limited, so that memory does not grow however long the game.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from aiohttp import WSMsgType, web
from PIL import Image
from torch import Tensor

from ..diffusion.autoencoder import decode_stream
from ..diffusion.rectified_flow import frame_shift
from ..diffusion.sampler import RollOut, Sampling, limit_context
from ..model.conditioning import Condition, SignalConfig, padded
from ..requests import PlayConfig, SampleConfig
from .load import TrainedModel, open_run
from .sample import read_context

log = logging.getLogger(__name__)
PAGE = Path(__file__).with_name("play.html")
IDLE = ("stay", "none", "noop", "idle", "nothing", "0")  # values that mean that no key is held
# Keys by the values that they stand for; other values have the digits.
KEYS = {
    "left": "ArrowLeft", "right": "ArrowRight", "up": "ArrowUp", "forward": "ArrowUp", "down": "ArrowDown",
    "back": "ArrowDown", "backward": "ArrowDown", "jump": " ", "attack": "Control", "use": "e",
}  # fmt: skip
Held = Mapping[str, str]  # values that are held, by signal


@dataclass(frozen=True)
class Game:
    """A model with the context that every game starts from."""

    trained: TrainedModel
    latents: Tensor  # normalised, [1, T, C, h, w]
    condition: Condition
    sampling: Sampling

    @staticmethod
    def open(run: Path, request: PlayConfig) -> Game:
        """ValueError or FileNotFoundError for a run or clip that cannot be played."""
        trained = open_run(run, request.weights)
        sampled = SampleConfig(clip=request.clip, nothing=request.nothing, context=request.context)
        context = read_context(trained, sampled)
        reach = request.reach or max(1, trained.space.frames // trained.config.model.frames_per_unit - 1)
        model = limit_context(trained.model, reach)
        latents = model.normalise(context.encoded[: context.frames])[None]
        shift = frame_shift(trained.config.diffusion, *latents.shape[-2:])
        sampling = Sampling(request.steps, request.seed, shift, request.context_level)
        return Game(replace(trained, model=model), latents, context.condition.to(trained.device), sampling)

    @property
    def signals(self) -> list[SignalConfig]:
        """Those that keys can set."""
        return [signal for signal in self.trained.config.model.signals if signal.kind == "discrete"]

    @property
    def keys(self) -> dict[str, tuple[str, str]]:
        """The signal and value that each key stands for."""
        keys: dict[str, tuple[str, str]] = {}
        digits = iter("123456789")
        for signal in self.signals:
            for value in signal.columns:
                key = KEYS.get(value.lower())
                if value.lower() not in IDLE and (key is None or key in keys):
                    key = next(digits, None)
                if key is not None and key not in keys:
                    keys[key] = signal.name, value
        return keys

    def frames(self, seed: int, held: Callable[[], Held]) -> Iterator[tuple[Tensor, float]]:
        """Frames uint8 `[H, W, 3]` of the context and then new ones without end, and the seconds that each took."""
        model, per_unit = self.trained.model, self.trained.config.model.frames_per_unit
        roll_out = RollOut(model, self.latents, replace(self.sampling, seed=seed))

        def units() -> Iterator[Tensor]:
            known = self.latents.split(per_unit, 1) if self.latents.shape[1] else ()
            for number, unit in enumerate(known):
                own = self.condition.of_frames(slice(number * per_unit, (number + 1) * per_unit))
                roll_out.append(unit, padded(own, per_unit))
                yield unit
            while True:
                condition = self._under(held())
                x = roll_out.generate(condition)
                yield x
                roll_out.append(x, condition)

        last = time.perf_counter()
        decoded = decode_stream(self.trained.autoencoder, (model.denormalise(x).cpu() for x in units()))
        for (part,) in decoded:
            pictures = part.permute(0, 2, 3, 1)
            seconds = (time.perf_counter() - last) / len(pictures)
            for picture in pictures:
                yield picture, seconds
            last = time.perf_counter()

    def _under(self, held: Held) -> Condition:
        """The condition of a unit while these values are held. A signal of which none is held has its idle value; one
        without is unknown."""
        frames, device = self.trained.config.model.frames_per_unit, self.trained.device
        signals = {}
        for signal in self.signals:
            idle = next((value for value in signal.columns if value.lower() in IDLE), None)
            if (value := held.get(signal.name, idle)) is not None:
                counts = torch.eye(len(signal.columns), device=device)[signal.columns.index(value)]
                signals[signal.name] = counts.repeat(signal.frames).expand(1, frames, -1)
        return Condition(self.condition.text, self.condition.labels, signals)


def play(run: Path, request: PlayConfig) -> None:
    """Serve the page until interrupted."""
    game, token = Game.open(run, request), request.token or secrets.token_urlsafe(12)
    app = application(game, run.name, token)

    async def announce(_: web.Application) -> None:
        print(f"http://{request.host}:{request.port}/?token={token}   (Ctrl-C ends)", flush=True)

    app.on_startup.append(announce)
    web.run_app(app, host=request.host, port=request.port, print=None, handle_signals=True)


def application(game: Game, name: str, token: str) -> web.Application:
    """The page at /, a game at /play. One game at a time: a second player is told so and may try again."""
    playing = asyncio.Lock()

    def check_token(request: web.Request) -> None:
        if not secrets.compare_digest(request.query.get("token", "").encode(), token.encode()):
            raise web.HTTPForbidden(text="the address lacks the token that msc play printed")

    async def page(request: web.Request) -> web.Response:
        check_token(request)
        return web.Response(text=PAGE.read_text(encoding="utf-8"), content_type="text/html")

    async def player(request: web.Request) -> web.StreamResponse:
        check_token(request)
        socket = web.WebSocketResponse(heartbeat=20, max_msg_size=1 << 12)
        await socket.prepare(request)
        if playing.locked():
            await socket.send_json({"error": "somebody else is playing: try again later"})
            await socket.close()
            return socket
        async with playing:
            await socket.send_json({
                "run": name, "fps": game.trained.space.fps, "seed": game.sampling.seed,
                "keys": {key: f"{signal}: {value}" for key, (signal, value) in game.keys.items()},
            })  # fmt: skip
            seed: int | None = game.sampling.seed
            while seed is not None:
                seed = await play_once(game, socket, seed)
        return socket

    app = web.Application()
    app.add_routes([web.get("/", page), web.get("/play", player)])
    return app


async def play_once(game: Game, socket: web.WebSocketResponse, seed: int) -> int | None:
    """One game, until the browser goes (None) or asks for another, with the seed that it names."""
    held: dict[str, str] = {}
    pressed = seen = 0  # changes of keys so far, and those that the frame at hand was made under

    def now_held() -> Held:
        nonlocal seen
        seen = pressed
        return dict(held)

    async def send() -> None:
        frames, due = game.frames(seed, now_held), time.monotonic()
        try:
            for number in itertools.count():
                picture, seconds = await asyncio.to_thread(next, frames)
                facts = {"frame": number, "ms": round(1000 * seconds, 1), "pressed": seen, "seed": seed}
                await socket.send_json(facts)
                await socket.send_bytes(jpeg(picture))
                due = max(due + 1 / game.trained.space.fps, time.monotonic())
                await asyncio.sleep(due - time.monotonic())
        except ConnectionError:
            return  # the browser has gone
        except Exception:
            log.exception("the game ended")
            await socket.close()

    sender, restart = asyncio.create_task(send()), None
    try:
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                break
            command = read_command(message.data)
            if isinstance(seed_asked := command.get("reset"), int) and 0 <= seed_asked < 1 << 63:
                restart = seed_asked
                break
            if (named := game.keys.get(str(command.get("key")))) is not None:
                signal, value = named
                pressed += 1
                if command.get("down"):
                    held[signal] = value
                elif held.get(signal) == value:
                    del held[signal]
    finally:
        sender.cancel()
    return restart


def read_command(text: str) -> dict[str, Any]:
    """What the page sends: {"key": ..., "down": true or false} or {"reset": seed}; anything else is nothing."""
    try:
        command = json.loads(text)
    except ValueError:
        return {}
    return command if isinstance(command, dict) else {}


def jpeg(picture_HW3: Tensor) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture_HW3.numpy()).save(content, "JPEG", quality=92, subsampling=0)
    return content.getvalue()
