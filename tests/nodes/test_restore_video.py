"""STAR_RestoreVideo: the command line's result, through the host's MODEL, VAE and VIDEO."""

import importlib
import inspect
import math
import subprocess
from dataclasses import replace
from fractions import Fraction
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe

from star_core.cli import main
from star_core.resume import work_folder
from star_core.video_io import open_sink, open_video

pytestmark = pytest.mark.host

STEPS = 3
INPUTS: dict[str, Any] = {
    "scale": 2.0,
    "width": 0,
    "height": 0,
    "seed": 5,
    "steps": STEPS,
    "cfg": 2.0,
    "noise_level": -1,
    "strength": 1.0,
    "chunk_frames": 3,
    "chunk_overlap": 1,
    "tile_size": 0,
    "tile_overlap": 64,
    "color_fix": "auto",
    "preset": "faithful",
    "shots": "off",
    "prompt": "a good video",
    "format": "mkv (lossless)",
    "filename_prefix": "video/STAR",
    "folder": "output",
}
OPTIONS = ["--scale", "2", "--seed", "5", "--solver-mode", "normal", "--steps", str(STEPS)]
OPTIONS += ["--cfg", "2", "--chunk-frames", "3", "--chunk-overlap", "1", "--shots", "off"]


class Host:
    """The node, a MODEL, a VAE and folders of the host's own."""

    def __init__(self, pack, folder) -> None:
        def module(name: str) -> Any:
            return importlib.import_module(f".{name}", pack.__name__)

        self.loaders, self.node = module("nodes.loaders"), module("nodes.restore").StarRestoreVideo
        self.video, self.files = module("nodes.host_video"), module("nodes.host_model")
        tiny = "tiny (built in)"
        self.model, _, self.vae = self.loaders.StarLoadModel.execute(
            tiny, *3 * ["auto"], "none"
        ).args
        self.folder = folder

    def restore(self, video, **changes):
        """The VIDEO that comes out."""
        inputs = {"model": self.model, "vae": self.vae, "video": video, **INPUTS, **changes}
        with torch.inference_mode():
            return self.node.execute(**inputs).args[0]


@pytest.fixture
def host(pack, tmp_path, monkeypatch) -> Host:
    import folder_paths  # pyright: ignore[reportMissingImports]

    for kind in ("output", "temp"):
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    return Host(pack, tmp_path)


@pytest.fixture
def clip(tmp_path):
    """Seven frames with sound; the fourth stays twice as long."""
    generator = torch.Generator().manual_seed(2)
    frames = torch.rand(7, 3, 4, 5, generator=generator)
    frames = torch.nn.functional.interpolate(frames, (12, 16), mode="bicubic").clamp(0, 1)
    with open_sink(tmp_path / "silent.mkv", width=16, height=12, fps=Fraction(10)) as sink:
        for frame in frames:
            sink.write(frame)
    command = [get_ffmpeg_exe(), "-v", "error", "-i", tmp_path / "silent.mkv"]
    command += ["-f", "lavfi", "-i", "sine=440:d=0.8", "-c:v", "ffv1", "-c:a", "aac"]
    command += ["-vf", r"setpts='PTS+if(gt(N\,3)\,0.1/TB\,0)'", "-fps_mode", "vfr"]
    subprocess.run([*command, tmp_path / "clip.mkv"], check=True)
    return tmp_path / "clip.mkv"


def from_file(path):
    from comfy_api.latest import InputImpl  # pyright: ignore[reportMissingImports]

    return InputImpl.VideoFromFile(str(path))


def from_memory(path):
    from comfy_api.latest import InputImpl  # pyright: ignore[reportMissingImports]

    return InputImpl.VideoFromFile(BytesIO(path.read_bytes()))


def frames_of(path):
    return torch.stack(list(open_video(path)))


def by_command_line(clip, *options):
    out = clip.with_name("expected.mkv")
    assert main(["upscale", str(clip), str(out), *OPTIONS, *options]) == 0
    return out


@pytest.mark.parametrize(
    "changes, options",
    [
        ({}, []),
        (
            {"strength": 0.5, "tile_size": 32, "tile_overlap": 8},
            ["--strength", "0.5", "--tile", "32:8"],
        ),
    ],
    ids=["as it comes", "half strength, tiles"],
)
def test_it_gives_what_the_command_line_gives(host, clip, changes, options):
    """To one 8-bit level, with the same sound and times."""
    restored = host.restore(from_file(clip), **changes).get_stream_source()
    expected = by_command_line(clip, *options)
    difference = (frames_of(restored) - frames_of(expected)).abs().max()
    assert difference <= 1.01 / 255
    assert open_video(restored).info.timestamps == open_video(expected).info.timestamps
    assert not open_video(restored).info.constant_rate
    assert [s.codec for s in open_video(restored).header.streams] == ["aac"]


