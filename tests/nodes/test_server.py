"""The pack in a running ComfyUI: what its people see, over the same HTTP and websocket."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.nodes.recorder import object_info, recorded_nodes
from tests.nodes.server import FOLDER, ROOT, Refused

pytestmark = pytest.mark.host

OURS = {node.id: node for node in recorded_nodes()}


def node(kind, **inputs):
    """A node of a prompt; an input from another node is [its name, the output's place].

    What is not given of a node of ours is at its default, or the first of its choices.
    """
    defaults = {}
    if kind in OURS:
        for name, (_, reported) in object_info(OURS[kind])["input"]["required"].items():
            if "default" in reported or "options" in reported:
                defaults[name] = (
                    reported["default"] if "default" in reported else reported["options"][0]
                )
    return {"class_type": kind, "inputs": defaults | inputs}


MODEL, CLIP, VAE = (["model", place] for place in range(3))
LOADERS = {
    "model": node("STAR_LoadModel"),
    "frames": node("EmptyImage", width=40, height=24, batch_size=2, color=0x806040),
}


def conditioning(**changes):
    inputs = {"positive": ["text", 0], "negative": ["text", 1], "images": ["frames", 0]}
    inputs |= {"model": MODEL, "vae": VAE, "scale": 2.0}
    return node("STAR_Conditioning", **inputs | changes)


def sampling(**changes):
    return node("STAR_Sampling", **{"model": MODEL, "steps": 3} | changes)


def guider(source):
    """Without guidance, with the conditioning of `source`."""
    return node(
        "CFGGuider", model=["chunks", 0], positive=[source, 0], negative=[source, 1], cfg=1.0
    )


def colors(**changes):
    inputs = {"images": ["decode", 0], "reference": ["frames", 0], "method": "none"}
    return node("STAR_ColorFix", **inputs | changes)


def chain(seed=1, **changes):
    """The whole method as a chain of nodes; `changes` puts other nodes in or in their place."""
    return {
        **LOADERS,
        "text": node("STAR_TextEncode", model=MODEL, clip=CLIP),
        "conditioning": conditioning(),
        "chunks": node("STAR_TemporalChunks", model=MODEL),
        "sampling": sampling(seed=seed),
        "guider": guider("conditioning"),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["sampling", 0],
            guider=["guider", 0],
            sampler=["sampling", 1],
            sigmas=["sampling", 2],
            latent_image=["conditioning", 2],
        ),
        "decode": node("STAR_VAEDecode", samples=["sample", 0], vae=VAE),
        "colors": colors(),
        "save": node("SaveImage", images=["colors", 0], filename_prefix="star"),
        **changes,
    }


def restore(seed=1, **changes):
    """The same in one node; `changes` are inputs of it."""
    inputs = {"model": MODEL, "vae": VAE, "images": ["frames", 0]}
    inputs |= {"scale": 2.0, "seed": seed, "steps": 3}
    return {
        **LOADERS,
        "restore": node("STAR_Restore", **inputs | changes),
        "save": node("SaveImage", images=["restore", 0], filename_prefix="star"),
    }


def pictures(server, result):
    """What SaveImage saved: (f h w c), uint8."""
    assert not result.error, "".join(
        [result.error["exception_message"], *result.error["traceback"]]
    )
    return np.stack([server.image(saved) for saved in result.outputs["save"]["images"]])


def test_the_host_lists_every_node_of_the_pack(server):
    reported, module = server.get("/object_info"), f"custom_nodes.{FOLDER}"
    assert {
        name for name, node in reported.items() if node["python_module"] == module
    } == OURS.keys()


@pytest.mark.parametrize("make, worker", [(chain, "sample"), (restore, "restore")])
def test_a_prompt_runs_with_progress_and_a_picture_a_step(server, make, worker):
    result = server.run(make(seed=10))
    assert pictures(server, result).shape == (2, 48, 80, 3)
    done = [data["value"] for kind, data in result.events if kind == "progress"]
    assert len(done) >= 3
    assert worker in result.executed
    assert len(result.previews) >= 3


@pytest.mark.parametrize("make", [chain, restore])
def test_nothing_runs_again_that_has_not_changed(server, make):
    first, second = server.run(make(seed=11)), server.run(make(seed=11))
    assert "save" in first.executed
    assert second.executed == []
    third = server.run(make(seed=12))
    assert not {"model", "vae", "frames", "text", "conditioning", "chunks"} & set(third.executed)


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param(chain(sampling=sampling(seed=13, steps=1000)), id="chain"),
        pytest.param(restore(seed=13, steps=1000), id="restore"),
    ],
)
def test_an_interrupt_ends_a_run_early_and_leaves_the_host_working(server, prompt):
    done = []

    def interrupt(kind, data):
        if kind == "progress" and data["max"] == 1000:
            done.append(data["value"])
            if len(done) == 1:
                server.interrupt()

    result = server.run(prompt, on_event=interrupt)
    assert result.interrupted and not result.error
    assert done[-1] < 500
    assert server.run(restore(seed=14)).error is None


TINY_CHUNKS = node("STAR_TemporalChunks", model=MODEL, chunk_frames=8, chunk_overlap=8)
PICTURES = node("EmptyLatentImage", width=80, height=48, batch_size=2)
ONE_FRAME = node("EmptyImage", width=40, height=24, batch_size=1, color=0)


@pytest.mark.parametrize(
    "prompt, kind, words",
    [
        pytest.param(
            *(chain(chunks=TINY_CHUNKS), "STAR_TemporalChunks", "overlap"),
            id="overlap as long as the chunk",
        ),
        pytest.param(
            chain(
                other=node("VAELoader", vae_name="pixel_space"),
                conditioning=conditioning(vae=["other", 0]),
            ),
            *("STAR_Conditioning", "VAE of STAR Load Model"),
            id="the VAE of another model",
        ),
        pytest.param(
            *(chain(sample=PICTURES), "STAR_VAEDecode", "not of a clip"),
            id="latents of pictures",
        ),
        pytest.param(
            chain(one=ONE_FRAME, colors=colors(reference=["one", 0], method="adain")),
            *("STAR_ColorFix", "frames"),
            id="colours of another number of frames",
        ),
    ],
)
def test_an_error_names_the_node_and_what_to_do(server, prompt, kind, words):
    error = server.run(prompt).error
    assert error and error["node_type"] == kind
    name = server.get(f"/object_info/{kind}")[kind]["display_name"]
    assert error["exception_message"].startswith(f"{name}: ")
    assert words in error["exception_message"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"guider": guider("text")}, id="text without the video"),
        pytest.param(
            {"other": conditioning(scale=4.0), "guider": guider("other")},
            id="latents of another size",
        ),
    ],
)
def test_what_the_hosts_sampler_cannot_sample_is_to_come_from_star_conditioning(server, changes):
    error = server.run(chain(**changes)).error
    assert error and "STAR Conditioning" in error["exception_message"]


@pytest.mark.parametrize(
    "prompt, kind, words",
    [
        (chain(sampling=sampling(solver="slow")), "STAR_Sampling", "heun"),
        (chain(model=node("STAR_LoadModel", model_name="lost.pt")), "STAR_LoadModel", "lost.pt"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_by_the_host_or_by_the_node(
    server, prompt, kind, words
):
    """Hosts since 0.8 compare it with the list."""
    try:
        error = server.run(prompt).error
    except Refused as refused:
        assert "value_not_in_list" in str(refused) and kind in str(refused)
    else:
        assert error and error["node_type"] == kind and words in error["exception_message"]


def test_a_workflow_that_fetched_its_model_runs_again_when_the_file_is_there(server):
    """Hosts since 0.8 refuse a choice that is no longer in the list."""
    from star_core.checkpoints.download import PUBLISHED
    from star_core.model import BUILT_IN

    for name, source in zip(("light_deg", "svd_vae"), BUILT_IN["tiny"], strict=True):
        target = PUBLISHED[name].within(server.base / "models")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        # As the download leaves it: with the hash that was checked, nothing is asked again.
        target.with_name(f"{target.name}.sha256").write_text("checked", encoding="utf-8")
    model = {"model_name": "light_deg (download)", "vae_name": "svd_vae (download)"}
    result = server.run(restore(seed=15) | {"model": node("STAR_LoadModel", **model)})
    assert pictures(server, result).shape == (2, 48, 80, 3)


def test_a_number_out_of_range_is_refused_before_anything_runs(server):
    with pytest.raises(Refused, match="bigger than max"):
        server.run(restore(scale=99.0))


def test_a_video_goes_from_file_to_file(server, tmp_path):
    """To what the command line makes of it, and shown on the canvas."""
    from star_core.demo import DATA, DEGRADED
    from star_core.video_io import open_video

    prompt = {
        "model": LOADERS["model"],
        "load": node("LoadVideo", file=server.upload(DATA / DEGRADED)),
        "restore": node(
            "STAR_RestoreVideo",
            **{"model": MODEL, "vae": VAE, "video": ["load", 0]},
            **{"scale": 1.0, "steps": 1, "cfg": 1.0, "chunk_frames": 8, "chunk_overlap": 0},
            **{"shots": "off", "filename_prefix": "video/restored"},
        ),
        "save": node(
            "SaveVideo", video=["restore", 0], filename_prefix="again", format="auto", codec="auto"
        ),
    }
    result = server.run(prompt)
    assert not result.error
    (shown,) = result.outputs["restore"]["images"]
    assert (shown["filename"], shown["subfolder"]) == ("restored_00001_.mp4", "video")
    restored = server.base / "output" / "video" / shown["filename"]
    source, found = open_video(DATA / DEGRADED), open_video(restored)
    assert found.info.timestamps == pytest.approx(source.info.timestamps, abs=1e-3)
    assert len(list(found)) == len(source)
    left = [path for path in restored.parent.iterdir() if "restored" in path.name]
    assert left == [restored]
    done = [data["value"] for kind, data in result.events if kind == "progress"]
    assert len(done) >= 3
    assert list((server.base / "output").glob("again*.mp4"))
    assert server.run(prompt).executed == []


def test_a_trimmed_video_goes_on_through_the_hosts_nodes(server, tmp_path):
    """Before and after restoring; frames, sound and rate fit together everywhere."""
    from imageio_ffmpeg import get_ffmpeg_exe

    from star_core.video_io import open_video

    if "Video Slice" not in server.get("/object_info"):
        pytest.skip("this host has no node Video Slice (Trim Video)")
    film = tmp_path / "film.mp4"
    command = [get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "testsrc2=s=64x48:r=10:d=3"]
    command += ["-f", "lavfi", "-i", "sine=d=3", "-c:v", "libx264", "-g", "12", "-bf", "3"]
    subprocess.run([*command, "-c:a", "aac", film], check=True)

    def slice_of(video, start, duration):
        return node(
            "Video Slice",
            **{"video": [video, 0], "start_time": start, "duration": duration},
            strict_duration=False,
        )

    def save(video, name):
        formats = {"format": "auto", "codec": "auto"}
        return node("SaveVideo", video=[video, 0], filename_prefix=f"trim/{name}", **formats)

    prompt = {
        "model": LOADERS["model"],
        "load": node("LoadVideo", file=server.upload(film)),
        "slice": slice_of("load", 1.05, 1.5),
        "restore": node(
            "STAR_RestoreVideo",
            **{"model": MODEL, "vae": VAE, "video": ["slice", 0], "scale": 2.0, "steps": 1},
            **{"cfg": 1.0, "strength": 0.5, "shots": "off", "filename_prefix": "trim/restored"},
        ),
        "again": slice_of("restore", 0.4, 0.6),
        "components": node("GetVideoComponents", video=["restore", 0]),
        "create": node(
            "CreateVideo",
            **{"images": ["components", 0], "audio": ["components", 1], "fps": ["components", 2]},
        ),
        "save": save("restore", "saved"),
        "save_again": save("again", "again"),
        "save_created": save("create", "created"),
    }
    result = server.run(prompt)
    assert not result.error
    frames = {"restored": 15, "saved": 15, "again": 6, "created": 15}
    for name, count in frames.items():
        path = server.base / "output" / "trim" / f"{name}_00001_.mp4"
        info = open_video(path).info
        assert (info.frame_count, info.width, info.height) == (count, 128, 96), name
        assert info.constant_rate and info.fps == 10, name
        wave = subprocess.run(
            [get_ffmpeg_exe(), "-v", "error", "-i", path, "-f", "s16le", "-ac", "1", "-"],
            capture_output=True,
            check=True,
        ).stdout
        assert len(wave) / 2 / 44100 == pytest.approx(count / 10, abs=0.06), name


@pytest.mark.parametrize(
    "color_fix, prompts",
    [
        pytest.param("none", [chain(seed=5), restore(seed=5)], id="the chain and the one node"),
        pytest.param("adain", [restore(seed=5, color_fix="adain")], id="with colours"),
    ],
)
def test_nodes_give_what_the_command_line_gives(server, tmp_path, color_fix, prompts):
    """To one 8-bit level."""
    from PIL import Image  # pyright: ignore[reportMissingImports]

    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (3, 6, 10, 3), dtype=np.uint8)
    loaded = {}
    for i, picture in enumerate(noise.repeat(4, 1).repeat(4, 2)):
        file = tmp_path / "in" / f"frame{i}.png"
        Image.fromarray(picture).save(file)
        loaded[f"load{i}"] = node("LoadImage", image=server.upload(file))
    loaded["pair"] = node("ImageBatch", image1=["load0", 0], image2=["load1", 0])
    loaded["frames"] = node("ImageBatch", image1=["pair", 0], image2=["load2", 0])
    command = [sys.executable, "-m", "star_core", "upscale", tmp_path / "in", tmp_path / "out"]
    command += ["--scale", "2", "--seed", "5", "--solver-mode", "normal", "--steps", "3"]
    subprocess.run([*command, "--color-fix", color_fix], cwd=ROOT, check=True)
    saved = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "out").iterdir())]
    expected = np.stack(saved).astype(int)
    for prompt in prompts:
        ours = pictures(server, server.run(prompt | loaded)).astype(int)
        assert np.abs(ours - expected).max() <= 1
