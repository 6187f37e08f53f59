"""How long a run takes: the fit, what is stored, and where it is told."""

import argparse
import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_core.bench import machine as bench
from star_core.bench import speed
from star_core.bench.speed import Case
from star_core.cli import main
from star_core.cli.upscale import add_upscale, run_spec
from star_core.model import load
from star_core.planning.duration import (
    Machine,
    Speed,
    duration,
    fitted,
    store_machine,
    stored_machine,
)
from star_core.planning.plan import Plan, Task
from star_core.planning.predict import Work, predict
from star_core.planning.report import time_text
from star_core.training.tiny import NETWORK
from star_core.video_io import open_sink

CPU = torch.device("cpu")
SMALL = replace(NETWORK, dim_mult=(1,), attn_scales=(1.0,))
KNOWN = Machine(speeds={torch.float32: Speed(1e-9, 1e-9)}, start=2.0, pixel=1e-6)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@given(flop=st.floats(0, 10), byte=st.floats(0.1, 10))
def test_exact_measurements_are_fitted_exactly(flop, byte):
    speed = Speed(flop * 1e-12, byte * 1e-10)
    works = [Work(10**9, 10**8), Work(4 * 10**10, 10**8), Work(10**12, 10**10)]
    found = fitted([(work, speed.seconds(work)) for work in works])
    assert found == pytest.approx(speed, rel=1e-6, abs=1e-20)


def test_no_part_of_a_speed_is_negative():
    # the more bytes, the less time: that would make bytes pay back
    found = fitted([(Work(10**9, 10**6), 1.0), (Work(10**9, 10**8), 0.5)])
    assert min(found) == 0 < max(found)


def test_the_time_of_a_plan_is_that_of_its_stages_by_their_types():
    plan = Plan(
        task=Task(frames=2, size=(32, 32)), chunk=Task(frames=2, size=(32, 32)).usual_chunk()
    )
    task = replace(plan.task, dtype=torch.float16, vae_dtype=torch.float32, text_encoder=False)
    prediction = predict(replace(plan, task=task))
    machine = replace(KNOWN, speeds={torch.float32: Speed(1e-9, 0), torch.float16: Speed(0, 1e-9)})
    flops = prediction.flops
    expected = 2 + 1e-6 * 2 * 32 * 32 + 1e-9 * prediction.work["denoise"].traffic
    expected += 1e-9 * (flops["encode"] + flops["decode"])
    assert duration(prediction, task, machine) == pytest.approx(expected)
    assert duration(prediction, replace(task, dtype=torch.bfloat16), machine) is None
    assert duration(prediction, task, None) is None


def test_what_is_stored_is_found_again_by_device_and_other_types_stay():
    assert stored_machine(CPU) is None
    file = store_machine(CPU, KNOWN)
    assert stored_machine(CPU) == KNOWN
    other = Machine(
        speeds={torch.bfloat16: Speed(0.0, 3e-9)}, start=1.0, pixel=0.0, channels_last=True
    )
    assert store_machine(CPU, other) == file
    assert stored_machine(CPU) == replace(other, speeds={**KNOWN.speeds, **other.speeds})
    file.write_text("{")  # damaged
    assert stored_machine(CPU) is None
    store_machine(CPU, KNOWN)
    assert stored_machine(CPU) == KNOWN


def test_times_are_told_in_a_unit_that_suits_them():
    assert [time_text(s) for s in (7.4, 600, 9000)] == [
        "Takes about 7 seconds",
        "Takes about 10 minutes",
        "Takes about 2.5 hours",
    ]
    assert "bench" in time_text(None)


def test_bench_stores_what_plan_and_upscale_then_tell(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "run", lambda *args, **options: None)
    monkeypatch.setattr(bench, "cases", lambda tiny: [])
    monkeypatch.setattr(bench, "ROUNDS", 1)
    plan = ["plan", "--frame-count", "3", "--size", "24x16", "--model", "tiny", "--device", "cpu"]
    assert main(plan) == 0
    assert "after `python -m star_core bench` has measured" in capsys.readouterr().out
    assert main(["bench", "--device", "cpu"]) == 0
    machine = stored_machine(CPU)
    assert machine is not None and max(machine.speeds[torch.float32]) > 0 and machine.pixel >= 0
    store_machine(CPU, KNOWN)
    capsys.readouterr()
    assert main([*plan, "--json"]) == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    with open_sink(tmp_path / "in.mkv", width=24, height=16, fps=Fraction(10)) as sink:
        for frame in torch.rand(3, 3, 16, 24):
            sink.write(frame)
    command = ["upscale", str(tmp_path / "in.mkv"), str(tmp_path / "out.mkv"), "--shots", "off"]
    assert main([*command, "--device", "cpu"]) == 0
    assert f"Takes about {seconds:.0f} seconds" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "expected"), [((1.0, 0.9), True), ((1.0, 0.97), False)])
def test_channels_last_is_chosen_where_a_gpu_is_clearly_faster_with_it(
    monkeypatch, seconds, expected
):
    layouts = {}

    def timed(work, device):
        kernel = work.__closure__[[*work.__code__.co_freevars].index("network")].cell_contents
        last = next(p for p in kernel.parameters() if p.ndim == 4 and min(p.shape) > 1)
        layouts[last.is_contiguous(memory_format=torch.channels_last)] = True
        return seconds[len(layouts) - 1]

    monkeypatch.setattr(
        bench, "FULL", Case(name="small", config=SMALL, frames=1, height=6, width=4)
    )
    monkeypatch.setattr(bench, "_shortest", timed)
    assert bench._faster_with_channels_last(CPU, torch.float32) == expected
    assert [*layouts] == [False, True]


def test_a_run_takes_the_layout_that_was_found(tmp_path):
    store_machine(CPU, replace(KNOWN, channels_last=True))
    with open_sink(tmp_path / "in.mkv", width=24, height=16, fps=Fraction(10)) as sink:
        sink.write(torch.rand(3, 16, 24))
    parser = argparse.ArgumentParser()
    add_upscale(parser)
    command = [str(tmp_path / "in.mkv"), str(tmp_path / "out.mkv"), "--device", "cpu"]
    run, _ = run_spec(parser.parse_args(command))
    network = load(run.files, **run.computing, **run.loading).star.network
    kernels = [p for p in network.parameters() if p.ndim == 4 and min(p.shape) > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    x, y = (
        torch.rand(1, network.config.in_dim, 2, 10, 8),
        torch.ones(1, 77, network.config.context_dim),
    )
    plain = load(run.files, **run.computing | {"channels_last": False}, **run.loading).star.network
    with torch.inference_mode():
        found, expected = (each(x, torch.tensor([500]), y, x) for each in (network, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
