"""What is predicted of a run, held against real tensors and the real run."""

from dataclasses import replace

import pytest
import torch

from star_core.backbones import SamplingDefaults
from star_core.canvas import Canvas
from star_core.checkpoints import StarModel
from star_core.chunking import ChunkConfig
from star_core.footprint import Pass, decoding, encoding, flop_counter, peak_of
from star_core.live_tensors import LiveTensors
from star_core.models.slicing import Slicing
from star_core.models.unet import ControlledVideoUNet, UNetConfig
from star_core.pipeline import Settings, Shot, restore
from star_core.plan import Plan, Task
from star_core.prediction import predict
from star_core.shortcuts import Shortcuts
from star_core.tiling import Tile
from star_core.vae import VAEGeometry, vae_from_config

CONFIG = UNetConfig(
    dim=32,
    context_dim=16,
    dim_mult=(1, 2),
    num_heads=2,
    head_dim=16,
    num_res_blocks=1,
    attn_scales=(1.0,),
    norm_groups=8,
)
GEOMETRY = VAEGeometry(block_out_channels=(32, 64), layers_per_block=1)
SAMPLING = SamplingDefaults(steps=2, solver_mode="normal")
TASK = Task(
    frames=4,
    size=(28, 20),
    config=CONFIG,
    vae=GEOMETRY,
    text_encoder=False,
    dtype=torch.float32,
    sampling=SAMPLING,
)
SLICING = Slicing(spatial_pixels=128, temporal_pixels=96)


@pytest.fixture(scope="module")
def network():
    network = ControlledVideoUNet(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.normal_(0.05, 0.05, generator=generator)
    return network


@pytest.fixture(scope="module")
def vae():
    vae = vae_from_config({"block_out_channels": (32, 64), "layers_per_block": 1})
    vae.model.eval().requires_grad_(False)
    return vae


def close(predicted: int, measured: int, within: float = 0.15) -> bool:
    return abs(predicted / measured - 1) <= within


@pytest.mark.parametrize("size", [(2, 10, 16), (5, 14, 12), (4, 18, 16)])
@pytest.mark.parametrize("slicing", [None, SLICING], ids=["whole", "slices"])
@torch.inference_mode()
def test_bytes_of_the_network_are_those_of_real_tensors(network, size, slicing):
    x, y = torch.zeros(1, 4, *size), torch.zeros(1, 77, CONFIG.context_dim)
    with network.working(slicing=slicing), LiveTensors() as live:
        network(x, torch.tensor([500]), y, x)
    frames, height, width = size
    forward = Pass(config=CONFIG, dtype=torch.float32, frames=frames, height=height, width=width)
    assert close(peak_of(forward, slicing).device, live.peak)


@pytest.mark.parametrize("size", [(16, 24), (48, 32), (40, 88)])
@torch.inference_mode()
def test_bytes_of_the_vae_are_those_of_real_tensors(vae, size):
    with LiveTensors() as live:
        latents = vae.encode_frame(torch.zeros(1, 3, *size))
    assert close(encoding(GEOMETRY, torch.float32, *size).peak, live.peak)
    window = latents[:, :, None].expand(-1, -1, 3, -1, -1)
    with LiveTensors() as live:
        vae.decode(window)
    assert close(decoding(GEOMETRY, torch.float32, 3, *size).peak, live.peak)


def run(network, vae, plan: Plan):
    """Restores a clip of noise as planned."""
    task = plan.task
    source = torch.rand(task.frames, 3, task.size[1] // 2, task.size[0] // 2)
    settings = Settings(
        sampling=task.sampling,
        behaviour=task.behaviour,
        shortcuts=task.shortcuts,
        **plan.settings(),
    )
    canvas = Canvas.of(task.size, vae_factor=2, levels=1, behaviour=task.behaviour)
    model = StarModel(network=network, config=CONFIG, sampling=SAMPLING, prompts=None)
    prompt = torch.zeros(1, 77, CONFIG.context_dim)
    shot = Shot(part=plan.part, positive=prompt, negative=prompt, settings=settings)
    for _ in restore(list(source), model, vae, [shot], canvas):
        pass


def weights(*modules):
    return sum(x.nbytes for m in modules for x in (*m.parameters(), *m.buffers()))


@pytest.mark.parametrize(
    "plan",
    [
        Plan(task=TASK, slicing=SLICING),
        Plan(
            task=replace(TASK, frames=5, size=(40, 28)),
            slicing=SLICING,
            chunk=ChunkConfig(length=3, overlap=1),
            tile=Tile(size=32, overlap=8),
        ),
        Plan(
            task=replace(TASK, frames=9, size=(40, 28)),
            slicing=SLICING,
            chunk=ChunkConfig(length=3, overlap=1, merged=0),
        ),
        Plan(
            task=replace(TASK, frames=3, size=(52, 36), sampling=replace(SAMPLING, cfg=1.0)),
            slicing=SLICING,
            latent_tile=Tile(size=40, overlap=8),
            tile=Tile(size=40, overlap=8),
        ),
    ],
    ids=["whole", "windows and tiles", "one window after the other", "tiles of latents"],
)
def test_bytes_of_a_run_are_those_of_real_tensors(network, vae, plan):
    with LiveTensors() as live:
        run(network, vae, plan)
    measured = live.peak + weights(network, vae.model)
    assert close(predict(plan).peak_on_cpu, measured)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(task=TASK, chunk=ChunkConfig(length=3, overlap=1)),
        Plan(task=replace(TASK, sampling=replace(SAMPLING, sampler="heun"))),
        Plan(task=TASK, latent_tile=Tile(size=20, overlap=4), tile=Tile(size=20, overlap=4)),
        Plan(task=replace(TASK, shortcuts=Shortcuts(guidance=(500, 1000)))),
        Plan(task=replace(TASK, shortcuts=Shortcuts(attention_window=6))),
        Plan(
            task=replace(TASK, shortcuts=Shortcuts(reuse=900)),
            chunk=ChunkConfig(length=3, overlap=1),
        ),
    ],
    ids=["windows", "heun", "tiles", "guidance", "attention", "reuse"],
)
def test_flops_are_those_counted_in_the_run(network, vae, plan):
    with flop_counter() as counter:
        run(network, vae, plan)
    assert sum(predict(plan).flops.values()) == counter.get_total_flops()
