import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_core.degradation.compression import codec_round_trip, jpeg
from star_core.degradation.ops import gaussian_blur


def moving_texture(frames: int = 5, size: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    texture = gaussian_blur(torch.rand(1, 3, size, size + frames, generator=generator), 1.5)
    texture = (texture - 0.5) * 3 + 0.5
    return torch.cat([texture[..., f : f + size] for f in range(frames)]).clamp(0, 1)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).square().mean().item()


def test_jpeg_agrees_with_libjpeg(tmp_path):
    image = pytest.importorskip("PIL.Image")
    import numpy as np

    video = moving_texture(1)
    array = (video[0].permute(1, 2, 0) * 255).round().byte().numpy()
    image.fromarray(array).save(tmp_path / "x.jpg", quality=60, subsampling="4:2:0")
    decoded = torch.from_numpy(np.asarray(image.open(tmp_path / "x.jpg")).copy())
    theirs, ours = decoded.permute(2, 0, 1)[None] / 255, jpeg(video, 60.0)
    # libjpeg rounds more often and interpolates chroma: near each other, not equal.
    assert error(ours, theirs) < 0.3 * error(ours, video)


def test_jpeg_is_worse_at_lower_quality_frame_by_frame():
    video = moving_texture(2)
    out = jpeg(video, torch.tensor([90.0, 20.0]))
    assert error(out[1], video[1]) > 3 * error(out[0], video[0])
    torch.testing.assert_close(out[1:], jpeg(video[1:], 20.0))


def test_jpeg_at_quality_100_keeps_luma():
    video = moving_texture(1).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert (jpeg(video, 100.0) - video).abs().max() < 1 / 255


@given(h=st.integers(1, 40), w=st.integers(1, 40))
def test_jpeg_keeps_any_size(h, w):
    video = torch.full((1, 3, h, w), 0.5)
    assert jpeg(video, 50.0).shape == video.shape


@pytest.mark.parametrize(
    ("codec", "good", "bad"),
    [("libx264", {"crf": 12}, {"crf": 40}), ("mpeg4", {"qscale": 2}, {"qscale": 25})],
)
def test_codec_error_follows_its_quality(codec, good, bad):
    video = moving_texture()
    good, bad = (codec_round_trip(video, codec, **rate) for rate in (good, bad))
    assert good.shape == bad.shape == video.shape
    assert error(bad, video) > 3 * error(good, video)


def test_codec_obeys_the_bitrate():
    video = moving_texture(8, 64)
    low, high = (codec_round_trip(video, "libx264", bitrate=rate) for rate in (2e4, 2e6))
    assert error(low, video) > 2 * error(high, video)


def test_codec_sees_the_clip_not_single_frames():
    # A still scene with noise: prediction from the frame before removes most of the flicker.
    still = moving_texture(1).expand(6, -1, -1, -1)
    noise = torch.randn(still.shape, generator=torch.Generator().manual_seed(1)) * 0.03
    noisy = (still + noise).clamp(0, 1)
    out = codec_round_trip(noisy, "libx264", crf=32)
    assert out.diff(dim=0).abs().mean() < 0.5 * noisy.diff(dim=0).abs().mean()


def test_codec_takes_odd_and_tiny_sizes_and_repeats_itself():
    video = moving_texture(3)[..., :5, :17]
    first, second = (codec_round_trip(video, "libx265", crf=20) for _ in range(2))
    assert first.shape == video.shape and torch.equal(first, second)


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ({}, "exactly one of"),
        ({"crf": 20, "bitrate": 1e5}, "exactly one of"),
        ({"qscale": 3}, "libx264 has no such rate control"),
    ],
)
def test_codec_refuses_a_rate_control_it_has_not(rate, message):
    with pytest.raises(ValueError, match=message):
        codec_round_trip(torch.rand(1, 3, 16, 16), "libx264", **rate)
