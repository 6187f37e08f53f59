"""STAR's VAE under the host's own nodes."""

import importlib

import pytest
import torch

from star_core.planning.meta_memory import LiveTensors
from star_core.vae.frame_vae import VideoVAE
from star_core.vae.load import load_frame_vae
from star_core.vae.patch import PatchGeometry, PatchVAE
from star_core.vae.small_decoder import SmallDecodedGeometry, SmallDecoderConfig
from star_core.vae.svd import svd_vae
from tests.paths import ROOT

pytestmark = pytest.mark.host

TINY = ROOT / "star_core" / "weights" / "tiny_vae.safetensors"


def small_svd() -> VideoVAE:
    """SVD's shape (factor 8, 4 channels, windows of 3), narrow, every weight random."""
    return randomised(svd_vae({"block_out_channels": [32] * 4, "layers_per_block": 1}))


def with_small_decoder() -> VideoVAE:
    """A VAE of tiny's size, with a small decoder that mixes frames, every weight random."""
    decoder = SmallDecoderConfig(latent_channels=32, factor=4, width=8, blocks=1)
    return randomised(SmallDecodedGeometry(vae=PatchGeometry(), decoder=decoder).build())


def randomised(vae: VideoVAE) -> VideoVAE:
    generator = torch.Generator().manual_seed(0)
    for tensor in vae.model.state_dict().values():
        tensor.normal_(std=0.05, generator=generator)
    vae.model.eval().requires_grad_(False)
    return vae


CORE = {
    "tiny": (lambda: load_frame_vae(TINY), 8),
    "svd": (small_svd, 3),
    "small": (with_small_decoder, 3),
}


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():  # as the host runs nodes
        yield


@pytest.fixture(scope="module")
def host_vae(pack):
    return importlib.import_module(".nodes.host_vae", pack.__name__)


@pytest.fixture(scope="module", params=CORE)
def both(request, host_vae):
    """The host's VAE, a core one of the same weights, and the length of its windows."""
    make, window = CORE[request.param]
    return host_vae.host_vae(make(), window=window), make(), window


@pytest.fixture(scope="module")
def nodes(pack):
    import nodes  # the host's: it comes first on the path

    assert hasattr(nodes, "VAEDecodeTiled")
    return nodes


def encode(nodes, vae, images):
    return nodes.VAEEncode().encode(vae, images)[0]["samples"]


def decode(nodes, vae, latents):
    return nodes.VAEDecode().decode(vae, {"samples": latents})[0]


def decode_tiled(nodes, vae, latents, **sizes):
    return nodes.VAEDecodeTiled().decode(vae, {"samples": latents}, **sizes)[0]


def images_of(video: torch.Tensor) -> torch.Tensor:
    return (video[0].movedim(0, -1) / 2 + 0.5).clamp(0, 1)


def test_the_hosts_nodes_give_what_the_core_gives(both, nodes):
    vae, core, window = both
    images = torch.rand(9, 32, 48, 3)
    latents = encode(nodes, vae, images)
    expected = core.encode(images.movedim(-1, 0)[None] * 2 - 1)
    torch.testing.assert_close(latents * core.scaling_factor, expected, rtol=1e-5, atol=1e-5)
    video = core.decode(expected, window=window, overlap=1)
    torch.testing.assert_close(decode(nodes, vae, latents), images_of(video), rtol=0, atol=1e-5)


def test_time_is_mixed_inside_a_window_by_a_vae_that_mixes_it(both, nodes):
    vae, core, window = both
    latents = torch.randn(1, core.latent_channels, window, 4, 4) / core.scaling_factor
    whole = decode(nodes, vae, latents)
    alone = torch.cat([decode(nodes, vae, latents[:, :, [i]]) for i in range(window)])
    mixes = not isinstance(core.model, PatchVAE)
    assert ((whole - alone).abs().max() > 1e-3) == mixes


def test_odd_sizes_are_cropped_in_the_middle(both, nodes):
    vae, core, _ = both
    images = torch.rand(2, 4 * core.factor + 3, 5 * core.factor + 1, 3)
    middle = images[:, 1 : 1 + 4 * core.factor, : 5 * core.factor]
    latents = encode(nodes, vae, images)
    assert latents.shape == (1, core.latent_channels, 2, 4, 5)
    assert torch.equal(latents, encode(nodes, vae, middle))


def test_one_tile_is_the_plain_result(both, nodes):
    vae, core, _ = both
    images = torch.rand(9, 64, 64, 3)
    latents = nodes.VAEEncodeTiled().encode(vae, images, 64, 0)[0]["samples"]
    assert torch.equal(latents, encode(nodes, vae, images))
    tiled = decode_tiled(nodes, vae, latents, tile_size=64, overlap=0)
    assert torch.equal(tiled, decode(nodes, vae, latents))


