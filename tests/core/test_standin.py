"""The whole method on a stand-in for a GPU: no mixed devices, few copies, no waiting."""

import gc
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from star_core.color_fix import fix_colors
from star_core.degradation import PRESETS, degrade_video
from star_core.degradation.compression import jpeg
from star_core.degradation.estimate import estimate
from star_core.devices import fetch
from star_core.diffusion.denoiser import Denoiser
from star_core.diffusion.levels import guidance_of, levels_of
from star_core.diffusion.noise import FrameNoise, brownian_noise
from star_core.diffusion.samplers import SAMPLERS
from star_core.diffusion.shortcuts import BatchedFeatures, DeepFeatures, Shortcuts
from star_core.evaluation.evaluate import evaluate_frames
from star_core.metrics.dists import DISTS
from star_core.metrics.dover import DoverMeter
from star_core.metrics.lpips import LPIPS
from star_core.metrics.raft import RAFT, RAFTFlow
from star_core.metrics.video_convnext import VideoConvNeXt
from star_core.metrics.video_swin import VideoSwin
from star_core.model import BUILT_IN
from star_core.models.slicing import Slicing
from star_core.parity import DEFAULT, REFERENCE
from star_core.pipeline import Execution, Settings, ShotJob, restore
from star_core.sampling_defaults import SamplingDefaults
from star_core.star_checkpoint import StarModel, load_model
from star_core.vae.load import load_vae
from star_core.windows.canvas import Canvas, FrameSpan
from star_core.windows.chunking import ChunkConfig, chunked, overlapping_windows
from star_core.windows.tiling import Tile
from tests import cogvideox_files
from tests.metric_inputs import fill, pictures
from tests.standin import CARD, StandIn, on_card

FINE = Slicing(spatial_pixels=64, temporal_pixels=64, offload=True)  # several slices a layer


@pytest.fixture(scope="module")
def tiny():
    network, vae = BUILT_IN["tiny"]
    return load_model(network, dtype=torch.float32), load_vae(vae)


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = load_model(cogvideox_files.write_model(folder), dtype=torch.float32)
    return model, load_vae(cogvideox_files.write_vae(folder), scale=model.latents.scale)


