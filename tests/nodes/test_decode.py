"""STAR VAE Encode, STAR VAE Decode and STAR Color Fix in the host."""

import importlib
import logging

import pytest
import torch

from star_core.color_fix import adain_color_fix, wavelet_color_fix
from star_core.diffusion.noise import FrameNoise
from star_core.vae.load import load_frame_vae
from star_core.windows.geometry import Padding, crop, minimal_padding, pad
from star_core.windows.tiling import Tile
from tests.paths import ROOT

pytestmark = pytest.mark.host

TINY = ROOT / "star_core" / "weights" / "tiny_vae.safetensors"


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def node(pack):
    return importlib.import_module(".nodes.decode", pack.__name__)


@pytest.fixture(scope="module")
def core():
    return load_frame_vae(TINY)


@pytest.fixture
def vae(pack):
    return importlib.import_module(".nodes.host_vae", pack.__name__).host_vae(
        load_frame_vae(TINY), window=8
    )


def encode(node, vae, images, *, tile=0, overlap=16, posterior="mean", seed=0):
    return node.StarVAEEncode.execute(images, vae, tile, overlap, posterior, seed).args[0]


def decode(node, vae, latent, *, tile=0, overlap=16, window=-1, window_overlap=1):
    return node.StarVAEDecode.execute(latent, vae, tile, overlap, window, window_overlap).args[0]


def fix(node, images, reference, method="adain", strength=1.0, smoothing=0.0):
    return node.StarColorFix.execute(images, reference, method, strength, smoothing).args[0]


def video_of(images):
    return images.movedim(-1, 0)[None] * 2 - 1


def images_of(video):
    return (video[0].movedim(0, -1) / 2 + 0.5).clamp(0, 1)


# --- Encode ---


def test_latents_are_the_cores_of_padded_frames_that_the_network_takes(node, vae, core):
    images = torch.rand(2, 45, 50, 3)
    latent = encode(node, vae, images)
    padding = minimal_padding(45, 50, vae_factor=4, levels=3)
    expected = core.encode(pad(video_of(images), padding, "replicate"))
    assert (latent["star_size"], latent["star_padding"]) == ((50, 45), padding)
    assert latent["samples"].shape[-2] % 8 == 2 and latent["samples"].shape[-1] % 8 == 0
    torch.testing.assert_close(
        latent["samples"] * core.scaling_factor, expected, rtol=1e-5, atol=1e-5
    )


def test_a_model_has_its_own_padding(pack, node, vae):
    loaders = importlib.import_module(".nodes.loaders", pack.__name__)
    tiny = loaders.StarLoadModel.execute(loaders.BUILT_IN_NAME, *3 * ["auto"], "none").args[0]
    latent = node.StarVAEEncode.execute(torch.rand(1, 20, 50, 3), vae, 0, 0, "mean", 0, tiny).args[
        0
    ]
    assert latent["star_padding"] == minimal_padding(20, 50, vae_factor=4, levels=2)
    assert latent["star_padding"] != encode(node, vae, torch.rand(1, 20, 50, 3))["star_padding"]


