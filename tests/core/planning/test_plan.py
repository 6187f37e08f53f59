"""Compares what is predicted of a run with real tensors and the real run."""

import argparse
import json
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from star_core.cli import main
from star_core.cli.arguments import MEMORY
from star_core.diffusion.shortcuts import FAST, Shortcuts
from star_core.memory import SLICES
from star_core.model import BUILT_IN
from star_core.models.slicing import Slicing
from star_core.models.unet import ControlledVideoUNet, UNetConfig
from star_core.parity import REFERENCE
from star_core.pipeline import Execution, Settings, ShotJob, restore
from star_core.planning import plot as plan_plot
from star_core.planning.cost import Pass, decoding, encoding, peak_of, weight_bytes
from star_core.planning.meta_memory import LiveMetaTensors, LiveTensors
from star_core.planning.plan import Plan, Task
from star_core.planning.predict import (
    denoise_memory,
    denoise_work,
    fitting,
    predict,
    suited_to_gpu,
)
from star_core.plots import write_figure
from star_core.sampling_defaults import SamplingDefaults
from star_core.star_checkpoint import StarModel
from star_core.training.decoder import small_decoder
from star_core.vae.small_decoder import (
    SmallDecodedGeometry,
    SmallDecoderConfig,
    TaesdConfig,
    save_decoder,
    save_with_decoder,
)
from star_core.vae.svd import SVDGeometry, svd_vae
from star_core.windows.canvas import Canvas
from star_core.windows.chunking import ChunkConfig
from star_core.windows.tiling import Tile

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
GEOMETRY = SVDGeometry(block_out_channels=(32, 64), layers_per_block=1)
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
CHUNK = ChunkConfig()


@pytest.fixture(scope="module")
def network():
    network = ControlledVideoUNet(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.normal_(0.05, 0.05, generator=generator)
    return network


@pytest.fixture(scope="module")
def vae():
    vae = svd_vae({"block_out_channels": (32, 64), "layers_per_block": 1})
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
    assert close(encoding(GEOMETRY, torch.float32, 1, *size).peak, live.peak)
    window = latents[:, :, None].expand(-1, -1, 3, -1, -1)
    with LiveTensors() as live:
        vae.decode(window)
    assert close(decoding(GEOMETRY, torch.float32, 3, *size).peak, live.peak)


def run(network, vae, plan: Plan):
    """Restores a clip of noise as planned."""
    task = plan.task
    source = torch.rand(task.frames, 3, task.size[1] // 2, task.size[0] // 2)
    chosen = Settings(
        sampling=task.sampling,
        behaviour=task.behaviour,
        shortcuts=task.shortcuts,
        **plan.settings(),
    )
    canvas = Canvas.of(task.size, vae_factor=2, levels=1, behaviour=task.behaviour)
    model = StarModel(network=network, config=CONFIG, sampling=SAMPLING, prompts=None)
    prompt = torch.zeros(1, 77, CONFIG.context_dim)
    execution = Execution(slicing=plan.slicing)
    shot = ShotJob(
        span=plan.span,
        positive=prompt,
        negative=prompt,
        settings=chosen,
        execution=execution,
    )
    for _ in restore(list(source), model, vae, [shot], canvas):
        pass


def weights(*modules):
    return sum(x.nbytes for m in modules for x in (*m.parameters(), *m.buffers()))


@pytest.mark.parametrize(
    "plan",
    [
        Plan(task=TASK, chunk=CHUNK, slicing=SLICING),
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
            chunk=CHUNK,
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
    memory = predict(plan).memory.values()
    assert close(max(stage.device + stage.host for stage in memory), measured)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(task=TASK, chunk=ChunkConfig(length=3, overlap=1)),
        Plan(task=replace(TASK, sampling=replace(SAMPLING, sampler="heun")), chunk=CHUNK),
        Plan(
            task=TASK,
            chunk=CHUNK,
            latent_tile=Tile(size=20, overlap=4),
            tile=Tile(size=20, overlap=4),
        ),
        Plan(task=replace(TASK, shortcuts=Shortcuts(guidance=(500, 1000))), chunk=CHUNK),
        Plan(task=replace(TASK, shortcuts=Shortcuts(attention_window=6)), chunk=CHUNK),
        Plan(task=replace(TASK, shortcuts=Shortcuts(cache=1e-9)), chunk=CHUNK),  # leaves out none
        Plan(
            task=replace(TASK, shortcuts=Shortcuts(reuse=900)),
            chunk=ChunkConfig(length=3, overlap=1),
        ),
    ],
    ids=["windows", "heun", "tiles", "guidance", "attention", "cache", "reuse"],
)
def test_flops_are_those_counted_in_the_run(network, vae, plan):
    def attention(q, k, *_, **__):
        return 4 * q[0] * q[1] * q[2] * q[3] * k[2]

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused: attention}) as counter:
        run(network, vae, plan)
    assert sum(predict(plan).flops.values()) == counter.get_total_flops()


def small(frames: int, width: int, height: int) -> Plan:
    return Plan(task=replace(TASK, frames=frames, size=(width, height)), chunk=CHUNK)


