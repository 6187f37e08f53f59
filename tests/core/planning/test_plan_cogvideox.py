"""Compares what is predicted of a run of CogVideoX with real tensors and the real run."""

import json
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from star_core.backbones import COGVIDEOX, SIZES, build_network
from star_core.cli import main
from star_core.models.cogvideox_weights import CogVideoXConfig
from star_core.models.slicing import Slicing
from star_core.pipeline import Execution, Settings, ShotJob, restore
from star_core.planning import predict as prediction
from star_core.planning.cost import Pass, decoding, encoding, peak_of
from star_core.planning.meta_memory import LiveTensors
from star_core.planning.plan import Plan, Task
from star_core.planning.predict import denoise_work, predict, vae_calls
from star_core.sampling_defaults import COGVIDEOX_LATENTS, COGVIDEOX_SAMPLING
from star_core.star_checkpoint import StarModel, open_model
from star_core.vae.cogvideox import CausalVAEGeometry
from star_core.vae.load import geometry_of
from star_core.video_io import open_sink, open_video
from star_core.windows.canvas import Canvas
from star_core.windows.chunking import ChunkConfig
from star_core.windows.tiling import Tile
from tests.cogvideox_files import SAMPLING, write_model, write_t5, write_vae

CONFIG = CogVideoXConfig(
    in_dim=4, context_dim=16, context_length=7, dim=64, num_heads=2, num_layers=2, time_dim=16,
    grid=(3, 4),
)  # fmt: skip
GEOMETRY = CausalVAEGeometry(
    block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
    sample_height=24, sample_width=32,
)  # fmt: skip
TASK = Task(
    frames=9,
    size=(32, 24),
    config=CONFIG,
    vae=GEOMETRY,
    text_encoder=False,
    dtype=torch.float32,
    sampling=replace(COGVIDEOX_SAMPLING, steps=2, chunk_frames=9),
)
FULL = Task(
    frames=49,
    size=(720, 480),
    config=SIZES["cogvideox-5b"],
    vae=COGVIDEOX.geometry,
    dtype=torch.bfloat16,
    sampling=replace(COGVIDEOX_SAMPLING, chunk_frames=49),
)
WINDOWS = ChunkConfig(length=9, overlap=5, latent_frames=4)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_network(CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = GEOMETRY.build()
    vae.model.eval().requires_grad_(False)
    return vae


def close(predicted: int, measured: int, within: float = 0.15) -> bool:
    return abs(predicted / measured - 1) <= within


@pytest.mark.parametrize("size", [(3, 6, 8), (7, 6, 8), (3, 10, 12)])
@torch.inference_mode()
def test_bytes_of_the_network_are_those_of_real_tensors(network, size):
    frames, height, width = size
    x, y = torch.zeros(1, 4, *size), torch.zeros(1, 7, 16)
    with network.working(slicing=Slicing()), LiveTensors() as live:
        network(x, torch.tensor([500]), y, x)
    height, width = (len(side[0]) for side in CONFIG.tiles((height, width), None))
    forward = Pass(config=CONFIG, dtype=torch.float32, frames=frames, height=height, width=width)
    assert close(peak_of(forward, Slicing()).device, live.peak)


@pytest.mark.parametrize("size", [(1, 16, 24), (9, 16, 24), (17, 24, 16)])
@torch.inference_mode()
def test_bytes_of_the_vae_are_those_of_real_tensors(vae, size):
    with LiveTensors() as live:
        latents = vae.encode(torch.zeros(1, 3, *size))
    assert close(encoding(GEOMETRY, torch.float32, *size).peak, live.peak)
    with LiveTensors() as live:
        vae.decode(latents)
    assert close(decoding(GEOMETRY, torch.float32, *size).peak, live.peak)


def run(network, vae, plan: Plan) -> None:
    """Restores a clip of noise as planned."""
    task = plan.task
    source = torch.rand(task.frames, 3, task.size[1] // 2, task.size[0] // 2)
    chosen = Settings(sampling=task.sampling, behaviour=task.behaviour, **plan.settings())
    canvas = Canvas.of(task.size, vae_factor=4, levels=1, behaviour=task.behaviour)
    model = StarModel(
        network=network, config=CONFIG, sampling=task.sampling, prompts=None,
        latents=COGVIDEOX_LATENTS,
    )  # fmt: skip
    prompt = torch.ones(1, 7, 16)
    execution = Execution(slicing=plan.slicing)
    shot = ShotJob(
        span=plan.span,
        positive=prompt,
        negative=0 * prompt,
        settings=chosen,
        execution=execution,
    )
    for _ in restore(list(source), model, vae, [shot], canvas):
        pass


PLANS = {
    "one window": Plan(task=TASK, chunk=WINDOWS),
    "filled up": Plan(task=replace(TASK, frames=6), chunk=WINDOWS),
    "windows": Plan(task=replace(TASK, frames=15), chunk=WINDOWS),
    "faded windows": Plan(task=replace(TASK, frames=15), chunk=replace(WINDOWS, hold=False)),
    "larger than trained": Plan(task=replace(TASK, size=(40, 24)), chunk=WINDOWS),
    "smaller tiles": Plan(
        task=replace(TASK, size=(32, 24)),
        chunk=WINDOWS,
        tile=Tile(size=16, overlap=4),
        latent_tile=Tile(size=16, overlap=8),
    ),
}


@pytest.fixture(scope="module", params=PLANS.values(), ids=list(PLANS))
def ran(request, network, vae):
    """A plan, and bytes and FLOPs of its run."""

    def attention(q, k, *_, **__):
        return 4 * q[0] * q[1] * q[2] * q[3] * k[2]

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with (
        LiveTensors() as live,
        FlopCounterMode(display=False, custom_mapping={fused: attention}) as counter,
    ):
        run(network, vae, request.param)
    weights = (x for m in (network, vae.model) for x in (*m.parameters(), *m.buffers()))
    return request.param, live.peak + sum(x.nbytes for x in weights), counter.get_total_flops()


def test_bytes_of_a_run_are_those_of_real_tensors(ran):
    plan, measured, _ = ran
    stages = predict(plan).memory.values()
    assert close(max(stage.device + stage.host for stage in stages), measured)


def test_flops_are_those_counted_in_the_run(ran):
    plan, _, measured = ran
    assert sum(predict(plan).flops.values()) == measured


def test_less_memory_takes_tiles_and_windows_that_are_smaller_than_trained_on():
    plans = [Plan(task=replace(FULL, size=(1920, 1080)), chunk=FULL.usual_chunk(49))]
    while (smaller := plans[-1].smaller_denoising()) is not None:
        plans.append(smaller)
    lengths = [plan.chunk.length for plan in plans]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] == 1
    assert {49, 25} <= set(lengths) and all(n % 4 == 1 for n in lengths)
    areas = [max(p.windows) * max(h * w for h, w in p.network_tiles) for p in plans]
    assert all(after <= 1.03 * before for before, after in pairwise(areas))
    assert areas[-1] < 0.02 * areas[0]


def test_full_size_work_is_that_of_the_formula():
    """Specification of the second backbone, section 10."""
    tokens, dim, layers = 13 * 30 * 45 + 226, 3072, 42
    layer = 24 * dim**2 * tokens + 4 * tokens**2 * dim
    work = denoise_work(Plan(task=FULL, chunk=FULL.usual_chunk())).flops
    assert work == pytest.approx(50 * 2 * layers * layer, rel=0.01)


def test_a_prompt_takes_t5_in_bfloat16_and_its_parameters_are_counted_right():
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        config = T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        parameters = sum(p.numel() for p in T5EncoderModel(config).parameters())
    task = replace(TASK, text_encoder=True)
    held = predict(Plan(task=task, chunk=WINDOWS)).memory["prompt"].device
    assert held == 2 * parameters


def test_in_a_host_a_clip_is_one_of_the_vae_and_windows_are_of_latents():
    task = replace(TASK, frames=33, one_clip=True)
    plan = Plan(task=task, chunk=replace(WINDOWS, length=21))
    assert vae_calls(plan, "encode") == {33: 1} and list(map(len, plan.span.decode_windows)) == [33]
    assert plan.windows == [6, 6] and plan.window_frames == [21, 21]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model(folder)
    write_vae(folder)
    write_t5(folder)
    with open_sink(folder / "clip.mkv", width=24, height=16, fps=Fraction(10)) as sink:
        for frame in torch.rand(11, 3, 16, 24, generator=torch.Generator().manual_seed(0)):
            sink.write(frame)
    return folder


def test_the_command_tells_a_plan_for_files(files, capsys):
    command = ["plan", "--frame-count", "11", "--size", "24x16", "--dtype", "float32", "--json"]
    command += ["--model", str(files / "star.safetensors")]
    command += ["--vae", str(files / "cogvideox_vae.safetensors")]
    main([*command])
    whole = json.loads(capsys.readouterr().out)
    assert whole["chunk_frames"] == 9 and whole["windows"] == [9, 9]
    main([*command, "--chunk-frames", "13", "--memory", "16G"])
    plenty = json.loads(capsys.readouterr().out)
    assert plenty["fits"] and plenty["windows"] == [13] and not plenty["offload"]
    main([*command, "--memory", "0.01M"])
    scarce = json.loads(capsys.readouterr().out)
    assert not scarce["fits"] and max(scarce["windows"]) < 9 and scarce["offload"]


def test_upscale_chooses_what_fits_and_runs(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("star_core.memory.TILES", (64, 48, 32, 24, 16))
    plans, choose = [], prediction.fitting
    monkeypatch.setattr(
        prediction, "fitting", lambda *a, **k: plans.append(choose(*a, **k)) or plans[-1]
    )
    task = Task(
        frames=11, size=(96, 64), config=open_model(files / "star.safetensors").config,
        vae=geometry_of(files / "cogvideox_vae.safetensors"), dtype=torch.float32,
        sampling=SAMPLING, text_encoder=False,
    )  # fmt: skip
    memory = int(0.8 * predict(Plan(task=task, chunk=task.usual_chunk())).peak)
    out = tmp_path / "out.mkv"
    command = ["upscale", files / "clip.mkv", out, "--model", files / "star.safetensors"]
    command += ["--text-encoder", files / "t5", "--shots", "off", "--dtype", "float32"]
    code = main([*map(str, command), "--memory", f"{memory / 2**20}M"])
    _, err = capsys.readouterr()
    assert code == 0, err
    (plan,) = plans
    held = predict(replace(plan, task=replace(plan.task, text_encoder=False)))
    assert held.peak <= memory and plan.offload and plan.tile is not None
    assert torch.stack(list(open_video(out))).shape == (11, 3, 64, 96)