def test_a_sample_of_the_posterior_belongs_to_its_seed(node, vae, core):
    images = torch.rand(2, 40, 32, 3)
    sample = encode(node, vae, images, posterior="sample", seed=7)["samples"]
    noise = FrameNoise(7)
    expected = core.encode(video_of(images), noise=lambda i: noise.posterior(i, (1, 32, 10, 8)))
    torch.testing.assert_close(sample * core.scaling_factor, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(sample, encode(node, vae, images)["samples"])
    other = encode(node, vae, images, posterior="sample", seed=8)["samples"]
    assert not torch.equal(sample, other)


def test_an_unknown_posterior_is_refused(node, vae):
    with pytest.raises(ValueError, match="STAR VAE Encode: .*'mode': use mean or sample"):
        encode(node, vae, torch.rand(1, 8, 8, 3), posterior="mode")


# --- Decode ---


@pytest.mark.parametrize("tile", [0, 24])
@pytest.mark.parametrize("window", [-1, 3])
def test_frames_are_the_cores_with_the_same_tiles_and_windows(node, vae, core, tile, window):
    latents = torch.randn(1, 32, 9, 4, 8)
    images = decode(node, vae, {"samples": latents / core.scaling_factor}, tile=tile, window=window)
    video = core.decode(
        latents,
        window=8 if window == -1 else window,
        overlap=1,
        tile=Tile(size=24, overlap=16) if tile else None,
    )
    torch.testing.assert_close(images, images_of(video), rtol=0, atol=1e-5)


def test_what_was_padded_is_cropped_to_the_size_that_came_in(node, vae, core):
    latent = encode(node, vae, torch.rand(2, 45, 50, 3))
    whole = decode(node, vae, {"samples": latent["samples"]})
    images = decode(node, vae, latent)
    expected = crop(whole.movedim(-1, 1), Padding(*latent["star_padding"])).movedim(1, -1)
    assert images.shape == (2, 45, 50, 3)
    assert torch.equal(images, expected)


def test_a_batch_of_clips_comes_out_clip_after_clip(node, vae, core):
    latents = torch.randn(2, 32, 3, 2, 2)
    images = decode(node, vae, {"samples": latents})
    single = [decode(node, vae, {"samples": clip[None]}) for clip in latents]
    assert torch.equal(images, torch.cat(single))


def test_resized_latents_are_refused_instead_of_cropped_wrongly(node, vae):
    latent = encode(node, vae, torch.rand(1, 45, 50, 3))
    latent = latent | {"samples": torch.zeros(1, 32, 1, 20, 20)}
    with pytest.raises(ValueError, match="STAR VAE Decode: .*80x80 pixels.*64x72: resize frames"):
        decode(node, vae, latent)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((7, 32, 4, 4), "7x32x4x4.*VAE of STAR Load Model"),
        ((1, 4, 7, 4, 4), "4 channels.*this one has 32: decode with the VAE"),
    ],
)
def test_other_latents_are_refused_with_cause_and_cure(node, vae, shape, message):
    with pytest.raises(ValueError, match=f"STAR VAE Decode: .*{message}"):
        decode(node, vae, {"samples": torch.zeros(shape)})


def test_another_models_vae_is_refused(node):
    from comfy.sd import VAE  # pyright: ignore[reportMissingImports]

    vae = VAE(sd={"pixel_space_vae": torch.ones(())})
    with pytest.raises(ValueError, match=r"STAR VAE Encode: .*VAE of STAR Load Model"):
        encode(node, vae, torch.rand(1, 8, 8, 3))
    with pytest.raises(ValueError, match=r"STAR VAE Decode: .*VAE of STAR Load Model"):
        decode(node, vae, {"samples": torch.zeros(1, 32, 1, 2, 2)})


def test_tiles_and_windows_that_cannot_be_are_refused_by_the_node(node, vae):
    latent = {"samples": torch.zeros(1, 32, 1, 16, 16)}
    with pytest.raises(ValueError, match="STAR VAE Decode: tile overlap"):
        decode(node, vae, latent, tile=16, overlap=16)
    with pytest.raises(ValueError, match="STAR VAE Decode: overlap"):
        decode(node, vae, latent, window=2, window_overlap=2)


# --- In the host ---


@pytest.fixture(params=["OutOfMemoryError", "AcceleratorError"])
def small_memory(vae, monkeypatch, request):
    """A device on which no more than 32x32 pixels fit; lists the sizes that were tried."""
    error = getattr(torch, request.param, None)
    if error is None:
        pytest.skip(f"this torch has no {request.param}")
    model, sizes = vae.first_stage_model.video_vae.model, []

    def limited(run, factor):
        def call(x, *args, **kwargs):
            sizes.append(max(x.shape[-2:]) * factor)
            if sizes[-1] > 32:
                raise error("CUDA error: out of memory")
            return run(x, *args, **kwargs)

        return call

    monkeypatch.setattr(model, "encode", limited(model.encode, 1))
    monkeypatch.setattr(model, "decode", limited(model.decode, 4))
    return sizes


def test_out_of_memory_falls_back_to_smaller_tiles_and_says_so(
    node, vae, core, small_memory, caplog
):
    latents = torch.randn(1, 32, 1, 22, 32)
    with caplog.at_level(logging.WARNING):
        images = decode(node, vae, {"samples": latents / core.scaling_factor})
    assert small_memory[0] == 128 > small_memory[1] > small_memory[2] == 32
    assert [r.message for r in caplog.records] == [
        "Out of memory: trying again with tiles of 64 pixels",
        "Out of memory: trying again with tiles of 32 pixels",
    ]
    video = core.decode(latents, window=8, tile=Tile(size=32, overlap=8))
    torch.testing.assert_close(images, images_of(video), rtol=0, atol=1e-5)


