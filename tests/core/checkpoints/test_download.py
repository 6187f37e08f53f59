"""Published files, fetched from a hub that is served on the loopback."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save

from star_core.checkpoints.download import PUBLISHED, PublishedFile, download
from star_core.checkpoints.find import find_published, find_text_encoder, find_vae
from star_core.cli import main
from tests.paths import ROOT

CHUNK = 20_000


@dataclass
class Hub:
    """Serves `files`, by repository and path, the way the hub does, and notes what is asked for.

    drop_after: the connection breaks after so many bytes of a file, once.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    drop_after: int | None = None
    endpoint: str = ""

    def put(self, file: PublishedFile, content: bytes) -> None:
        self.files[f"{file.repo}/{file.path}"] = content

    def put_small(self, file: PublishedFile, path: str, content: bytes) -> None:
        """A file that is kept in git itself, as small ones are."""
        self.files[f"{file.repo}/{path}"] = content
        self.hashes[f"{file.repo}/{path}"] = hashlib.sha1(
            b"blob %d\0" % len(content) + content
        ).hexdigest()

    def ranges(self) -> list[str | None]:
        """Returns the byte ranges of the requests for contents, None for whole files."""
        return [range for method, _, range in self.asked if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        hub = self.hub
        name = self.path.lstrip("/").replace("/resolve/main/", "/")
        wanted = self.headers.get("Range")
        hub.asked.append((self.command, name, wanted))
        if name not in hub.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = hub.files[name]
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0  # type: ignore
        self.send_response(206 if wanted else 200)
        etag = hub.hashes.get(name) or hashlib.sha256(content).hexdigest()
        self.send_header("X-Linked-Etag", f'"{etag}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            end = len(content) if hub.drop_after is None else start + hub.drop_after
            hub.drop_after = None
            self.wfile.write(content[start:end])
            self.close_connection = True

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


LIGHT = PUBLISHED["light_deg"]
CONTENT = random.Random(0).randbytes(300_000)


def names_below(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_fetched_into_its_model_folder_and_progress_is_told(tmp_path, hub):
    hub.put(LIGHT, CONTENT)
    reported = []
    path = download(
        "light_deg",
        tmp_path / "models",
        on_progress=lambda *amounts: reported.append(amounts),
        endpoint=hub.endpoint,
    )
    assert path == tmp_path / "models" / "diffusion_models" / "STAR" / "light_deg.pt"
    assert path.read_bytes() == CONTENT
    assert reported[0] == (0, 300_000) and reported[-1] == (300_000, 300_000)
    assert reported == sorted(reported) and len(set(reported)) == 300_000 // CHUNK + 1
    assert names_below(path.parent) == {"light_deg.pt", "light_deg.pt.sha256"}
    stamp = path.with_name("light_deg.pt.sha256").read_text()
    assert stamp == f"{hashlib.sha256(CONTENT).hexdigest()}  light_deg.pt\n"


def test_what_is_there_and_checked_is_not_asked_for_again(tmp_path, hub):
    hub.put(LIGHT, CONTENT)
    path = download("light_deg", tmp_path, endpoint=hub.endpoint)
    hub.asked.clear()
    assert download("light_deg", tmp_path, endpoint=hub.endpoint) == path
    assert not hub.asked


class Stop(Exception):
    pass


def test_an_interrupt_keeps_what_is_there_and_the_next_run_asks_for_the_rest(tmp_path, hub):
    hub.put(LIGHT, CONTENT)

    def stop(done, total):
        if done >= 3 * CHUNK:
            raise Stop

    with pytest.raises(Stop):
        download("light_deg", tmp_path, on_progress=stop, endpoint=hub.endpoint)
    (part,) = (tmp_path / LIGHT.folder / "STAR").iterdir()
    assert part.suffix == ".part" and part.read_bytes() == CONTENT[: 3 * CHUNK]
    reported = []
    path = download(
        "light_deg",
        tmp_path,
        on_progress=lambda done, total: reported.append(done),
        endpoint=hub.endpoint,
    )
    assert hub.ranges() == [None, f"bytes={3 * CHUNK}-"]
    assert reported[0] == 3 * CHUNK
    assert path.read_bytes() == CONTENT and not part.exists()


def test_a_broken_connection_is_resumed(tmp_path, hub):
    hub.put(LIGHT, CONTENT)
    hub.drop_after = 5 * CHUNK
    try:  # huggingface_hub 1 goes on by itself, 0.36 leaves it to the next run
        path = download("light_deg", tmp_path, endpoint=hub.endpoint)
    except ValueError as error:
        assert "try again, which resumes the download" in str(error)
        assert not (tmp_path / LIGHT.folder / LIGHT.file).exists()
        path = download("light_deg", tmp_path, endpoint=hub.endpoint)
    assert hub.ranges() == [None, f"bytes={5 * CHUNK}-"]
    assert path.read_bytes() == CONTENT


def test_a_part_of_another_version_is_not_continued(tmp_path, hub):
    hub.put(LIGHT, CONTENT)
    hub.drop_after = CHUNK

    def stop(done, total):
        if done:
            raise Stop

    with pytest.raises(Stop):
        download("light_deg", tmp_path, on_progress=stop, endpoint=hub.endpoint)
    hub.put(LIGHT, CONTENT[::-1])
    path = download("light_deg", tmp_path, endpoint=hub.endpoint)
    assert path.read_bytes() == CONTENT[::-1] and hub.ranges() == [None, None]


def test_a_wrong_hash_is_an_error_and_nothing_is_kept(tmp_path, hub):
    hub.put(LIGHT, CONTENT)
    hub.hashes[f"{LIGHT.repo}/{LIGHT.path}"] = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(ValueError, match="arrived damaged.*try again"):
        download("light_deg", tmp_path, endpoint=hub.endpoint)
    assert not names_below(tmp_path)


def test_a_hub_that_states_no_hash_is_not_trusted(tmp_path, hub):
    hub.put(LIGHT, CONTENT)
    hub.hashes[f"{LIGHT.repo}/{LIGHT.path}"] = "abc"
    with pytest.raises(ValueError, match="states no hash"):
        download("light_deg", tmp_path, endpoint=hub.endpoint)
    assert not names_below(tmp_path)


def test_without_a_network_the_error_names_the_file_its_place_and_its_source(tmp_path, hub):
    closed = "http://127.0.0.1:9"
    with pytest.raises(ValueError) as error:
        download("light_deg", tmp_path, endpoint=closed)
    message = str(error.value)
    assert "light_deg.pt cannot be downloaded ([Errno" in message and "\n" not in message
    assert "I2VGen-XL-based/light_deg.pt of SherryX/STAR on Hugging Face" in message
    assert str(tmp_path / "diffusion_models" / "STAR" / "light_deg.pt") in message
    assert not names_below(tmp_path)
    with pytest.raises(ValueError, match="404"):
        download("heavy_deg", tmp_path, endpoint=hub.endpoint)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_environment_names_the_hub_or_forbids_to_ask_it(tmp_path, hub, offline):
    hub.put(LIGHT, CONTENT)
    code = "import sys; from star_core.checkpoints.download import download\n"
    code += "download('light_deg', sys.argv[1])"
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": offline}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if offline == "1":
        assert "offline mode is enabled" in result.stderr and "save it as" in result.stderr
    assert bool(names_below(tmp_path)) == bool(hub.ranges()) == (offline == "0"), result.stderr


def test_a_file_put_there_by_hand_is_checked_once(tmp_path, hub, caplog):
    hub.put(LIGHT, CONTENT)
    path = tmp_path / LIGHT.folder / LIGHT.file
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="light_deg.pt is not .*: delete or rename it"):
        download("light_deg", tmp_path, endpoint=hub.endpoint)
    assert path.read_bytes() == CONTENT[:-1]
    path.write_bytes(CONTENT)
    assert download("light_deg", tmp_path, endpoint="http://127.0.0.1:9") == path
    assert "used unchecked" in caplog.text
    for _ in range(2):
        assert download("light_deg", tmp_path, endpoint=hub.endpoint) == path
    assert len(hub.asked) == 2 and not hub.ranges()


def test_the_text_encoder_brings_its_tokenizer_and_both_are_found(tmp_path, hub):
    from star_core.text.clip_tokenizer import load_tokenizer

    file = PUBLISHED["clip_vit_h"]
    content = save(
        {
            "transformer.resblocks.0.attn.in_proj_weight": torch.ones(1),
            "token_embedding.weight": torch.ones(2, 1024),
        }
    )
    words = {"model": {"vocab": {"<|startoftext|>": 0, "<|endoftext|>": 1}, "merges": []}}
    hub.put(file, content)
    hub.put_small(file, "tokenizer.json", json.dumps(words).encode())
    path = download("clip_vit_h", tmp_path, endpoint=hub.endpoint)
    assert find_text_encoder(models_dir=tmp_path, width=1024) == path
    assert load_tokenizer(text_encoder=path).end == 1


def test_a_damaged_small_file_is_noticed_too(tmp_path, hub):
    file = PUBLISHED["clip_vit_h"]
    hub.put_small(file, "tokenizer.json", b"{}")
    hub.files[f"{file.repo}/tokenizer.json"] = b"[]"
    with pytest.raises(ValueError, match="tokenizer.json arrived damaged"):
        download("clip_vit_h", tmp_path, endpoint=hub.endpoint)


def test_the_vae_is_found_under_its_descriptive_name(tmp_path, hub):
    hub.put(PUBLISHED["svd_vae"], save({"decoder.time_conv_out.weight": torch.ones(1)}))
    path = download("svd_vae", tmp_path, endpoint=hub.endpoint)
    assert path.parent == tmp_path / "vae" and find_vae(models_dir=tmp_path) == path


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="medium_deg.*light_deg, heavy_deg"):
        download("medium_deg", tmp_path)


# the command line


def test_the_command_fetches_and_upscale_finds(tmp_path, hub, monkeypatch, capsys):
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    monkeypatch.setattr(
        "star_core.checkpoints.download.download", partial(download, endpoint=hub.endpoint)
    )
    upscale = ["upscale", "in.mkv", "out.mkv", "--model", "light_deg"]
    assert main(upscale) == 2
    error = capsys.readouterr().err
    assert "run `python -m star_core download light_deg`" in error
    assert "I2VGen-XL-based/light_deg.pt of SherryX/STAR" in error

    assert main(["download", "light_deg"]) == 2
    assert "--models-dir" in capsys.readouterr().err
    hub.put(LIGHT, save({"a": torch.ones(1)}))
    assert main(["download", "light_deg", "--models-dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    path = tmp_path / LIGHT.folder / LIGHT.file
    assert out == f"{path}\n" and "light_deg 0/0 MB" in err
    assert find_published("light_deg", models_dir=tmp_path) == path
    assert main([*upscale, "--models-dir", str(tmp_path)]) == 2
    assert f"{path} seems to be a checkpoint of an unknown kind" in capsys.readouterr().err

    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path / "comfy"))
    (tmp_path / "comfy").mkdir()
    assert main(["download", "light_deg"]) == 0
    assert (tmp_path / "comfy" / "models" / LIGHT.folder / LIGHT.file).exists()


def test_the_command_lists_what_there_is(capsys):
    assert main(["download", "--list"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [*PUBLISHED]
    with pytest.raises(SystemExit):
        main(["download"])


def test_a_converted_file_is_found_under_the_published_name(tmp_path):
    path = tmp_path / "checkpoints" / "light_deg.safetensors"
    path.parent.mkdir()
    path.touch()
    (path.parent / "not_light_deg.safetensors").touch()
    assert find_published("light_deg", models_dir=tmp_path) == path
