"""`msc play`: a game over a WebSocket, and the page in a real browser."""

import asyncio
import base64
import io
import os
import shutil
import subprocess
import time

import pytest
import torch
from aiohttp import ClientSession, WSMsgType
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image
from test_sample import untrained

from msc.pretrain.inference import play
from msc.pretrain.model.conditioning import SignalConfig
from msc.pretrain.requests import PlayConfig

SIGNALS = (
    SignalConfig("actions", "discrete", ("stay", "left", "right", "forward", "dance")),
    SignalConfig("pose", "continuous", ("x",), mean=(0.0,), std=(1.0,)),
)


@pytest.fixture
def game(tmp_path, monkeypatch):
    trained = untrained(tmp_path / "run", signals=SIGNALS)
    trained.model.signals[0].outer.weight.data.mul_(30)  # so that keys show
    monkeypatch.setattr(play, "open_run", lambda run, weights: trained)
    return play.Game.open(tmp_path / "run", PlayConfig(nothing=True, steps=2, seed=5))


async def next_frame(socket):
    """(facts, picture) of the next frame of a game."""
    facts = await asyncio.wait_for(socket.receive_json(), 20)
    message = await asyncio.wait_for(socket.receive(), 20)
    assert message.type is WSMsgType.BINARY
    return facts, torch.tensor(list(Image.open(io.BytesIO(message.data)).tobytes()))


def with_client(game, body):
    async def run():
        async with TestClient(TestServer(play.application(game, "run", "secret"))) as client:
            await body(client)

    asyncio.run(run())


def test_keys_stand_for_values_and_the_others_get_digits(game):
    assert game.keys == {
        "ArrowLeft": ("actions", "left"), "ArrowRight": ("actions", "right"), "ArrowUp": ("actions", "forward"),
        "1": ("actions", "dance"),
    }  # fmt: skip


def test_held_keys_steer_and_the_same_seed_gives_the_same_game(game):
    async def frames_under(socket, key):
        if key:
            await socket.send_json({"key": key, "down": True})
        frames = []
        while len(frames) < 6:
            facts, picture = await next_frame(socket)
            if facts["pressed"] == bool(key):
                frames.append(picture)
        return frames

    async def body(client):
        games = []
        for key in (None, None, "ArrowLeft"):
            async with client.ws_connect("/play?token=secret") as socket:
                hello = await socket.receive_json()
                assert hello["keys"]["ArrowLeft"] == "actions: left" and hello["fps"] == 10.0
                games.append(await frames_under(socket, key))
        assert all(map(torch.equal, games[0], games[1]))
        assert not torch.equal(games[0][-1], games[2][-1])

    with_client(game, body)


def test_a_new_game_begins_on_request_and_another_player_waits(game):
    async def body(client):
        async with client.ws_connect("/play?token=secret") as socket:
            await socket.receive_json()
            for _ in range(3):
                facts, _ = await next_frame(socket)
            assert (facts["frame"], facts["seed"]) == (2, 5)
            async with client.ws_connect("/play?token=secret") as other:
                assert "somebody else is playing" in (await other.receive_json())["error"]
            for nonsense in ("no JSON", "[1]", '{"reset": "x"}', '{"reset": -1}', '{"key": "F5", "down": true}'):
                await socket.send_str(nonsense)
            await socket.send_json({"reset": 9})
            while facts["seed"] == 5:
                facts, _ = await next_frame(socket)
            assert (facts["frame"], facts["seed"], facts["pressed"]) == (0, 9, 0)

    with_client(game, body)


def test_without_the_token_nobody_plays(game):
    async def body(client):
        for path in ("/", "/?token=wrong", "/?token=%C3%A9", "/play", "/play?token="):
            assert (await client.get(path)).status == 403
        assert "msc play" in await (await client.get("/?token=secret")).text()

    with_client(game, body)