def test_windows_of_a_long_video_come_one_after_the_other(host, clip, monkeypatch):
    """And nothing holds the whole clip: the windows are those of the command line."""
    chunk = host.video.Settings().chunk
    monkeypatch.setattr(
        host.video,
        "upscale",
        _with_chunks(host.video.upscale, replace(chunk, length=3, overlap=1, merged=0)),
    )
    restored = host.restore(from_file(clip)).get_stream_source()
    expected = by_command_line(clip, "--merge-up-to", "0")
    assert (frames_of(restored) - frames_of(expected)).abs().max() <= 1.01 / 255


def _with_chunks(upscale, chunk):
    def changed(job, whole, get_model, *, get_shots, **options):
        settings = replace(whole.settings, chunk=chunk)

        def scenes(source):
            return [replace(scene, settings=settings) for scene in get_shots(source)]

        return upscale(job, whole, get_model, get_shots=scenes, **options)

    return changed


def test_a_video_without_a_file_is_stored_without_loss_first(host, clip):
    from comfy_api.latest import InputImpl, Types  # pyright: ignore[reportMissingImports]

    # The host's own decoder takes no less than 32 columns.
    frames = frames_of(clip).repeat_interleave(2, -1).repeat_interleave(2, -2)
    sound = {"waveform": torch.linspace(-1, 1, 2 * 8000).reshape(1, 2, 8000), "sample_rate": 16000}
    images = frames.movedim(1, -1)
    video = InputImpl.VideoFromComponents(
        Types.VideoComponents(images=images, audio=sound, frame_rate=Fraction(30000, 1001))
    )
    with host.video.file_of(video) as (path, excerpt):
        assert not excerpt.is_trimmed and excerpt.crop is None
        stored = open_video(path)
        assert torch.equal(torch.stack(list(stored)), frames)
        assert stored.info.fps == Fraction(30000, 1001) and stored.info.constant_rate
        heard = from_file(path).get_components().audio
        assert heard["sample_rate"] == 16000
        # Both channels are as long as the pictures, as the host's Save Video has it.
        assert heard["waveform"].numel() == 2 * math.ceil(7 * 16000 * 1001 / 30000)
        first = path.read_bytes()
    assert not path.exists()
    with host.video.file_of(video) as (path, _):
        assert path.read_bytes() == first  # or no run could be gone on with
    for format, suffix in (("mp4 (H.264)", ".mp4"), ("mov (ProRes)", ".mov")):
        restored = host.restore(video, format=format).get_stream_source()
        assert restored.endswith(suffix)
        assert len(open_video(restored)) == 7
        assert len(open_video(restored).header.streams) == 1


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("alpha", ["none", "in the images", "beside them"])
def test_a_video_without_a_file_keeps_its_bits_and_its_alpha(host, bits, alpha):
    from comfy_api.latest import InputImpl, Types  # pyright: ignore[reportMissingImports]

    depth = {"bit_depth": bits} if _takes(InputImpl.VideoFromComponents, "bit_depth") else {}
    if bits == 10 and not depth:
        pytest.skip("this host's VIDEO has no bit_depth")
    if alpha == "beside them" and not _takes(Types.VideoComponents, "alpha"):
        pytest.skip("this host's VideoComponents has no alpha")
    codes = torch.arange(3 * 8 * 10 * 4).reshape(3, 8, 10, 4) * 7 % 2**bits
    images, opacity = codes[..., :3] / (2**bits - 1), codes[..., 3:] / (2**bits - 1)
    beside = {"alpha": opacity[..., 0]} if alpha == "beside them" else {}
    if alpha == "in the images":
        images = torch.cat([images, opacity], dim=-1)
    components = Types.VideoComponents(images=images, frame_rate=Fraction(10), **beside)
    video = InputImpl.VideoFromComponents(components, **depth)
    if beside and video.get_components().alpha is None:
        video.get_components = lambda: components  # 0.28 loses it, later ones do not
    with host.video.file_of(video) as (path, _):
        stored = open_video(path)
        assert stored.info.bit_depth == bits
        expected = images if alpha != "beside them" else torch.cat([images, opacity], dim=-1)
        assert stored.info.has_alpha == (alpha != "none")
        difference = torch.stack(list(stored)) - expected.movedim(-1, 1)
        assert difference.abs().max() < 0.01 / 2**bits


def _takes(function, name: str) -> bool:
    return name in inspect.signature(function).parameters


