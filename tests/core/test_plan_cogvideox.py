"""What is predicted of a run of the second backbone, held against real tensors and the real run."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from star_core.backbones import COGVIDEOX_LATENTS, COGVIDEOX_SAMPLING
from star_core.canvas import Canvas
from star_core.causal_vae import CausalVAEGeometry
from star_core.checkpoints import StarModel
from star_core.chunking import ChunkConfig
from star_core.footprint import Pass, decoding, encoding, peak_of
from star_core.live_tensors import LiveTensors
from star_core.models.cogvideox_weights import CogVideoXConfig
from star_core.models.slicing import Slicing
from star_core.networks import build_network
from star_core.pipeline import Settings, Shot, restore
from star_core.plan import Plan, Task
from star_core.prediction import predict
from star_core.tiling import Tile

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
    sampling=replace(COGVIDEOX_SAMPLING, steps=3, chunk_frames=9),
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
    shot = Shot(part=plan.part, positive=prompt, negative=0 * prompt, settings=chosen)
    for _ in restore(list(source), model, vae, [shot], canvas):
        pass


PLANS = {
    "one window": Plan(task=TASK, chunk=WINDOWS),
    "filled up": Plan(task=replace(TASK, frames=6), chunk=WINDOWS),
    "windows": Plan(task=replace(TASK, frames=15), chunk=WINDOWS),
    "faded windows": Plan(task=replace(TASK, frames=15), chunk=replace(WINDOWS, hold=False)),
    "larger than trained": Plan(task=replace(TASK, size=(56, 40)), chunk=WINDOWS),
    "smaller tiles": Plan(
        task=replace(TASK, size=(48, 32)),
        chunk=WINDOWS,
        tile=Tile(size=16, overlap=4),
        latent_tile=Tile(size=16, overlap=8),
    ),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_bytes_of_a_run_are_those_of_real_tensors(network, vae, plan):
    with LiveTensors() as live:
        run(network, vae, plan)
    weights = sum(x.nbytes for m in (network, vae.model) for x in (*m.parameters(), *m.buffers()))
    assert close(predict(plan).peak_on_cpu, live.peak + weights)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_flops_are_those_counted_in_the_run(network, vae, plan):
    def attention(q, k, *_, **__):
        return 4 * q[0] * q[1] * q[2] * q[3] * k[2]

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused: attention}) as counter:
        run(network, vae, plan)
    assert sum(predict(plan).flops.values()) == counter.get_total_flops()