def test_a_game_ends_with_its_browser_and_takes_bounded_memory(game, monkeypatch):
    units, sizes = [], []
    generate, append = play.RollOut.generate, play.RollOut.append
    monkeypatch.setattr(play.RollOut, "generate", lambda *a: (units.append(1), generate(*a))[1])
    monkeypatch.setattr(play.RollOut, "append", lambda self, *a: (append(self, *a), sizes.append(self.cache.bytes)))

    async def body(client):
        for _ in range(3):
            async with client.ws_connect("/play?token=secret") as socket:
                await socket.receive_json()
                await next_frame(socket)
        await asyncio.sleep(1)  # one may have been under way
        made = len(units)
        await asyncio.sleep(1)
        assert len(units) == made > 0

    with_client(game, body)
    sizes.clear()
    frames = game.frames(0, dict)
    for _ in range(40):
        next(frames)
    assert sizes[12] == sizes[-1] > sizes[0]


CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROME is None, reason="no Chromium")
def test_in_a_browser_keys_change_the_picture_and_the_stream_goes_on(game, tmp_path, monkeypatch):
    """500 frames in a headless Chromium, driven through its DevTools protocol."""
    object.__setattr__(game.trained.space, "fps", 200.0)  # as fast as it goes
    command = [CHROME, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,700", "about:blank"]  # fmt: skip

    async def body(client):
        async with ClientSession() as session:
            port = await debugging_port(tmp_path / "profile" / "DevToolsActivePort")
            async with session.get(f"http://127.0.0.1:{port}/json/list") as listed:
                page = next(target for target in await listed.json() if target["type"] == "page")
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as devtools:
                number = 0

                async def call(method, **parameters):
                    nonlocal number
                    number += 1
                    await devtools.send_json({"id": number, "method": method, "params": parameters})
                    while (answer := await asyncio.wait_for(devtools.receive_json(), 30)).get("id") != number:
                        pass
                    assert "error" not in answer, answer
                    return answer["result"]

                async def evaluate(expression):
                    result = await call("Runtime.evaluate", expression=expression, returnByValue=True)
                    assert "exceptionDetails" not in result, result
                    return result["result"].get("value")

                async def frame_beyond(count):
                    deadline = time.monotonic() + 120
                    while time.monotonic() < deadline:
                        text = await evaluate("document.getElementById('status').textContent")
                        words = text.replace(",", " ").split()
                        if words[0] == "frame" and int(words[1]) >= count:
                            return text
                        await asyncio.sleep(0.02)
                    raise AssertionError(f"no frame {count} in 120 s: {text}")

                async def mean_colour():
                    return await evaluate(
                        "(() => { const c = document.getElementById('screen'), d = c.getContext('2d')"
                        ".getImageData(0, 0, c.width, c.height).data; return d.reduce((a, b) => a + b) / d.length })()"
                    )

                async def press(kind):
                    await call("Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft",
                               windowsVirtualKeyCode=37)  # fmt: skip

                await call("Page.enable")
                await call("Page.navigate", url=str(client.make_url("/?token=secret")))
                await frame_beyond(30)
                idle = [await mean_colour() for _ in range(10)]
                await press("rawKeyDown")
                at = int((await frame_beyond(31)).split()[1].strip(","))
                await frame_beyond(at + 30)
                steered = [await mean_colour() for _ in range(10)]
                assert await evaluate("document.querySelectorAll('button.held').length") == 1
                await press("keyUp")
                text = await frame_beyond(500)
                assert await evaluate("document.querySelectorAll('button.held').length") == 0
                assert "frames/s" in text and "ms from key to frame" in text
                centre = sum(idle) / 10
                assert abs(sum(steered) / 10 - centre) > 3 * max(abs(value - centre) for value in idle)
                shot = base64.b64decode((await call("Page.captureScreenshot"))["data"])
                (tmp_path / "play.png").write_bytes(shot)
                await evaluate("document.getElementById('reset').click()")
                deadline = time.monotonic() + 30
                while "seed 5" in await evaluate("document.getElementById('status').textContent"):
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.05)

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ}) as browser:
        try:
            with_client(game, body)
        finally:
            browser.terminate()


async def debugging_port(file):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if file.is_file() and (lines := file.read_text().split()):
            return int(lines[0])
        await asyncio.sleep(0.1)
    raise AssertionError("Chromium did not start")