@pytest.mark.parametrize(
    ("vae", "decoder"),
    [
        (GEOMETRY, SmallDecoderConfig(latent_channels=4, factor=2, width=12, blocks=2)),
        (SVDGeometry(block_out_channels=(32,) * 4, layers_per_block=1), TaesdConfig(width=8)),
    ],
    ids=["distilled", "TAESD"],
)
def test_a_small_decoder_is_counted_in_place_of_the_vae_s_own(vae, decoder):
    own = replace(TASK, vae=vae, size=(48, 32))
    task = replace(own, vae=SmallDecodedGeometry(vae=vae, decoder=decoder))
    before, after = (predict(Plan(task=each, chunk=CHUNK)) for each in (own, task))
    assert after.work["encode"] == before.work["encode"]
    assert after.work["denoise"] == before.work["denoise"]
    height, width = task.latents
    network = decoder.build().eval()
    window = torch.zeros(3, 4, height, width)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(window, 3)
    windows = len(Plan(task=task, chunk=CHUNK).span.decode_windows)
    assert after.flops["decode"] == windows * counter.get_total_flops() < before.flops["decode"]
    with torch.inference_mode(), LiveTensors() as live:
        network(window, 3)
    held = after.memory["decode"].device - weights(task.vae.build().model)
    assert held < before.memory["decode"].device
    assert live.peak <= held
    assert after.memory["denoise"].device < before.memory["denoise"].device


def test_each_smaller_plan_needs_no_more_and_the_last_is_far_smaller():
    plans = [small(20, 400, 300)]
    while (smaller := plans[-1].smaller_denoising()) is not None:
        plans.append(smaller)
    needed = [denoise_memory(plan).device for plan in plans]
    assert all(after <= 1.01 * before for before, after in pairwise(needed))
    assert needed[-1] < 0.3 * needed[0]


@settings(max_examples=3, deadline=None)
@given(share=st.floats(0.02, 1.2), offload=st.booleans())
def test_a_plan_fits_if_any_does_and_curtails_nothing_where_nothing_needs_it(share, offload):
    whole = small(20, 400, 300)
    needed = predict(whole).peak
    plan = fitting(whole.task, int(share * needed), offload=offload)
    if share >= 1:
        assert plan == whole
    assert plan.offload <= offload
    memory = predict(plan).memory
    if memory["denoise"].device > share * needed:
        assert plan.smaller_denoising(offload=offload) is None
    if max(memory["encode"].device, memory["decode"].device) > share * needed:
        assert plan.tile is not None and plan.smaller_decoding(offload=offload) is None


FULL = Task(frames=72, size=(1704, 960))


def test_full_size_work_meets_its_targets_by_the_windows_of_each_behaviour():
    def work(task: Task) -> float:
        return denoise_work(fitting(task)).flops / 1e15

    reference = work(replace(FULL, behaviour=REFERENCE))
    assert reference == pytest.approx(52.05, rel=0.02)
    assert work(FULL) <= 0.85 * reference
    assert work(replace(FULL, shortcuts=FAST)) <= 0.5 * reference


def test_four_evaluations_and_a_small_decoder_take_at_most_0_16_of_the_default():
    few = SamplingDefaults(steps=4, solver_mode="normal", cfg=1.0)
    vae = SVDGeometry()
    small = SmallDecodedGeometry(vae=vae, decoder=small_decoder(vae))
    default, student = (
        sum(predict(fitting(task)).flops.values())
        for task in (FULL, replace(FULL, sampling=few, vae=small))
    )
    assert student <= 0.16 * default


def test_the_command_tells_a_plan_for_the_memory_given(capsys):
    command = ["plan", "--frame-count", "40", "--size", "120x90", "--model", "tiny", "--json"]
    main([*command])
    whole = json.loads(capsys.readouterr().out)
    main([*command, "--memory", f"{0.75 * whole['peak_bytes'] / 2**20:.1f}M"])
    less = json.loads(capsys.readouterr().out)
    assert whole["fits"] and less["fits"]
    assert less["peak_bytes"] <= less["memory_bytes"] < whole["peak_bytes"]
    assert whole["tflop"] == pytest.approx(
        sum(whole[f"tflop_{stage}"] for stage in ("encode", "denoise", "decode"))
    )
    assert {"chunk_frames", "chunk_overlap", "tile", "slices", "offload"} <= less.keys()


def test_the_command_counts_a_small_decoder(capsys, tmp_path):
    command = ["plan", "--frame-count", "40", "--size", "120x90", "--model", "tiny", "--json"]
    config = SmallDecoderConfig(latent_channels=32, factor=4, width=64, blocks=3)
    save_decoder(path := tmp_path / "decoder.safetensors", config.build())
    save_with_decoder(whole := tmp_path / "vae.safetensors", BUILT_IN["tiny"][1], config.build())

    def decode(*more: str) -> float:
        assert main([*command, *more]) == 0
        return json.loads(capsys.readouterr().out)["tflop_decode"]

    own, small, file = decode(), decode("--decoder", "small"), decode("--decoder", str(path))
    assert small <= 0.1 * own < file
    assert decode("--vae", str(whole)) == file
    assert decode("--vae", str(whole), "--decoder", "small") == small
    assert main([*command, "--model", "cogvideox-5b", "--decoder", "small"]) == 2
    assert "takes no small decoder" in capsys.readouterr().err