@pytest.fixture
def film(tmp_path):
    """Two seconds of 10 frames each, brighter by 0.045 from frame to frame, with B-frames and a key
    frame every 8; a tick every 0.2 s, the first at 0.1 s.
    """
    picture = r"color=s=32x24:r=10:d=2,geq=lum='16+10*N+X/2':cb=118+Y:cr=128"
    ticks = r"exp(-200*mod(t+0.1\,0.2))*sin(2000*2*PI*t):d=2:s=48000"
    command = [get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", picture]
    command += ["-f", "lavfi", "-i", f"aevalsrc={ticks}", "-c:v", "libx264", "-g", "8"]
    subprocess.run([*command, "-bf", "3", "-c:a", "aac", tmp_path / "film.mp4"], check=True)
    return tmp_path / "film.mp4"


def trimmed(video, start, duration):
    if not hasattr(video, "as_trimmed"):
        pytest.skip("this host's VIDEO cannot be trimmed (as_trimmed)")
    return video.as_trimmed(start, duration, strict_duration=False)


@pytest.mark.parametrize("start, duration", [(1.05, 0.5), (0, 0.3), (-0.4, 0), (1.7, 9)])
@pytest.mark.parametrize("place", ["file", "memory"])
def test_a_trimmed_video_is_restored_from_its_first_frame_to_its_last(
    host, film, start, duration, place
):
    """As the host's Get Video Components has it."""
    whole = from_file(film) if place == "file" else from_memory(film)
    video = trimmed(whole, start, duration)
    restored = host.restore(video, strength=0.0)
    expected, result = video.get_components(), restored.get_components()
    first, count = {1.05: (11, 5), 0: (0, 3), -0.4: (16, 4), 1.7: (17, 3)}[start]
    assert len(expected.images) == count
    assert result.images.shape == (count, 48, 64, 3)
    levels, found = frames_of(film).mean(dim=(1, 2, 3)), result.images.mean(dim=(1, 2, 3))
    assert (found - levels[first : first + count]).abs().max() < 0.02
    assert result.frame_rate == 10 and restored.get_duration() == pytest.approx(count / 10, abs=0.1)
    assert open_video(restored.get_stream_source()).info.timestamps[0] < 0.001


def test_the_sound_of_a_trimmed_video_is_cut_with_it(host, film):
    restored = host.restore(trimmed(from_file(film), 0.55, 0.6), format="mp4 (H.264)")
    sound = restored.get_components().audio
    wave, rate = sound["waveform"][0].mean(0).abs(), sound["sample_rate"]
    assert len(wave) / rate == pytest.approx(0.6, abs=2048 / rate)
    # The first frame is that of 0.6 s; ticks are at 0.7, 0.9 and 1.1 s.
    for moment in (0.1, 0.3, 0.5):
        near = wave[int((moment - 0.05) * rate) : int((moment + 0.05) * rate)]
        assert int(near.argmax()) / rate == pytest.approx(0.05, abs=1200 / rate)


def test_what_lies_outside_the_trim_has_no_part_in_the_result(host, film):
    """Windows neither reach beyond it nor are counted from before it."""
    video = trimmed(from_file(film), 0.8, 0.7)
    part = film.with_name("part.mkv")
    with host.video.file_of(video) as (path, excerpt):
        source = open_video(path, excerpt=excerpt)
        with open_sink(part, width=32, height=24, fps=Fraction(10)) as sink:
            for frame in source:
                sink.write(frame)
    restored = frames_of(host.restore(video).get_stream_source())
    expected = frames_of(host.restore(from_file(part)).get_stream_source())
    assert (restored - expected).abs().max() <= 3.01 / 255  # the part was rounded to 8 bit


class Cropped:
    """A VIDEO of the newest host, which no host that the tests run on has."""

    def __new__(cls, path, x, y, width, height):
        from comfy_api.latest import InputImpl  # pyright: ignore[reportMissingImports]

        class VideoFromFile(InputImpl.VideoFromFile):
            def get_dimensions(self):
                return width, height

        video = VideoFromFile(str(path))
        video._VideoFromFile__crop = (x, y, width, height)
        return video


def test_a_cropped_video_is_restored_inside_its_crop(host, film):
    restored = host.restore(Cropped(film, 8, 4, 16, 12), strength=0.0)
    frames = frames_of(restored.get_stream_source())
    assert frames.shape == (20, 3, 24, 32)
    expected = frames_of(host.restore(from_file(film), strength=0.0).get_stream_source())
    inside = expected[..., 8 + 6 : 32 - 6, 16 + 6 : 48 - 6]  # away from the border
    assert (frames[..., 6:-6, 6:-6] - inside).abs().max() < 0.03


def test_edits_that_cannot_be_seen_are_made_by_the_host(host, film):
    """Such as a later host's resizing."""
    from comfy_api.latest import InputImpl, Types  # pyright: ignore[reportMissingImports]

    class Resized(InputImpl.VideoFromFile):
        def get_dimensions(self):
            return 16, 12

        def get_components(self):
            images = torch.linspace(0, 1, 2 * 12 * 16 * 3).reshape(2, 12, 16, 3)
            return Types.VideoComponents(images=images, frame_rate=Fraction(10))

    assert frames_of(host.restore(Resized(str(film))).get_stream_source()).shape == (2, 3, 24, 32)


@pytest.mark.parametrize(
    "edit, words",
    [
        (
            lambda path: trimmed(from_file(path), 5, 1),
            "STAR Restore Video: the trim of film.mp4 is empty: no frame begins from 5 s to 6 s; "
            "choose a time within the file",
        ),
        (
            lambda path: Cropped(path, 24, 0, 16, 12),
            "STAR Restore Video: crop 16x12[+]24[+]0 is not inside the frame, "
            "which is displayed as 32x24: choose",
        ),
    ],
    ids=["trim", "crop"],
)
def test_an_empty_trim_or_a_crop_outside_is_told(host, film, edit, words):
    with pytest.raises(ValueError, match=words):
        host.restore(edit(film))


def test_a_lora_counts(host, clip):
    plain = frames_of(host.restore(from_file(clip)).get_stream_source())
    patched = host.model.clone()
    key = "diffusion_model.out.2.weight"
    weight = patched.model.state_dict()[key]
    patched.add_patches({key: ("diff", (torch.full_like(weight, 0.3),))})
    changed = frames_of(host.restore(from_file(clip), model=patched).get_stream_source())
    assert (changed - plain).abs().mean() > 0.01
    again = frames_of(host.restore(from_file(clip)).get_stream_source())
    assert torch.equal(again, plain)


def test_patches_of_tiles_and_speed_count(host, clip):
    from importlib import import_module

    sampling = import_module(host.video.__name__.replace("host_video", "host_sampling"))
    seen = []
    unet = host.model.model.diffusion_model
    working = unet.working

    def watched(**how):
        seen.append(how)
        return working(**how)

    unet.working = watched
    try:
        host.restore(from_file(clip), model=sampling.patch_work(host.model, attention_window=2))
    finally:
        del unet.working
    assert seen and {how["attention_window"] for how in seen} == {2}


def test_a_run_that_ends_early_is_gone_on_with(host, clip, monkeypatch):
    import comfy.model_management as mm  # pyright: ignore[reportMissingImports]

    expected = frames_of(host.restore(from_file(clip)).get_stream_source())
    calls, network = [], host.video.HostNetwork.__call__

    def counted(self, *args, **options):
        calls.append(1)
        if len(calls) == 10:
            mm.interrupt_current_processing()
        return network(self, *args, **options)

    monkeypatch.setattr(host.video.HostNetwork, "__call__", counted)
    with pytest.raises(mm.InterruptProcessingException):
        host.restore(from_file(clip))
    assert list(work_folder(host.folder / "output" / "video" / "STAR_00002_.mkv").iterdir())
    calls.clear()
    calls.extend([1] * 100)
    restored = host.restore(from_file(clip)).get_stream_source()
    assert restored.endswith("STAR_00002_.mkv")
    windows, guided = 3, 2
    assert len(calls) - 100 < windows * guided * STEPS
    assert torch.equal(frames_of(restored), expected)
    assert [p.name for p in (host.folder / "output" / "video").iterdir() if p.is_dir()] == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"scale": 0.5}, "STAR Restore Video: scale"),
        ({"chunk_overlap": 3}, "STAR Restore Video: overlap"),
    ],
)
def test_errors_name_the_node(host, clip, changes, words):
    with pytest.raises(ValueError, match=words):
        host.restore(from_file(clip), **changes)


