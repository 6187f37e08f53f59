import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from star_core.diffusion.noise import FrameNoise, ReferenceNoise, brownian_noise

SHAPE = (1, 4, 5, 6, 7)
SIGMAS = torch.tensor([23.4717, 6.9871, 1.6252, 0.4, 0.0])
seeds = st.integers(0, 2**64 - 1)
both = pytest.mark.parametrize("kind", [FrameNoise, ReferenceNoise])


def all_noise(source, shape=SHAPE, offset=0):
    """Posterior of each frame, start, and the first two steps of the solver."""
    b, c, f, h, w = shape
    posterior = [source.posterior(offset + i, (b, c, h, w)) for i in range(f)]
    initial = source.initial(shape, offset)
    solver = source.solver(shape, SIGMAS, offset)
    return torch.stack(
        [
            torch.stack(posterior, dim=2),
            initial,
            *(solver(i, SIGMAS[i], SIGMAS[i + 1]) for i in range(2)),
        ]
    )


@both
@settings(max_examples=10)
@given(seed=seeds)
def test_a_seed_gives_the_same_noise_again(kind, seed):
    assert torch.equal(all_noise(kind(seed)), all_noise(kind(seed)))


@both
@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_outside_64_bits_are_refused(kind, seed):
    with pytest.raises(ValueError, match="2\\^64-1"):
        kind(seed)


def test_all_64_bits_of_the_seed_count():
    assert not torch.equal(all_noise(FrameNoise(1)), all_noise(FrameNoise(1 + 2**32)))


@both
def test_noise_leaves_the_global_generator_alone(kind):
    state = torch.get_rng_state()
    all_noise(kind(3))
    assert torch.equal(torch.get_rng_state(), state)


@both
def test_noise_is_standard_normal_and_its_parts_are_independent(kind):
    parts = all_noise(kind(5), (1, 4, 8, 24, 24))
    # 4 purposes x 8 frames, each 2304 numbers: correlations spread by 1/48
    vectors = parts[:, 0].transpose(1, 2).flatten(0, 1).flatten(1)
    correlation = torch.corrcoef(vectors) - torch.eye(len(vectors))
    assert correlation.abs().max() < 0.1
    assert parts.mean().abs() < 0.01 and (parts.std() - 1).abs() < 0.01


@given(st.integers(0, 4), st.integers(1, 5))
def test_a_cut_of_a_clip_gets_the_noise_of_the_whole(first, length):
    length = min(length, 5 - first)
    cut = all_noise(FrameNoise(7), (1, 4, length, 6, 7), offset=first)
    assert torch.equal(cut, all_noise(FrameNoise(7))[:, :, :, first : first + length])


@given(st.integers(0, 3), st.integers(0, 4))
def test_a_crop_of_a_picture_gets_the_noise_of_the_whole(y, x):
    crop = all_noise(FrameNoise(7, canvas=(6, 7), origin=(y, x)), (1, 4, 5, 3, 3))
    assert torch.equal(crop, all_noise(FrameNoise(7))[..., y : y + 3, x : x + 3])


def test_padding_of_a_crop_may_leave_the_canvas():
    noise = FrameNoise(7, canvas=(6, 7), origin=(-1, 5)).initial((1, 4, 5, 8, 8))
    assert torch.equal(noise[..., 1:7, :2], FrameNoise(7).initial(SHAPE)[..., 5:])


def test_frames_and_channels_of_reference_noise_are_drawn_in_order():
    """randn of the first posterior comes first, whatever follows."""
    generator = torch.Generator().manual_seed(666)
    source = ReferenceNoise(666, frame_major=False)
    for i in range(2):
        expected = torch.randn(1, 4, 6, 7, generator=generator)
        assert torch.equal(source.posterior(i, (1, 4, 6, 7)), expected)
    assert torch.equal(source.initial(SHAPE), torch.randn(SHAPE, generator=generator))


def test_reference_latents_are_filled_frame_by_frame():
    shorter = ReferenceNoise(1).initial((1, 4, 2, 6, 7))
    assert torch.equal(shorter, ReferenceNoise(1).initial(SHAPE)[:, :, :2])


def test_brownian_increments_add_up():
    noise = brownian_noise(SHAPE, SIGMAS, 11)
    a, b, c = SIGMAS[:3]
    whole = noise(0, a, c) * (a - c).sqrt()
    parts = noise(0, a, b) * (a - b).sqrt() + noise(1, b, c) * (b - c).sqrt()
    torch.testing.assert_close(whole, parts)


def test_brownian_noise_of_a_single_level_can_be_set_up():
    brownian_noise(SHAPE, torch.tensor([torch.inf, 23.5, 0.0]), 0)


def test_the_noise_of_solvers_is_the_path_from_high_to_low_noise():
    from torchsde import BrownianTree

    sigmas, shape = torch.tensor([3.0, 2.0, 1.0, 0.0]), (1, 2, 1, 2, 2)
    tree = BrownianTree(1.0, torch.zeros(shape), 3.0, entropy=7, tol=1e-6)
    noise = brownian_noise(shape, sigmas, 7)(1, sigmas[1], sigmas[2])
    increment = tree(1.0, 2.0)
    assert isinstance(increment, torch.Tensor)
    assert torch.equal(noise, -increment)
