from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from star_core.models.unet import ControlledVideoUNet
from star_core.plots import spreads
from star_core.training import ablation
from star_core.training.ablation import VARIANTS, Ablation, ablate, place_liem, table
from star_core.training.autoencoder import TINY_VAE, start_as_projection
from star_core.training.tiny import NETWORK
from star_core.vae.patch import patch_vae
from star_core.video_io import open_sink

SMALL = replace(NETWORK, dim_mult=(1,), attn_scales=(1.0,))


def outputs(liem, scale):
    """Returns the outputs of a network whose gates are scaled."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ControlledVideoUNet(replace(SMALL, hint_prior=0.0, guess_input=False)).eval()
    place_liem(network, liem)
    for key, parameter in network.named_parameters():
        if ".local" in key:
            parameter.detach().mul_(scale)
    generator = torch.Generator().manual_seed(1)
    x, hint = (torch.randn(1, NETWORK.in_dim, 2, 4, 4, generator=generator) for _ in range(2))
    y = torch.randn(1, 2, SMALL.context_dim, generator=generator)
    with torch.no_grad():
        return network(x, torch.tensor([500]), y, hint)


@pytest.mark.parametrize(
    ("liem", "spatial", "temporal"),
    [
        ("none", False, False),
        ("spatial", True, False),
        ("temporal", False, True),
        ("both", True, True),
        ("after", True, True),
    ],
)
def test_a_variant_has_the_gates_that_it_names(liem, spatial, temporal):
    network = ControlledVideoUNet(SMALL)
    place_liem(network, liem)
    shapes = {tuple(p.shape) for key, p in network.named_parameters() if ".local" in key}
    assert ((1, 2, 7, 7) in shapes, (1, 2) in shapes) == (spatial, temporal)
    assert outputs(liem, 1.0).shape == (1, NETWORK.in_dim, 2, 4, 4)


def test_a_gate_before_the_norm_changes_next_to_nothing_and_one_after_attention_does():
    before = (outputs("both", 1.0) - outputs("both", 3.0)).abs().max()
    after = (outputs("after", 1.0) - outputs("after", 3.0)).abs().max()
    assert before < 1e-3 < 10 * after


def test_the_variants_are_those_of_the_papers_tables():
    assert {v.liem for v in VARIANTS} == {"none", "spatial", "temporal", "both", "after"}
    assert {v.df.order for v in VARIANTS} == {"direct", "inverse", "unseparated"}
    assert {v.df.alpha for v in VARIANTS} == {0.5, 1.0, 2.0}
    assert 0.0 in {v.df.beta for v in VARIANTS}


def test_an_ablation_runs_goes_on_where_it_stopped_and_tells_mean_and_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "NETWORK", SMALL)
    monkeypatch.setattr(ablation, "CROP", (2, 6, 4))
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    lq = torch.randn(4, NETWORK.in_dim, 2, 6, 4)
    save_file({"hq": (0.5 * lq).half(), "lq": lq.half()}, pairs / "pairs_000.safetensors")
    clip = tmp_path / "clip.mkv"
    with open_sink(clip, width=32, height=40, fps=Fraction(25)) as sink:
        for _ in range(2):
            sink.write(torch.rand(3, 40, 32))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = patch_vae(TINY_VAE)
    start_as_projection(vae.model, torch.rand(20, 3, 16, 16) * 2 - 1)  # pyright: ignore[reportArgumentType]
    vae.model.eval()
    settings = Ablation(
        pairs=pairs, clips=[clip], out=tmp_path / "out", steps=2, batch=1, seeds=(0, 1), frames=2
    )
    seen = []

    class Stop(Exception):
        pass

    def stop(step, steps, parts):
        seen.append(step)
        if len(seen) == 3:
            raise Stop

    variants = VARIANTS[:1]
    with pytest.raises(Stop):
        ablate(settings, vae, variants=variants, on_step=stop)
    text = ablate(settings, vae, variants=variants, on_step=stop)
    assert seen == [1, 2, 1, 1, 2]  # the first seed is not run again
    assert "± nan" not in text and "psnr" in text and VARIANTS[0].name in text
    assert (tmp_path / "out" / "ablation.md").read_text() == text


def test_the_table_gives_mean_and_deviation():
    rows = {"a": [{"psnr": 20.0}, {"psnr": 22.0}], "b": [{"psnr": 21.0}, {"psnr": 21.0}]}
    assert "| 0 | a | 2 | 21 ± 1.4 |" in table(rows)


def test_a_plot_marks_every_run_and_the_mean_in_its_row():
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib")
    (axes,) = spreads({"a": [1.0, 3.0], "b": [1.0, 1.0, 4.0]}, title="x").axes
    marks = [np.asarray(line.get_xydata()).tolist() for line in axes.lines]
    assert marks == [[[1, 0], [3, 0]], [[2, 0]], [[1, 1], [1, 1], [4, 1]], [[2, 1]]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
