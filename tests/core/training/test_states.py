"""What a run leaves behind when it is stopped, goes wrong or is continued differently."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from star_core.losses import DFLossConfig
from star_core.training.objective import TrainingObjective, draw_batch
from star_core.training.tiny import new_network
from star_core.training.trainer import TrainExecution, choose_trained, narrow_frozen
from tests.small_run import CONFIG, SMALL, Poisoned, latent_pairs, run, states, stored


@pytest.fixture
def pairs(tmp_path):
    return latent_pairs(tmp_path / "pairs")


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(pairs, tmp_path, caplog):
    seen = []
    data = Poisoned(pairs, [3])  # in the second step of two samples each
    run(data, tmp_path / "out", every=1, execution=TrainExecution(keep=9),
        on_step=lambda step, steps, parts: seen.append(parts["gradient"]))  # fmt: skip
    good, bad = stored(tmp_path / "out", 1), stored(tmp_path / "out", 2)
    for kind in ("trained", "average"):
        assert all(torch.equal(bad[kind][key], value) for key, value in good[kind].items())
    assert (good["skipped"], bad["skipped"]) == (0, 1)
    assert "step 2 is skipped" in caplog.text
    later = stored(tmp_path / "out", 4)["trained"]
    assert all(value.isfinite().all() for value in later.values())
    assert any(not torch.equal(later[key], value) for key, value in good["trained"].items())
    assert seen[1] != seen[1] and all(norm > 0 for norm in seen[:1] + seen[2:])


def test_too_many_of_them_end_the_run_with_the_last_good_state(pairs, tmp_path):
    data = Poisoned(pairs, range(4, 100))
    config, execution = replace(CONFIG, steps=50), TrainExecution(most_skipped=3)
    with pytest.raises(ValueError, match=r"4 of the last 6 .*state-0000004\.pt"):
        run(data, tmp_path / "out", config, every=2, execution=execution)
    state = stored(tmp_path / "out", 4)
    assert state["skipped"] == 2
    assert all(value.isfinite().all() for value in state["trained"].values())


def test_the_last_states_are_kept(pairs, tmp_path):
    run(pairs, tmp_path / "out", every=1, execution=TrainExecution(keep=3))
    assert states(tmp_path / "out") == [2, 3, 4]
    assert not list((tmp_path / "out").glob("*.part"))


def test_another_configuration_is_refused_field_by_field(pairs, tmp_path):
    run(pairs, tmp_path / "out")
    for change, words in (
        ({"noise_level": 700}, "noise_level was 900 and is 700"),
        ({"df": DFLossConfig(beta=0.5)}, "df.beta was 1.0 and is 0.5"),
        ({"batch": 3}, "samples of a step was 2 and is 3"),
    ):
        with pytest.raises(ValueError, match=words):
            run(pairs, tmp_path / "out", replace(CONFIG, steps=5, **change))
    with pytest.raises(ValueError, match="recipe was None and is light"):
        run(pairs, tmp_path / "out", replace(CONFIG, steps=5), facts={"recipe": "light"})


def test_what_may_change_does(pairs, tmp_path):
    run(pairs, tmp_path / "out")
    more = replace(CONFIG, steps=5, learning_rate=1e-3, clip=0.5, batch=1)
    run(pairs, tmp_path / "out", more, execution=TrainExecution(accumulate=2))
    assert states(tmp_path / "out")[-1] == 5


def test_states_that_are_damaged_or_too_far_are_told(pairs, tmp_path):
    out = tmp_path / "out"
    run(pairs, out, every=2)
    with pytest.raises(ValueError, match="step 4 already: ask for more than 3"):
        run(pairs, out, replace(CONFIG, steps=3))
    newest = out / "state-0000004.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"delete it, training then resumes from state-0000002"):
        run(pairs, out)
    newest.unlink()
    run(pairs, out)
    assert states(out) == [2, 4]
    for every in (0, -1):
        with pytest.raises(ValueError, match="--every must be at least 1"):
            run(pairs, out, every=every)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        TrainExecution(keep=0)


def test_a_run_that_is_complete_writes_its_model_again(pairs, tmp_path):
    written = []

    def write(out, network, prompts, step):
        written.append((step, network.out[-1].weight.clone()))

    run(pairs, tmp_path / "out", write=write)
    run(pairs, tmp_path / "out", write=write)
    (first, before), (second, after) = written
    assert first == second == 4 and torch.equal(before, after)


def test_parts_of_a_step_add_up_to_the_step(pairs, tmp_path):
    norms = {"whole": [], "parts": []}  # of gradients, whose scale Adam does not see
    run(pairs, tmp_path / "whole", replace(CONFIG, steps=2, batch=4),
        on_step=lambda step, steps, parts: norms["whole"].append(parts["gradient"]))  # fmt: skip
    parts = TrainExecution(accumulate=4, average_on_cpu=True)
    run(pairs, tmp_path / "parts", replace(CONFIG, steps=2, batch=1), execution=parts,
        on_step=lambda step, steps, parts: norms["parts"].append(parts["gradient"]))  # fmt: skip
    assert norms["parts"] == pytest.approx(norms["whole"], rel=1e-3)
    whole, parts = (stored(tmp_path / name, 2) for name in ("whole", "parts"))
    for kind in ("trained", "average"):
        for key, value in whole[kind].items():
            # Adam makes much of rounding where gradients are nearly nothing.
            torch.testing.assert_close(parts[kind][key], value, rtol=1e-4, atol=5e-4)


def test_torch_without_muon_trains_and_refuses_muon():
    code = (
        "import torch; vars(torch.optim).pop('Muon', None)\n"
        "from star_core.training.optimizers import make_optimizers\n"
        "from star_core.training.objective import TrainConfig\n"
        "named = {'a': torch.nn.Parameter(torch.ones(20, 20))}\n"
        "print(type(*make_optimizers(named, TrainConfig(steps=1))).__name__)\n"
        "make_optimizers(named, TrainConfig(steps=1, optimizer='muon'))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "AdamW\n"
    assert "ValueError" in result.stderr and "--optimizer adamw" in result.stderr


def test_frozen_parts_take_half_the_memory_and_give_the_same_loss(pairs):
    network, prompts = new_network(SMALL, 0)
    torch.nn.init.normal_(network.out[-1].weight)  # pyright: ignore[reportArgumentType]
    choose_trained(network, "star")
    config = replace(CONFIG, bf16=True, degraded=0.0)
    objective = TrainingObjective(network, config, prompts=prompts)
    batch = draw_batch(pairs, range(2), config)
    before = objective(batch)[0].item()
    narrow_frozen(network)
    assert objective(batch)[0].item() == before
    kinds = {(p.dtype, p.requires_grad) for p in network.parameters() if p.ndim > 1}
    assert kinds == {(torch.bfloat16, False), (torch.float32, True)}
