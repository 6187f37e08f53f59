import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from star_core.verify import FAMILIES, family_of, replay, run, verify
from star_core.verify.case import Case, Comparison, evaluate
from star_core.verify.degradation import numbers_after
from tests.paths import GOLDEN

GOLDEN, COGVIDEOX = GOLDEN / "i2vgenxl", GOLDEN / "cogvideox"


def write(folder, name, sidecar, **tensors):
    (folder / f"{name}.json").write_text(json.dumps(sidecar))
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.json"


def changed(folder, name, **settings):
    """A copy of a golden case with other settings."""
    (golden,) = (*GOLDEN.glob(f"{name}.json"), *COGVIDEOX.glob(f"{name}.json"))
    sidecar = json.loads(golden.read_text())
    shutil.copy(golden.with_suffix(".safetensors"), folder)
    return write(folder, name, {**sidecar, **settings})


@pytest.mark.parametrize(
    "path",
    sorted((*GOLDEN.glob("*.json"), *COGVIDEOX.glob("*.json"))),
    ids=lambda path: path.stem,
)
def test_golden_case_is_reproduced(path):
    result = replay(path)
    expected = {"chunk_crash": "info"}
    assert result.status == expected.get(path.stem, "ok"), str(result)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("guidance_0", {"guide_scale": 6.0}),
        ("guidance_0", {"guide_rescale": 0.3}),
        ("guidance_0", {"clamp": 0.5}),
        ("guidance_0", {"percentile": 0.9}),
        ("sample_sr_toy_1", {"steps": 7}),
        ("sample_sr_toy_1", {"solver_mode": "fast"}),
        ("sample_sr_toy_1", {"discretization": "linspace"}),
        ("sample_sr_toy_1", {"max_chunk_len": 2}),
        ("sample_sr_toy_1", {"t_max": 898}),
        ("chunk_merge_0", {"chunk_inds": [[0, 5], [3, 8], [6, 11]]}),
        ("solver_dpmpp_2m_sde_analytic_2", {"kwargs": {"eta": 0.6, "s_noise": 0.9}}),
        ("solver_heun_analytic_1", {"kwargs": {"s_churn": 3.0}}),
        ("solver_heun_analytic_0", {"denoiser": "0.8*tanh(1.4*x_in)"}),
        ("schedule_star", {"config": {"n": 1000, "scale_min": 2, "scale_max": 3}}),
        ("brownian_tree_0", {"seed": 1}),
        ("df_loss_0", {"alpha": 1.0}),
        ("sampler_4", {"cfg_scale": 5.0}),
        ("sampler_4", {"shift_scale": 3.0}),
        ("sampler_4", {"formula": "v = 0.5*xn - 0.4*lq + 0.3*mean(ctx over tokens)"}),
        ("vae_small", {"decode_plan": [[0, 2], [2, 5]]}),
        ("degradation_ops_0", {"noise": "manual_seed(8) gaussian sigma 12 poisson scale 1.5"}),
    ],
)
def test_the_settings_of_a_case_drive_its_replay(tmp_path, name, settings):
    assert replay(changed(tmp_path, name)).status == "ok"
    result = replay(changed(tmp_path, name, **settings))
    assert result.status == "FAIL" and result.error is not None, str(result)


def test_a_wrong_number_fails_with_its_error(tmp_path):
    path = changed(tmp_path, "guidance_2")
    tensors = load_file(path.with_suffix(".safetensors"))
    tensors["x0"][0, 0, 0, 0, 0] += 0.5
    save_file(tensors, path.with_suffix(".safetensors"))
    result = replay(path)
    assert result.status == "FAIL" and result.error == pytest.approx(0.5)
    assert str(result).startswith("FAIL guidance_2 0.5 ")


@pytest.mark.parametrize(
    ("name", "description", "family"),
    [
        ("unet_d", "what", "unet"),
        ("schedule", "what", "schedule"),
        ("sample_sr_toy_77", "what", "sample_sr_toy"),
        ("degradation_ops_1", "what", "degradation_ops"),
        ("degradation_other", "what", "degradation"),
        ("sampler_50", "case", "sampler"),
    ],
)
def test_the_family_is_the_longest_known_name(name, description, family):
    assert family_of(Case(Path(f"{name}.json"), {description: ""}))[0] == family


