"""STAR Plan in the host: what it sets on a MODEL, and what it says."""

import importlib
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.host

LATENT = {"samples": torch.zeros(1, 32, 40, 98, 128)}


@pytest.fixture(scope="module")
def nodes(pack):
    names = ("host", "host_files", "host_model", "host_sampling", "loaders", "plan")
    modules = {n: importlib.import_module(f".nodes.{n}", pack.__name__) for n in names}
    return SimpleNamespace(**modules)


@pytest.fixture(scope="module")
def loaded(nodes):
    name = nodes.host_files.BUILT_IN_NAME
    model, _, vae = nodes.loaders.StarLoadModel.execute(name, *3 * ["auto"], "none").args
    return model, vae


@pytest.fixture
def planned(nodes, loaded):
    def planned(memory):
        model, text = nodes.plan.StarPlan.execute(*loaded, LATENT, memory).args
        options = model.model_options["transformer_options"]
        return options[nodes.host_model.WORK_OPTIONS], text

    return planned


def test_where_memory_is_plenty_nothing_is_curtailed(planned):
    how, text = planned(1000.0)
    assert how["tile"] is None and not how["slicing"].offload
    assert "Fits into 1000.00 GiB" in text and "tile_size" not in text


def test_where_memory_is_scarce_skips_wait_elsewhere_and_frames_are_cut(planned):
    how, text = planned(0.05)
    assert how["tile"] is not None and how["slicing"].offload
    assert "Set tile_size" in text


def test_without_a_number_the_hosts_memory_is_planned_for(planned, nodes, monkeypatch):
    monkeypatch.setattr(nodes.host, "free_memory", lambda: 2**30)
    assert "0.90 GiB" in planned(0.0)[1]


def test_memory_that_the_host_can_clear_counts_as_free(nodes, monkeypatch):
    free = nodes.host.free_memory()
    assert free > 0
    device = nodes.host.mm.get_torch_device()
    loaded = SimpleNamespace(device=device, model_loaded_memory=lambda: 2**40)
    monkeypatch.setattr(nodes.host.mm, "current_loaded_models", [loaded])
    assert nodes.host.free_memory() > 2**40 - 2**30


def test_the_model_given_stays_as_it_was(planned, loaded, nodes):
    planned(0.05)
    assert nodes.host_model.WORK_OPTIONS not in loaded[0].model_options["transformer_options"]


def test_windows_of_the_plan_reach_the_sampler(planned, loaded, nodes, monkeypatch):
    seen = []
    patch = nodes.host_sampling.patch_chunks
    monkeypatch.setattr(
        nodes.host_sampling,
        "patch_chunks",
        lambda model, chunk, merge: seen.append(chunk) or patch(model, chunk, merge),
    )
    planned(0.05)
    planned(1000.0)
    assert seen[0].length < seen[1].length == 32


def test_another_model_is_refused(nodes, loaded):
    model = SimpleNamespace(model=SimpleNamespace())
    with pytest.raises(ValueError, match="STAR Plan: .*connect STAR Load Model"):
        nodes.plan.StarPlan.execute(model, loaded[1], LATENT, 1.0)