def test_numbers_of_a_result_are_those_of_pictures(host, clip):
    """What the host's own nodes make of the file."""
    components = host.restore(from_file(clip)).get_components()
    assert components.images.shape == (7, 24, 32, 3)
    assert components.audio is not None
    assert np.isfinite(components.images.numpy()).all()


def test_hdr_stays_hdr_in_every_format_of_10_bits(host, tmp_path):
    picture = (
        "testsrc2=s=64x48:r=25,trim=end_frame=2,format=yuv420p10le,setparams=range=tv:"
        "colorspace=bt2020nc:color_primaries=bt2020:color_trc=smpte2084"
    )
    film = tmp_path / "pq.mkv"
    command = [get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", picture, "-c:v", "ffv1", film]
    subprocess.run(command, check=True)
    for format in ("mp4 (H.265)", "mkv (lossless)", "mov (ProRes)"):
        result = host.restore(from_file(film), format=format, strength=0.0, scale=1.0)
        info = open_video(result.get_stream_source(), hdr=True).info
        assert (info.color.hdr, info.color.primaries, info.bit_depth) == ("PQ", "bt2020", 10)
    with pytest.raises(ValueError, match="HDR .PQ. needs 10 bits"):
        host.restore(from_file(film), format="mp4 (H.264)", strength=0.0)