@pytest.mark.parametrize(
    ("name", "sidecar"),
    [
        ("unetd", {"what": ""}),
        ("sampler_4", {"what": ""}),
        ("unet_a", {"case": ""}),
        ("unet_a", {}),
        ("unet_a", []),
        ("unet_a", {"what": ""}),
    ],
)
def test_what_cannot_be_replayed_fails(tmp_path, name, sidecar):
    assert replay(write(tmp_path, name, sidecar)).status == "FAIL"
    assert run(tmp_path) == 1


def test_information_and_later_families_do_not_fail(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(FAMILIES, "case", {"transformer": None})
    write(tmp_path, "novel_0", {"what": "", "replay": False, "replay_note": "for looking"})
    write(tmp_path, "transformer_rope", {"case": ""})
    assert run(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "info novel_0 - - for looking"
    assert lines[1].startswith("not yet transformer_rope")


def test_json_is_one_object_with_a_case_each(tmp_path, capsys):
    shutil.copy(GOLDEN / "padding.json", tmp_path)
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", "unknown", {"what": ""})
    assert run(tmp_path, as_json=True) == 1
    printed = json.loads(capsys.readouterr().out)
    statuses = {case["name"]: case["status"] for case in printed["cases"]}
    assert statuses == {"padding": "ok", "unknown": "FAIL"} and printed["ok"] is False


def test_a_folder_without_cases_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no test vectors"):
        verify(tmp_path)


def worst(ours, theirs, **sidecar):
    return Case(Path("x.json"), sidecar).worst(Comparison(ours, theirs))


def test_tolerance_without_a_word_follows_the_size_of_the_output():
    theirs = torch.tensor([0.0, -100.0])
    assert worst(theirs + 0.5, theirs) == (0.5, pytest.approx(1e-3))


def test_only_the_tolerance_that_is_given_counts():
    theirs = torch.tensor([0.0, -100.0])
    assert worst(theirs + 0.5, theirs, suggested_atol=0.01) == (0.5, pytest.approx(0.01))
    assert worst(theirs * 1.5, theirs, suggested_rtol=0.01) == (50.0, pytest.approx(1.0))


def test_infinities_have_to_agree_and_nan_is_never_close():
    theirs = torch.tensor([math.inf, 1.0])
    assert worst(theirs.clone(), theirs)[0] == 0
    for wrong in ([1.0, 1.0], [math.nan, 1.0], [math.inf, math.nan], [-math.inf, 1.0]):
        error, tolerance = worst(torch.tensor(wrong), theirs)
        assert error > 1e30 > tolerance


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        worst(torch.zeros(2, 3), torch.zeros(3, 2))


def test_integers_and_text_have_to_be_equal():
    assert worst([1, 2], [1, 2]) == (0, 0) and worst("a", "b") == (1, 0)
    assert worst(torch.tensor([1, 2]), torch.tensor([1, 3])) == (1, 0)


def test_formulas_are_arithmetic_on_known_names():
    x = torch.tensor([1.0, 2.0])
    assert torch.equal(evaluate("-2*sin(x)/4 + x**2", {"x": x}), -2 * x.sin() / 4 + x**2)


@pytest.mark.parametrize("formula", ["__import__('os')", "x.data", "y", "x[0]", "sin(x, x)"])
def test_formulas_run_nothing_else(formula):
    with pytest.raises(ValueError, match="cannot evaluate"):
        evaluate(formula, {"x": torch.ones(1)})


def test_numbers_are_found_in_prose():
    prose = "size13 sig(2.4,1.2) theta=-1.1 beta=.7"
    assert numbers_after("size", prose) == [13]
    assert numbers_after("sig", prose) == [2.4, 1.2]
    assert numbers_after("theta", prose) == [-1.1] and numbers_after("beta", prose) == [0.7]
    assert numbers_after("sig", "size11 sig=1.1 beta=2.5") == [1.1]
    with pytest.raises(ValueError, match="no sig"):
        numbers_after("sig", "size13")