def test_the_command_says_in_words_what_it_chose(capsys):
    main(["plan", "--frame-count", "40", "--size", "120x90", "--model", "tiny", "--memory", "1M"])
    text = capsys.readouterr().out
    assert "Does not fit into 0.00 GiB" in text and "windows" in text and "tiles" in text


def test_growth_is_drawn_with_a_line_for_each_way(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib")
    monkeypatch.setattr(plan_plot, "FRAMES", (1, 9))
    monkeypatch.setattr(plan_plot, "SIZES", ((28, 20), (44, 28)))
    figure = plan_plot.growth(TASK, 2**30)
    points = [[np.size(line.get_xdata()) for line in axes.lines] for axes in figure.axes]
    assert points == [[2, 2], [2, 2], [2, 2], [2, 2]]
    write_figure(figure, tmp_path / "growth.svg")
    text = "".join(ElementTree.parse(tmp_path / "growth.svg").getroot().itertext())
    assert "memory by frames" in text and "compute by megapixels" in text


@pytest.mark.parametrize("memory", ["", "12", "12GiB", "12G", "800M", "7.5g", "x", "G"])
def test_memory_is_read_in_powers_of_1024(memory):
    known = {"12": 12, "12GiB": 12 * 2**30, "12G": 12 * 2**30, "800M": 800 * 2**20}
    known["7.5g"] = 15 * 2**29
    if memory in known:
        assert MEMORY(memory) == known[memory]
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="12G"):
            MEMORY(memory)


def test_skips_in_main_memory_leave_the_device_until_they_are_read():
    forward = Pass(config=CONFIG, dtype=torch.float32, frames=4, height=18, width=16)
    kept, sent = (peak_of(forward, replace(SLICING, offload=offload)) for offload in (False, True))
    assert kept.host == 0 < sent.host
    assert 0.5 * sent.host < kept.device - sent.device <= sent.host


@torch.inference_mode()
def test_attention_of_meta_tensors_needs_no_matrix_of_scores():
    q = torch.empty(1, 2, 5000, 8, device="meta")
    with LiveMetaTensors() as live:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert live.peak < 10 * q.nbytes


def test_a_vae_in_a_wider_type_takes_twice_as_much_and_the_network_the_same():
    task = replace(TASK, dtype=torch.bfloat16)
    narrow = predict(Plan(task=task, chunk=CHUNK)).memory
    wide = predict(Plan(task=replace(task, vae_dtype=torch.float32), chunk=CHUNK)).memory
    network, vae = weight_bytes(task.config, task.vae, torch.bfloat16, torch.bfloat16)
    assert wide["denoise"].device - narrow["denoise"].device == vae
    assert wide["decode"].device - narrow["decode"].device > vae  # activations grow too


def test_on_a_gpu_slices_are_the_largest_that_fit(network):
    plan = small(20, 400, 300)
    usual, whole = (
        denoise_memory(replace(plan, slicing=slicing)).device for slicing in (Slicing(), SLICES[0])
    )
    assert whole > 1.5 * usual
    for memory in (usual, (usual + whole) // 2, whole):
        fitted = fitting(plan.task, memory, gpu=True)
        assert denoise_memory(fitted).device <= memory
        larger = SLICES.index(fitted.slicing) - 1
        if larger >= 0:
            assert denoise_memory(replace(plan, slicing=SLICES[larger])).device > memory
        assert fitting(plan.task, memory).slicing == Slicing()
    assert fitting(plan.task, whole, gpu=True).slicing == SLICES[0]
    assert suited_to_gpu(plan, None) == plan


def test_on_a_gpu_no_tensor_of_the_vae_has_more_than_2_to_the_31_values():
    plan = Plan(task=Task(frames=3, size=(3840, 2160)), chunk=CHUNK)
    tiled = suited_to_gpu(plan, None)
    assert tiled == replace(plan, tile=tiled.tile) and tiled.tile is not None
    for tile, fits in ((tiled.tile, True), (None, False)):
        height, width = max(replace(plan, tile=tile).vae_tiles)
        largest = decoding(plan.task.vae, plan.task.vae_type, 3, height, width).largest
        assert (largest <= 2**31) == fits
    small = replace(plan, task=replace(plan.task, size=(1704, 960)))
    assert suited_to_gpu(small, None) == small


@torch.inference_mode()
def test_traffic_is_what_operations_read_and_write_and_views_are_free():
    with LiveMetaTensors() as live:
        x = torch.empty(10, device="meta")
        x.view(2, 5)[:, :3].t()
        assert live.traffic == 40
        x.add_(1)
        assert live.traffic == 80
        _ = x + x
    assert live.traffic == 80 + 3 * 40 and live.largest == 10
