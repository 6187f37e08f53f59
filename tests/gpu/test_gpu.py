"""What only a card can show: run `python -m pytest tests/gpu` on a machine with one."""

import json

import pytest
import torch
from torch import nn

from star_core.cli import main
from star_core.devices import send
from star_core.diffusion.denoiser import Denoiser
from star_core.diffusion.schedule import star_schedule
from star_core.memory import DevicePlacement, is_out_of_memory
from star_core.model import find_model, load
from star_core.models.slicing import Slicing
from star_core.parity import DEFAULT
from tests.core.test_standin import restored

pytestmark = pytest.mark.gpu


@pytest.fixture
def tiny():
    return load(find_model("tiny"), behaviour=DEFAULT, device="cpu")


@pytest.fixture(autouse=True)
def exact():
    """Full float32: a card's convolutions may use the shorter TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_whole_clip_on_the_card_is_that_of_the_cpu(tiny):
    plain = restored(tiny.star, tiny.vae, "cpu")
    on_the_card = restored(tiny.star, tiny.vae, "cuda")
    assert (on_the_card - plain).abs().max() < 0.5 / 255


@pytest.mark.parametrize("offload", [False, True])
def test_nothing_waits_for_the_card_in_an_evaluation(tiny, offload):
    network, (positive, negative) = tiny.star.network, tiny.star.prompts.of(None)
    size = (1, tiny.star.config.in_dim, 4, 34, 32)
    denoiser = Denoiser(
        network=network,
        schedule=star_schedule(),
        positive=positive,
        negative=negative,
        hint=torch.zeros(size),
    )
    slicing = Slicing(spatial_pixels=500, temporal_pixels=500, offload=offload)
    with DevicePlacement("cuda") as placement, torch.inference_mode():
        placement.load(network)
        x = torch.zeros(size, device="cuda")
        with network.working(slicing=slicing):
            denoiser(x, torch.tensor(1.0))  # loads kernels
            torch.cuda.set_sync_debug_mode("error")
            try:
                x_0 = denoiser(x, torch.tensor(0.5))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert x_0.isfinite().all()


def test_a_sent_tensor_may_be_changed_at_once():
    x = torch.ones(2**24)
    there = send(x, "cuda")
    x.zero_()
    assert bool((there == 1).all())


def test_a_module_that_does_not_fit_is_whole_and_at_home_and_fits_later():
    module = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(8)))  # 64 MiB each
    addresses = [weight.data_ptr() for weight in module.parameters()]
    whole = torch.cuda.get_device_properties(0).total_memory
    with DevicePlacement("cuda") as placement, torch.inference_mode():
        torch.cuda.empty_cache()
        in_use = torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction((in_use + 300 * 2**20) / whole)
        with pytest.raises(RuntimeError) as error:
            placement.load(module)
        assert is_out_of_memory(error.value)
        assert [weight.data_ptr() for weight in module.parameters()] == addresses
        torch.cuda.set_per_process_memory_fraction(1.0)
        placement.load(module)
        assert all(weight.is_cuda and not weight.is_inference() for weight in module.parameters())
    assert [weight.data_ptr() for weight in module.parameters()] == addresses


def test_the_report_has_no_errors_and_keeps_its_limits(tmp_path):
    path = tmp_path / "report.md"
    assert main(["bench", "--device", "cuda", "--report", str(path)]) == 0
    results = json.loads(path.with_suffix(".json").read_text())["results"]
    assert not [each for each in results if each["error"]]
    rows = {(each["check"], each["case"]): each["figures"] for each in results}
    for name in ("tiny", "random"):
        assert rows["parity", f"{name}, float32"]["relative error"] < 1e-4
        assert rows["parity", f"{name}, float16"]["relative error"] < 0.02
    for (check, case), figures in rows.items():
        if check == "plan":
            assert figures["GiB measured"] <= float(case.split()[0])
