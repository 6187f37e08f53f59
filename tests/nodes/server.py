"""A live ComfyUI with the pack in it, and a client that runs prompts there.

The host is the checkout that COMFYUI_DIR names, run by the Python that runs the tests.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import imageio_ffmpeg

from star_core.demo import DATA, DEGRADED, GROUND_TRUTH
from tests.paths import ROOT

FOLDER = "ComfyUI-STAR"  # what people's checkouts are called below custom_nodes
VIDEO_HELPER_SUITE = "ComfyUI-VideoHelperSuite"
USERS_VIDEO = "video.mp4"  # what the workflows call the video that a user is to choose
FAILURES = ("(IMPORT FAILED)", "Error while calling comfy_entrypoint")
FLAGS = (
    *("--cpu", "--listen", "127.0.0.1", "--database-url", "sqlite:///:memory:"),
    *("--disable-api-nodes", "--preview-method", "latent2rgb"),
)

Prompt = dict[str, dict[str, Any]]


class Refused(Exception):
    """The server did not take a prompt; the message is its answer."""


@dataclass
class Result:
    """What the host sent while it ran a prompt, and what its output nodes have to show."""

    prompt_id: str
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> dict[str, Any] | None:
        """The host's account of what went wrong."""
        return next((data for kind, data in self.events if kind == "execution_error"), None)

    @property
    def interrupted(self) -> bool:
        return any(kind == "execution_interrupted" for kind, _ in self.events)

    @property
    def executed(self) -> list[str]:
        """The nodes that ran, those with cached results left out."""
        nodes = [data["node"] for kind, data in self.events if kind == "executing"]
        return [node for node in nodes if node is not None]


class Server:
    """A host of its own below `base`: nothing of the checkout is written to."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.host = Path(os.environ["COMFYUI_DIR"])
        self.log_file = base / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.url = f"http://{self.address}"

    def __enter__(self) -> "Server":
        packs = {FOLDER: ROOT}
        if (suite := self.host / "custom_nodes" / VIDEO_HELPER_SUITE).exists():
            packs[VIDEO_HELPER_SUITE] = suite.resolve()
        (self.base / "custom_nodes").mkdir()
        for name, folder in packs.items():
            (self.base / "custom_nodes" / name).symlink_to(folder, target_is_directory=True)
        for clip in (GROUND_TRUTH, DEGRADED):
            self.upload(DATA / clip)
        make = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", DATA / DEGRADED]
        make += ["-frames:v", "4", "-pix_fmt", "yuv420p", self.base / "input" / USERS_VIDEO]
        subprocess.run([str(part) for part in make], check=True)
        command = [sys.executable, self.host / "main.py", *FLAGS, "--base-directory", self.base]
        command += ["--port", self.address.split(":")[1]]
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdout=log, stderr=subprocess.STDOUT, cwd=self.base
            )
        try:
            self.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait(self, seconds: float = 600) -> None:
        """Returns when the server answers; fails if it ends, or if a pack did not load."""
        until = time.monotonic() + seconds
        while True:
            try:
                self.get("/system_stats")
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"ComfyUI did not start:\n{self.log[-5000:]}") from None
                time.sleep(0.2)
        if any(failure in self.log for failure in FAILURES):
            raise RuntimeError(f"A pack did not load:\n{self.log[-5000:]}")

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def upload(self, file: Path) -> str:
        """Puts a file where LoadImage and LoadVideo find it; its name there."""
        folder = self.base / "input"
        folder.mkdir(exist_ok=True)
        return Path(shutil.copy(file, folder)).name

    def fetch(self, path: str, data: Any = None) -> bytes:
        """The body of a GET, or of a POST of JSON."""
        body = None if data is None else json.dumps(data).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> Any:
        return json.loads(self.fetch(path))

    def image(self, saved: dict[str, Any]) -> Any:
        """A picture among a node's outputs as array (h w c) of uint8."""
        import numpy as np
        from PIL import Image  # pyright: ignore[reportMissingImports]

        where = urllib.parse.urlencode({k: saved[k] for k in ("filename", "subfolder", "type")})
        return np.asarray(Image.open(BytesIO(self.fetch(f"/view?{where}"))))

    def interrupt(self) -> None:
        self.fetch("/interrupt", {})

    def run(
        self,
        prompt: Prompt,
        on_event: Callable[[str, dict[str, Any]], None] = lambda kind, data: None,
        timeout: float = 600,
    ) -> Result:
        """Runs a prompt to its end. `timeout` is the longest silence, in seconds."""
        import websocket  # pyright: ignore[reportMissingImports]

        client = uuid.uuid4().hex
        channel = websocket.create_connection(f"ws://{self.address}/ws?clientId={client}")
        channel.settimeout(timeout)
        try:
            answer = self.fetch("/prompt", {"prompt": prompt, "client_id": client})
            result = Result(json.loads(answer)["prompt_id"])
            while True:
                message = channel.recv()
                if isinstance(message, bytes):
                    result.previews.append(message)
                    continue
                event = json.loads(message)
                kind, data = event["type"], event["data"]
                if data.get("prompt_id") != result.prompt_id:
                    continue
                result.events.append((kind, data))
                on_event(kind, data)
                if kind == "executing" and data["node"] is None:
                    break  # sent last, when the history is written
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode()) from None
        finally:
            channel.close()
        result.outputs = self.get(f"/history/{result.prompt_id}")[result.prompt_id]["outputs"]
        return result