def test_operations_on_tensors_of_two_devices_are_errors():
    with StandIn():
        there, here = torch.ones(2, device="cuda"), torch.ones(2)
        assert there.device == CARD and (there + torch.tensor(1.0)).is_cuda
        for mixed in (
            lambda: there + here,
            lambda: torch.cat([here, there]),
            lambda: here.lerp_(there, 0.5),
            lambda: nn.functional.linear(there, torch.ones(2, 2)),
            lambda: here[there.long()],
        ):
            with pytest.raises(RuntimeError, match="cuda:0"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def test_copies_and_waiting_are_counted():
    with StandIn() as card:
        x = torch.ones(2, device="cuda")
        assert not card.counts["to_card"]
        _ = x.new_tensor([1.0]), x[torch.tensor([0])], torch.ones(2).to(x)
        assert (card.counts["to_card"], card.counts["synchronisations"]) == (3, 3)
        y = torch.ones(2).to("cuda", non_blocking=True)
        assert (card.counts["to_card"], card.counts["synchronisations"]) == (4, 3)
        _ = y.tolist(), bool((x > 0).all()), x[x > 0], x.sum().item()
        assert (card.counts["from_card"], card.counts["synchronisations"]) == (0, 7)
        assert not on_card(x.cpu()) and card.counts["from_card"] == 1


def test_a_module_moves_to_the_card_and_back():
    module = nn.Linear(2, 2)
    with StandIn(), torch.inference_mode():
        module.to("cuda")
        assert isinstance(module.weight, nn.Parameter) and module.weight.device == CARD
        assert module(torch.ones(1, 2, device="cuda")).is_cuda
        module.cpu()
        assert module(torch.ones(1, 2)).device.type == "cpu"
        made_there = nn.Linear(2, 2, device="meta").to_empty(device="cuda")
        assert made_there(torch.ones(1, 2, device="cuda")).is_cuda


def test_what_is_copied_beside_must_have_arrived_before_it_is_used():
    with StandIn() as card:
        there = fetch(torch.ones(2), CARD)
        assert card.counts["beside"] == 1 and not card.counts["synchronisations"]
        early = there.__closure__[0].cell_contents  # pyright: ignore
        with pytest.raises(RuntimeError, match="before it has arrived"):
            early + 1
        assert ((there() + 1) == 2).all() and there() is early


def forward(model: StarModel, device: str, *, slicing: Slicing = FINE) -> torch.Tensor:
    config, generator = model.config, torch.Generator().manual_seed(0)
    noisy, hint = torch.randn(2, 1, config.in_dim, 4, 10, 8, generator=generator)
    y = torch.ones(1, config.context_length, config.context_dim)
    with torch.inference_mode(), model.network.working(slicing=slicing):
        inputs = (each.to(device) for each in (noisy, torch.tensor([500]), y, hint))
        return model.network(*inputs).cpu()


@pytest.mark.parametrize("name", ["tiny", "cogvideox"])
def test_a_forward_on_the_card_equals_that_on_the_cpu(name, request):
    model, _ = request.getfixturevalue(name)
    plain = forward(model, "cpu")
    with StandIn() as card:
        try:
            model.network.to("cuda")
            card.counts.clear()
            on_the_card = forward(model, "cuda")
        finally:
            counts = card.counts.copy()
            model.network.cpu()
    # Bits depend on where buffers begin in memory.
    torch.testing.assert_close(on_the_card, plain, rtol=1e-5, atol=1e-5)
    assert counts["operations"] > 500
    # Skip connections come back while the card works: one for each block of the decoder.
    assert counts["beside"] == len(getattr(model.network, "output_blocks", ()))


def restored(
    model: StarModel, vae: Any, device: str, *, frames: int = 6, steps: int = 3, **changes: Any
) -> torch.Tensor:
    clip = torch.rand(frames, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    settings = Settings(
        sampling=replace(model.sampling, steps=steps, solver_mode="normal", color_fix="none"),
        chunk=ChunkConfig.near(5, 1, vae.latent_frames),
        **changes,
    )
    behaviour, levels = settings.behaviour, model.config.downsamplings
    canvas = Canvas.of((64, 48), vae_factor=vae.factor, levels=levels, behaviour=behaviour)
    y = torch.ones(1, model.config.context_length, model.config.context_dim)
    positive, negative = model.prompts.of(None) if model.prompts else (y, -y)
    shot = ShotJob(
        span=FrameSpan.of(
            range(frames), chunk=settings.chunk, decode_window=3, behaviour=behaviour
        ),
        positive=positive,
        negative=negative,
        settings=settings,
        execution=Execution(device=device, slicing=FINE),
    )
    return torch.stack(list(restore(clip, model, vae, [shot], canvas)))


# Its padding is made for networks of more levels.
LIKE_THE_REFERENCE = replace(REFERENCE, padding=DEFAULT.padding)


@pytest.mark.parametrize(
    ("name", "frames", "behaviour"),
    [("tiny", 6, DEFAULT), ("tiny", 8, LIKE_THE_REFERENCE), ("cogvideox", 6, DEFAULT)],
)
def test_a_whole_clip_on_the_card_equals_that_on_the_cpu(name, frames, behaviour, request):
    model, vae = request.getfixturevalue(name)
    plain = restored(model, vae, "cpu", frames=frames, behaviour=behaviour)
    with StandIn():
        on_the_card = restored(model, vae, "cuda", frames=frames, behaviour=behaviour)
    torch.testing.assert_close(on_the_card, plain, rtol=1e-4, atol=1e-4)
    for module in (model.network, vae.model):
        assert not any(on_card(each) for each in module.state_dict().values())


def test_a_finished_frame_has_left_the_card_when_the_next_window_is_decoded(tiny, monkeypatch):
    model, vae = tiny
    decode, left = vae.decode_window, []

    def decode_window(latents: torch.Tensor, **options: Any) -> torch.Tensor:
        tensors = (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))
        left.append(sum(on_card(x) and x.shape == (3, 48, 64) for x in tensors))
        return decode(latents, **options)

    monkeypatch.setattr(vae, "decode_window", decode_window)
    with StandIn():
        restored(model, vae, "cuda", steps=1)
    assert len(left) > 1 and not any(left)


@pytest.mark.parametrize("name", ["tiny", "cogvideox"])
def test_encoding_and_decoding_on_the_card_equal_those_on_the_cpu(name, request):
    _, vae = request.getfixturevalue(name)
    video = torch.rand(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sides = 32 // vae.factor, 48 // vae.factor
    noise: Any = torch.ones(1, vae.latent_channels, 2, *sides)
    if vae.latent_frames == 1:
        noise = {i: noise[:, :, 0] for i in range(5)}.get

    @torch.inference_mode()
    def both() -> tuple[torch.Tensor, torch.Tensor]:
        latents = vae.encode(video, noise=noise, tile=Tile(size=32, overlap=16))
        return latents.cpu(), vae.decode(latents, tile=Tile(size=32, overlap=16)).cpu()

    plain = both()
    with StandIn():
        try:
            vae.model.to("cuda")
            on_the_card = both()
        finally:
            vae.model.cpu()
    torch.testing.assert_close(on_the_card, plain, rtol=1e-5, atol=1e-5)


def per_evaluation(model: StarModel, vae: Any, **changes: Any) -> dict[str, float]:
    """Counts of one evaluation of both windows: what a further step adds."""
    counts = []
    for steps in (3, 4):
        with StandIn() as card:
            restored(model, vae, "cuda", steps=steps, **changes)
        counts.append(card.counts)
    return {name: counts[1][name] - counts[0][name] for name in counts[1]}


# Of each window: timestep, alpha, sigma, hint and its weight; noise for all. With tiles or an
# offloaded skip connection, a few small copies for each.
@pytest.mark.parametrize(
    ("name", "changes", "to_card", "from_card"),
    [
        ("tiny", {}, 33, 13),
        (
            "tiny",
            {
                "strength": 0.5,
                "latent_tile": Tile(size=40, overlap=8),
                "shortcuts": Shortcuts(reuse=100),
            },
            167,
            85,
        ),
        ("cogvideox", {}, 14, 2),
        ("cogvideox", {"strength": 0.5}, 16, 2),
    ],
)
def test_nothing_waits_for_the_card_between_evaluations(name, changes, to_card, from_card, request):
    counts = per_evaluation(*request.getfixturevalue(name), **changes)
    assert counts["operations"] > 500
    assert counts["synchronisations"] == 0
    assert counts["to_card"] <= to_card and counts["from_card"] <= from_card


def test_a_forward_with_the_timestep_on_the_cpu_equals_one_with_it_on_the_card(tiny):
    network, config = tiny[0].network, tiny[0].config
    x, y = torch.rand(1, config.in_dim, 2, 10, 8), torch.ones(1, 77, config.context_dim)
    results = []
    with StandIn() as card, torch.inference_mode(), network.working(slicing=FINE):
        try:
            network.to("cuda")
            x, y = x.to("cuda"), y.to("cuda")
            for device in ("cpu", "cuda"):
                t = torch.tensor([500]).to(device)
                card.counts.clear()
                results.append(network(x, t, y, x))
                assert bool(card.counts["synchronisations"]) == (device == "cuda")
            results = [each.cpu() for each in results]
        finally:
            network.cpu()
    assert torch.equal(*results)


# What nodes call by themselves. Their images are on the device where the host keeps them there.


def on_both(compute: Any, *inputs: torch.Tensor) -> tuple[Any, Any]:
    """Returns the results of a function for tensors on the CPU and for the same on the card."""
    with torch.inference_mode():
        plain = compute(*inputs)
        with StandIn():
            return plain, compute(*(x.to("cuda") for x in inputs))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("levels", ["star", "finite"])
def test_every_solver_on_the_card_equals_that_on_the_cpu_and_waits_for_nothing(name, levels):
    """With windows, guidance that is rescaled, and the host's noise."""
    sampling = SamplingDefaults(steps=3, solver_mode="normal", sampler=name, cfg=3.0)
    schedule, sigmas = levels_of(sampling)
    x = torch.randn(1, 4, 5, 6, 4, generator=torch.Generator().manual_seed(0))
    if levels == "finite":
        sigmas = sigmas.clamp(max=80)
    windows = overlapping_windows(5, 3, 1)
    noise = FrameNoise(0).solver(tuple(x.shape), sigmas)
    if levels == "finite":
        noise = brownian_noise(tuple(x.shape), sigmas, 0)
    counts = []

    def sample(x: torch.Tensor) -> torch.Tensor:
        denoiser = Denoiser(
            network=lambda x, t, y, hint: (x + hint) * y.mean().to(x.dtype),
            schedule=schedule,
            positive=torch.ones(1, 2, 3),
            negative=-torch.ones(1, 2, 3),
            hint=torch.ones(x.shape),
            guidance_scale=guidance_of(sampling),
            guidance_rescale=0.2,
        )
        steps = []
        result = SAMPLERS[name](
            chunked(denoiser, windows, "smooth"),
            x,
            sigmas,
            noise=noise,
            on_step=lambda step, total, x_0: steps.append(x_0.device),
        )
        assert set(steps) == {x.device}
        return result

    plain = sample(x)
    with StandIn() as card:
        start = x.to("cuda")
        card.counts.clear()
        on_the_card = sample(start)
        counts = card.counts.copy()
        on_the_card = on_the_card.cpu()
    torch.testing.assert_close(on_the_card, plain)
    assert counts["synchronisations"] == 0 and counts["operations"] > 50


def test_a_forward_of_a_host_on_the_card_equals_that_on_the_cpu(tiny):
    """Both prompts in one batch, in tiles, with windows of attention and reused features."""
    network, config = tiny[0].network, tiny[0].config
    generator = torch.Generator().manual_seed(0)
    x, hint = torch.randn(2, 2, config.in_dim, 2, 34, 8, generator=generator)
    y = torch.randn(2, 77, config.context_dim, generator=generator)
    work: Any = {"slicing": FINE, "tile": Tile(size=16, overlap=4), "attention_window": 3}

    def twice(*inputs: torch.Tensor) -> list[torch.Tensor]:
        features = BatchedFeatures([DeepFeatures(max_age=100) for _ in range(2)])
        with network.working(**work):
            return [
                network(inputs[0], torch.tensor([t] * 2), *inputs[1:], deep=features).cpu()
                for t in (500, 450)
            ]

    with torch.inference_mode():
        plain = twice(x, y, hint)
        with StandIn() as card:
            try:
                network.to("cuda")
                on_the_card = twice(*(each.to("cuda") for each in (x, y, hint)))
            finally:
                network.cpu()
    assert card.counts["operations"] > 500
    torch.testing.assert_close(on_the_card, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_colours_are_fixed_on_the_card_as_on_the_cpu(method):
    video, reference = torch.rand(2, 4, 3, 20, 24)

    def fix(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        frames = fix_colors(video, reference, method=method, strength=0.7, smoothing=1.0)
        return torch.stack(list(frames)).cpu()

    torch.testing.assert_close(*on_both(fix, video, reference[..., :10, :12]))


@pytest.mark.parametrize("quality", [None, 30])
def test_degradation_is_estimated_on_the_card_as_on_the_cpu(quality):
    frames = torch.stack([pictures(80, 96, moved=n)[0] for n in range(2)])
    if quality:
        frames = jpeg(frames, torch.tensor(quality))
    plain, on_the_card = on_both(estimate, frames)
    assert plain == on_the_card


@pytest.mark.parametrize("name", ["light", "heavy", "fixed-mild"])
def test_frames_are_degraded_on_the_card_as_on_the_cpu(name):
    frames = torch.stack([pictures(64, 64, moved=n)[1] for n in range(2)])

    def degraded(frames: torch.Tensor) -> torch.Tensor:
        return degrade_video(frames, PRESETS[name], 0)[0].cpu()

    torch.testing.assert_close(*on_both(degraded, frames), rtol=0, atol=0.01)


def test_frames_in_memory_are_measured_on_the_card_as_on_the_cpu():
    metrics = ["psnr", "psnr_y", "ssim", "flicker", "warping_error", "tof", "vmaf"]
    restored, truth = (torch.stack(each) for each in zip(*map(moved, range(3)), strict=True))

    def measured(restored: torch.Tensor, truth: torch.Tensor) -> dict[str, list[float]]:
        return evaluate_frames(restored, truth, metrics, border=4).comparison.per_frame

    plain, on_the_card = on_both(measured, restored, truth)
    assert {"psnr", "ssim", "flicker"} <= plain.keys() == on_the_card.keys()
    for name in plain:
        assert on_the_card[name] == pytest.approx(plain[name], rel=1e-4, nan_ok=True)


def moved(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return pictures(192, 192, moved=n)


def on_the_stand_in(network: nn.Module, *inputs: torch.Tensor) -> tuple[Any, Any]:
    """Returns the results of a network on the CPU and, for inputs that are there, on the card."""
    network.eval().requires_grad_(False)
    plain = network(*inputs)
    with StandIn():
        try:
            found = network.to("cuda")(*(x.to("cuda") for x in inputs)).cpu()
        finally:
            network.cpu()
    return found, plain


@pytest.mark.parametrize("make", [partial(LPIPS, "alex"), partial(LPIPS, "vgg"), DISTS])
def test_distances_of_pictures_on_the_card_equal_those_on_the_cpu(make):
    network, (restored, truth) = make(), (x[None] for x in pictures(40, 48))
    fill(p for p in network.parameters() if p.ndim > 1 or len(p) > 3)
    torch.testing.assert_close(*on_the_stand_in(network, restored, truth))


def test_dover_s_networks_on_the_card_equal_those_on_the_cpu():
    clip = torch.rand(1, 3, 16, 224, 224)
    swin = VideoSwin(8, (1, 1, 1, 2), (1, 1, 1, 2))
    torch.testing.assert_close(*on_the_stand_in(swin, clip), rtol=1e-4, atol=1e-4)
    convnext = VideoConvNeXt((1, 1, 1, 1), (8, 8, 8, 8))
    torch.testing.assert_close(*on_the_stand_in(convnext, clip[:, :, :4, :64, :64]))


class Brightness:
    """In place of DOVER's networks, which are large."""

    def technical(self, clips: torch.Tensor) -> torch.Tensor:
        assert on_card(clips)
        return clips.mean((1, 2, 3, 4))

    aesthetic = technical


def test_dover_and_raft_take_their_frames_to_the_card():
    frames = torch.rand(2, 3, 32, 40)
    flow = RAFT().eval().requires_grad_(False)
    plain = RAFTFlow(flow, "cpu")(*frames)
    with StandIn():
        with DoverMeter(Brightness(), 2, device="cuda") as meter:
            for frame in frames:
                meter.add(frame, None)
            score = meter.result()
        assert isinstance(score, float) and 0 < score < 1
        try:
            on_the_card = RAFTFlow(flow.to("cuda"), "cuda")(*frames).cpu()
        finally:
            flow.cpu()
    torch.testing.assert_close(on_the_card, plain, rtol=1e-3, atol=1e-3)