def test_several_tiles_are_close_to_the_plain_result(nodes, host_vae):
    vae = host_vae.host_vae(load_frame_vae(TINY), window=8)
    x = torch.linspace(0, 6, 72)
    image = torch.sin(x[:, None, None] * torch.tensor([1.0, 2.0, 3.0]) + x[:, None]) / 3 + 0.5
    images = torch.stack([image[:64].roll(2 * i, 1) for i in range(10)])
    sizes = {"overlap": 16, "temporal_size": 8, "temporal_overlap": 4}
    tiled = nodes.VAEEncodeTiled().encode(vae, images, 64, **sizes)[0]["samples"]
    latents = encode(nodes, vae, images)
    assert tiled.shape == latents.shape == (1, 32, 10, 16, 18)
    assert (tiled - latents).abs().mean() < 0.1 * latents.std()
    plain = decode(nodes, vae, latents)
    tiled = decode_tiled(nodes, vae, latents, tile_size=64, **sizes)
    assert tiled.shape == images.shape
    assert 0 < (tiled - plain).abs().mean() < 0.01


def test_inputs_stay_as_they_are(both, nodes):
    vae, core, _ = both
    images, latents = torch.rand(3, 16, 16, 3), torch.randn(1, core.latent_channels, 3, 2, 2)
    before = images.clone(), latents.clone()
    encode(nodes, vae, images)
    decode(nodes, vae, latents)
    decode_tiled(nodes, vae, latents, tile_size=64)
    assert torch.equal(images, before[0]) and torch.equal(latents, before[1])


def test_the_host_saves_it_in_the_names_that_are_loaded(host_vae):
    core = load_frame_vae(TINY)
    saved = host_vae.host_vae(load_frame_vae(TINY)).get_sd()
    assert saved.keys() == core.model.state_dict().keys()


def test_weights_move_with_the_hosts_patcher(host_vae):
    vae = host_vae.host_vae(small_svd())
    assert vae.patcher.model_size() == sum(t.nbytes for t in vae.get_sd().values())
    vae.patcher.model.to("meta")
    assert vae.first_stage_model.video_vae.model.device.type == "meta"


def test_interruption_ends_encoding_and_decoding_within_a_frame_or_window(both, nodes, monkeypatch):
    from comfy import model_management as mm  # pyright: ignore[reportMissingImports]

    vae, core, window = both
    calls = []

    def interrupted(name, original):
        def call(*args, **kwargs):
            calls.append(name)
            mm.interrupt_current_processing()
            return original(*args, **kwargs)

        return call

    model = vae.first_stage_model.video_vae.model
    for name in ("encode", "decode"):
        monkeypatch.setattr(model, name, interrupted(name, getattr(model, name)))
    with pytest.raises(mm.InterruptProcessingException):
        encode(nodes, vae, torch.rand(3, 16, 16, 3))
    with pytest.raises(mm.InterruptProcessingException):
        decode(nodes, vae, torch.randn(1, core.latent_channels, 3 * window, 2, 2))
    assert calls == ["encode", "decode"]
    assert not mm.processing_interrupted()


def test_latents_of_pictures_are_refused_with_a_cure(both, nodes):
    vae, core, _ = both
    for run in (decode, decode_tiled):
        sizes = {"tile_size": 64} if run is decode_tiled else {}
        with pytest.raises(ValueError, match="encode with the VAE of STAR Load Model"):
            run(nodes, vae, torch.randn(7, core.latent_channels, 4, 4), **sizes)


def test_latents_of_another_vae_are_refused_with_both_numbers(both, nodes):
    vae, core, _ = both
    with pytest.raises(ValueError, match=f"have 5 channels.* this one has {core.latent_channels}"):
        decode(nodes, vae, torch.randn(1, 5, 3, 4, 4))


def test_another_models_vae_is_refused_by_its_name(host_vae):
    from comfy.sd import VAE  # pyright: ignore[reportMissingImports]

    with pytest.raises(ValueError, match=r"PixelspaceConversionVAE.*STAR Load Model"):
        host_vae.star_vae(VAE(sd={"pixel_space_vae": torch.ones(())}))


def test_windows_that_cannot_be_are_refused(host_vae):
    with pytest.raises(ValueError, match=r"overlap must be in \[0, 3\), got 3"):
        host_vae.host_vae(small_svd(), window=3, overlap=3)


def test_memory_asked_for_follows_the_window_and_covers_what_is_used(both):
    """The peak of live tensors, counted on fake ones, against what the host is told."""
    vae, core, window = both
    factor, c = core.factor, core.latent_channels
    size = (1, c, 100, 256 // factor, 256 // factor)
    asked = vae.memory_used_decode(torch.Size(size), torch.float32)
    short = torch.Size([1, c, window, *size[3:]])
    assert asked == vae.memory_used_decode(short, torch.float32)
    used = peak_bytes(core, window)
    assert used["decode"] < asked < 2 * used["decode"]
    images = torch.Size([1, 3, 7, 256, 256])
    asked = vae.memory_used_encode(images, torch.float32) - 4 * images.numel()
    assert used["encode"] < asked < 2 * used["encode"]


def peak_bytes(core: VideoVAE, window: int) -> dict[str, int]:
    """Bytes of live tensors at the peak of encoding a frame and decoding a window of 256x256."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    peaks = {}
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode():
        fake = core.geometry.build()
        for name, run, shape in (
            ("encode", fake._moments, (1, 3, 256, 256)),
            ("decode", fake._decode, (1, core.latent_channels, window, *[256 // core.factor] * 2)),
        ):
            x = torch.empty(shape)
            with LiveTensors() as live:
                run(x)
            peaks[name] = live.peak
    return peaks