def test_encoding_falls_back_as_well(node, vae, core, small_memory):
    images = torch.rand(2, 40, 64, 3)
    latents = encode(node, vae, images)["samples"]
    expected = core.encode(video_of(images), tile=Tile(size=32, overlap=8))
    assert small_memory[0] == 64 > small_memory[1]
    torch.testing.assert_close(latents * core.scaling_factor, expected, rtol=1e-5, atol=1e-5)


def test_out_of_memory_with_the_smallest_tiles_is_an_error(node, vae, monkeypatch):
    from comfy import model_management as mm  # pyright: ignore[reportMissingImports]

    def full(*args, **kwargs):
        raise mm.OOM_EXCEPTION("out of memory")

    monkeypatch.setattr(vae.first_stage_model.video_vae.model, "decode", full)
    with pytest.raises(mm.OOM_EXCEPTION):
        decode(node, vae, {"samples": torch.zeros(1, 32, 1, 32, 32)})


def test_another_error_is_no_reason_to_try_again(node, vae, monkeypatch):
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(vae.first_stage_model.video_vae.model, "decode", broken)
    with pytest.raises(RuntimeError, match="launch failure"):
        decode(node, vae, {"samples": torch.zeros(1, 32, 1, 32, 32)})
    assert len(calls) == 1


def test_progress_is_reported_and_an_interruption_ends_the_node(node, vae, monkeypatch):
    import comfy.utils  # pyright: ignore[reportMissingImports]
    from comfy import model_management as mm  # pyright: ignore[reportMissingImports]

    steps = []

    def hook(done, total, preview, node_id=None):
        steps.append((done, total))
        if steps == [(2, 7), (4, 7)]:
            mm.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    # Newer hosts leave out what follows within a tenth of a second.
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0, raising=False)
    with pytest.raises(mm.InterruptProcessingException):
        decode(node, vae, {"samples": torch.zeros(1, 32, 7, 2, 2)}, window=3)
    assert steps == [(2, 7), (4, 7)]


def test_inputs_stay_as_they_are_and_results_are_where_the_host_wants_them(node, vae):
    from comfy import model_management as mm  # pyright: ignore[reportMissingImports]

    images = torch.rand(3, 24, 20, 3)
    before = images.clone()
    latent = encode(node, vae, images)
    samples = latent["samples"].clone()
    decoded = decode(node, vae, latent)
    fixed = fix(node, decoded, images, smoothing=2.0)
    assert torch.equal(images, before) and torch.equal(latent["samples"], samples)
    assert latent.keys() == {"samples", "star_size", "star_padding", "star_frames"}
    for out in (decoded, fixed):
        assert out.device == mm.intermediate_device() and out.dtype == torch.float32
        assert out.is_contiguous() and out.shape == images.shape


# --- Colours ---


def test_colours_are_fixed_as_by_the_core(node):
    images, reference = torch.rand(2, 3, 16, 20, 3)
    for method, core_fix in (("adain", adain_color_fix), ("wavelet", wavelet_color_fix)):
        expected = core_fix(images.movedim(-1, 1), reference.movedim(-1, 1)).movedim(1, -1)
        fixed = fix(node, images, reference, method)
        torch.testing.assert_close(fixed, expected)
        half = fix(node, images, reference, method, strength=0.5)
        torch.testing.assert_close(half, (images + expected) / 2)


def test_alpha_is_left_alone(node):
    images = torch.rand(2, 8, 8, 4)
    fixed = fix(node, images, torch.rand(2, 8, 8, 3))
    assert torch.equal(fixed[..., 3], images[..., 3])
    assert not torch.equal(fixed[..., :3], images[..., :3])


def test_colour_fixes_that_cannot_be_are_refused_by_the_node(node):
    images = torch.rand(2, 8, 8, 3)
    with pytest.raises(ValueError, match="STAR Color Fix: .*'lab'"):
        fix(node, images, images, "lab")
    with pytest.raises(ValueError, match="STAR Color Fix: the video has 2 frames and the ref"):
        fix(node, images, images[:1])
