"""The whole method on a stand-in for a GPU: no mixed devices, few copies, no waiting."""

import json
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from star_core.bench import device as bench
from star_core.cli import main
from star_core.devices import fetch
from star_core.diffusion.shortcuts import Shortcuts
from star_core.memory import SLICES, DevicePlacement
from star_core.model import BUILT_IN
from star_core.models.slicing import Slicing
from star_core.parity import DEFAULT
from star_core.pipeline import Execution, Settings, ShotJob, restore
from star_core.star_checkpoint import StarModel, load_model
from star_core.vae.load import load_vae
from star_core.video_io import open_sink, open_video
from star_core.windows.canvas import Canvas, FrameSpan
from star_core.windows.chunking import ChunkConfig
from star_core.windows.tiling import Tile
from tests import cogvideox_files
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
    model: StarModel, vae: Any, device: str, *, steps: int = 3, **changes: Any
) -> torch.Tensor:
    frames = torch.rand(6, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    settings = Settings(
        sampling=replace(model.sampling, steps=steps, solver_mode="normal", color_fix="none"),
        chunk=ChunkConfig.near(5, 1, vae.latent_frames),
        **changes,
    )
    canvas = Canvas.of(
        (64, 48), None, vae_factor=vae.factor, levels=model.config.downsamplings, behaviour=DEFAULT
    )
    y = torch.ones(1, model.config.context_length, model.config.context_dim)
    positive, negative = model.prompts.of(None) if model.prompts else (y, -y)
    shot = ShotJob(
        span=FrameSpan.of(
            range(6), range(6), chunk=settings.chunk, decode_window=3, behaviour=DEFAULT
        ),
        positive=positive,
        negative=negative,
        settings=settings,
        execution=Execution(device=device, slicing=FINE),
    )
    return torch.stack(list(restore(frames, model, vae, [shot], canvas)))


@pytest.mark.parametrize("name", ["tiny", "cogvideox"])
def test_a_whole_clip_on_the_card_equals_that_on_the_cpu(name, request):
    model, vae = request.getfixturevalue(name)
    plain = restored(model, vae, "cpu")
    with StandIn():
        on_the_card = restored(model, vae, "cuda")
    torch.testing.assert_close(on_the_card, plain, rtol=1e-4, atol=1e-4)
    for module in (model.network, vae.model):
        assert not any(on_card(each) for each in module.state_dict().values())


@pytest.mark.parametrize("name", ["tiny", "cogvideox"])
def test_encoding_and_decoding_on_the_card_equal_those_on_the_cpu(name, request):
    _, vae = request.getfixturevalue(name)
    video = torch.rand(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1

    @torch.inference_mode()
    def both() -> tuple[torch.Tensor, torch.Tensor]:
        latents = vae.encode(video, tile=Tile(size=32, overlap=16))
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
    """Counts of one evaluation of both windows: what three further steps add, divided by three."""
    counts = []
    for steps in (2, 5):
        with StandIn() as card:
            restored(model, vae, "cuda", steps=steps, **changes)
        counts.append(card.counts)
    return {name: (counts[1][name] - counts[0][name]) / 3 for name in counts[1]}


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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A clip, and CogVideoX's files."""
    folder = tmp_path_factory.mktemp("files")
    frames = torch.rand(5, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    with open_sink(folder / "clip.mkv", width=20, height=12, fps=Fraction(10)) as sink:
        for frame in frames:
            sink.write(frame)
    cogvideox_files.write_model(folder)
    cogvideox_files.write_vae(folder)
    cogvideox_files.write_t5(folder)
    return folder


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "cogvideox"])
def test_the_command_restores_a_file_on_the_card_as_on_the_cpu(name, dtype, files, tmp_path):
    options = ["--scale", "3", "--offload", "--shots", "off", "--color-fix", "none"]
    if name == "cogvideox":
        options += ["--model", str(files / "star.safetensors")]
        options += ["--text-encoder", str(files / "t5")]
    results = []
    for device, precision in (("cpu", "float32"), ("cuda", dtype)):
        out = tmp_path / f"{device}.mkv"
        where = ["--device", device, "--dtype", precision]
        with StandIn() as card:
            assert main(["upscale", str(files / "clip.mkv"), str(out), *options, *where]) == 0
        assert bool(card.counts["operations"]) == (device == "cuda")
        results.append(torch.stack(list(open_video(out))))
    difference = (results[0] - results[1]).abs()
    assert difference.mean() < (1e-3 if dtype == "float32" else 0.03)


def test_the_demo_runs_on_the_card(tmp_path):
    with StandIn() as card:
        arguments = ["--quick", "--device", "cuda", "--dtype", "float32", "--out", str(tmp_path)]
        assert main(["demo", *arguments]) == 0
    assert card.counts["operations"] > 500 and (tmp_path / "restored.mp4").is_file()


def test_stills_are_restored_with_weights_that_stay_on_the_card(tmp_path, monkeypatch):
    with open_sink(tmp_path / "in", width=20, height=12, fps=Fraction(1)) as sink:
        for picture in torch.rand(3, 3, 12, 20, generator=torch.Generator().manual_seed(0)):
            sink.write(picture)
    moved, move = [], DevicePlacement._move
    monkeypatch.setattr(
        DevicePlacement, "_move", lambda self, m, homes: moved.append(m) or move(self, m, homes)
    )
    with StandIn():
        options = ["--stills", "--device", "cuda", "--scale", "2"]
        assert main(["upscale", str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 0
    assert len(moved) == len(set(moved)) == 2  # network and VAE
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize("name", ["tiny", "cogvideox"])
def test_batch_restores_files_on_the_card(name, files, tmp_path):
    options = ["--scale", "2", "--shots", "off", "--device", "cuda", "--out", str(tmp_path)]
    options += ["--steps", "2", "--solver-mode", "normal"]
    if name == "cogvideox":
        options += ["--model", str(files / "star.safetensors")]
        options += ["--text-encoder", str(files / "t5")]
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([{"input": str(files / "clip.mkv")}]))
    with StandIn() as card:
        assert main(["batch", str(jobs), *options]) == 0
    assert card.counts["operations"] > 500
    assert [len(open_video(path)) for path in tmp_path.glob("*.m*")] == [5]


@pytest.mark.parametrize("name", ["tiny", "cogvideox"])
def test_a_plan_for_the_card_counts_its_types(name, files, capsys):
    command = ["plan", "--frame-count", "5", "--size", "20x12", "--device", "cuda", "--json"]
    command += ["--memory", "24G"]
    if name == "cogvideox":
        command += ["--model", str(files / "star.safetensors")]
        command += ["--vae", str(files / "cogvideox_vae.safetensors")]
    else:
        command += ["--model", "tiny"]
    with StandIn():
        assert main(command) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["slices"]["temporal_pixels"] == SLICES[0].temporal_pixels


def test_clips_are_evaluated_on_the_card_as_on_the_cpu(files, capsys):
    command = ["evaluate", str(files / "clip.mkv"), "--truth", str(files / "clip.mkv"), "--json"]
    results = []
    for device in ("cpu", "cuda"):
        with StandIn():
            assert main([*command, "--device", device, "--metrics", "psnr", "ssim"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]


def test_bench_reports_the_card():
    with StandIn():
        for check in (bench.parity, bench.vae, bench.job):
            rows = list(check(CARD, bench.SMALL))
            assert rows and not any(row.error for row in rows)
