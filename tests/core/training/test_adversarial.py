"""The second stage of a distillation: heads and student learn, the teacher does not."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from star_core.lora import add_lora, lora_layers, lora_strength
from star_core.losses import DFLossConfig
from star_core.models.cogvideox_weights import COGVIDEOX_2B
from star_core.sampling_defaults import SamplingDefaults
from star_core.training.adversarial import AdversarialObjective, heads_of
from star_core.training.checkpointing import recompute
from star_core.training.distillation import DistillationObjective, DistillConfig
from star_core.training.objective import TrainConfig, draw_batch
from star_core.training.tiny import NETWORK, new_network
from star_core.training.trainer import TrainExecution, choose_trained, train
from tests.small_run import latent_pairs

SMALL = replace(
    NETWORK, in_dim=4, out_dim=4, dim_mult=(1, 1), attn_scales=(0.5,), hint_prior=0.5, dropout=0.1
)
CONFIG = TrainConfig(
    steps=4, batch=2, trains="lora", early=0.0, degraded=0.0, df=DFLossConfig(beta=0.0)
)
TEACHER = SamplingDefaults(cfg=3.0, cfg_rescale=0.2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return latent_pairs(tmp_path_factory.mktemp("pairs"), 6)


def objective_of(weight: float, evaluations: int = 2, config: TrainConfig = CONFIG) -> Any:
    """An objective whose LoRA and heads do something already; without a weight, the first stage."""
    network: Any
    network, prompts = new_network(SMALL, 0)
    generator = torch.Generator().manual_seed(1)
    # A new network gives nothing out and shows its ControlNet nothing of the noisy latents.
    for layer in (network.out[-1], network.VideoControlNet.input_blocks[0][0]):
        layer.weight.data.normal_(generator=generator)
    add_lora(network, 4, layers="all")
    for layer in lora_layers(network).values():
        layer.lora_up.weight.data.normal_(std=0.3, generator=generator)
    choose_trained(network, "lora")
    prompts.requires_grad_(False)
    distill = DistillConfig(evaluations=evaluations, solver_steps=8, adversarial=weight)
    kind = AdversarialObjective if weight else DistillationObjective
    objective = kind(network, config, distill, TEACHER, prompts=prompts)
    for name, parameter in objective.named_parameters():
        if name.startswith("heads."):
            parameter.data.normal_(std=0.2, generator=generator)
    return objective


def gradients(objective, batch):
    objective(batch)[0].backward()
    return {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}


def test_the_student_deceives_the_heads_the_heads_judge_and_nothing_else_learns(pairs):
    batch = draw_batch(pairs, range(4), CONFIG)
    first, once, twice = (gradients(objective_of(w), batch) for w in (0.0, 1.0, 2.0))
    heads = {name for name in once if name.startswith("heads.")}
    assert heads and once.keys() - heads == first.keys()
    assert all(".lora_" in name for name in first)
    for name in heads:  # their loss has a weight of its own
        torch.testing.assert_close(once[name], twice[name])
        assert once[name].any()
    # What the adversarial loss adds is proportional to its weight: the heads' own adds nothing.
    added = {name: once[name] - first[name] for name in first}
    for name, gradient in added.items():
        torch.testing.assert_close(twice[name] - first[name], 2 * gradient, atol=1e-5, rtol=1e-3)
    assert any(gradient.abs().max() > 1e-4 for gradient in added.values())


def test_features_are_those_of_the_teacher(pairs):
    objective = objective_of(1.0)
    batch = draw_batch(pairs, range(2), CONFIG)
    y = objective.embeddings(batch)
    before = objective._features(batch.hq, batch.t, y, batch.lq)
    with lora_strength(objective.network, 0.0):
        teachers = objective.network.control_features(batch.hq, batch.t, y, batch.lq)
    assert [x.shape[2:] for x in teachers] == [(6, 4), (4, 2)]
    for a, b in zip(before, teachers, strict=True):
        assert torch.equal(a, b)
    students = objective.network.control_features(batch.hq, batch.t, y, batch.lq)
    assert not torch.allclose(students[-1], teachers[-1])


@pytest.mark.parametrize("evaluations", [1, 2, 4])
def test_what_the_heads_see_lies_in_the_phase_and_has_the_noise_of_its_level(evaluations, pairs):
    objective = objective_of(1.0, evaluations)
    batch = draw_batch(pairs, range(64), CONFIG)
    batch = batch._replace(hq=torch.zeros_like(batch.hq), lq=torch.zeros_like(batch.lq))
    predicted = objective.predict(batch)
    # A perfect student, which finds the clean clip under the noise.
    predicted = predicted._replace(clean=batch.hq)
    false, real, t = objective._noised(predicted, batch)
    times = [*objective.timesteps.tolist(), -1]
    phase = 8 // evaluations
    for end, each in zip(predicted.border.tolist(), t.tolist(), strict=True):
        assert times[end] < each <= times[end - phase]
    assert len(set(t.tolist())) > 16
    sigma = objective.schedule.sigma(t)
    for noised in (false, real):
        measured = noised.flatten(1).square().mean(1).sqrt() / sigma.flatten()
        assert 0.9 < measured.mean() < 1.1
    # Before the last phase some of the noise is that of the start.
    own = [not torch.equal(a, b) for a, b in zip(false, real, strict=True)]
    assert own == (predicted.border < 8).tolist()


def test_the_losses_are_those_of_the_opinions_on_both_kinds(pairs):
    objective = objective_of(2.0)
    batch = draw_batch(pairs, range(2), CONFIG)
    predicted = objective.predict(batch)
    false, real, t = objective._noised(predicted, batch)
    of_false, of_real = (
        objective.heads(objective._features(x, t, predicted.y, batch.lq)) for x in (false, real)
    )
    loss, parts = objective(batch)
    hinges = [
        (1 + f).clamp(min=0).mean() + (1 - r).clamp(min=0).mean()
        for f, r in zip(of_false, of_real, strict=True)
    ]
    hinge = torch.stack(hinges).mean()
    deceived = torch.stack([f.mean() for f in of_false]).mean()
    assert parts["heads"] == pytest.approx(hinge.item(), abs=1e-5)
    assert parts["adversarial"] == pytest.approx(-deceived.item(), abs=1e-5)
    torch.testing.assert_close(loss, predicted.loss - 2 * deceived + hinge)


@pytest.mark.parametrize(("learner", "figure"), [("heads.", "heads"), ("network.", "adversarial")])
def test_each_side_gets_better_by_a_step_along_its_gradient(learner, figure, pairs):
    objective = objective_of(1e4)
    batch = draw_batch(pairs, range(4), CONFIG)
    loss, before = objective(batch)
    loss.backward()
    learning = [p for n, p in objective.named_parameters() if n.startswith(learner)]
    gradient = [p.grad for p in learning if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradient]).norm()
    with torch.no_grad():
        for parameter in learning:
            if parameter.grad is not None:
                parameter -= 0.02 * parameter.grad / norm
        _, after = objective(batch)
    assert after[figure] < before[figure]


def test_checkpointing_recomputes_the_teacher_s_features_as_the_teacher_s(pairs):
    batch = draw_batch(pairs, range(2), CONFIG)
    plain, recomputed = objective_of(1.0), objective_of(1.0)
    recompute(recomputed.network)
    expected, found = gradients(plain, batch), gradients(recomputed, batch)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_a_resumed_second_stage_ends_where_an_uninterrupted_one_does(pairs, tmp_path):
    def run(folder: str, steps: int):
        objective = objective_of(0.5, config=replace(CONFIG, steps=steps, warmup=1))
        train(pairs, objective, tmp_path / folder, write=lambda *_: None, every=2)
        return {n: p.detach().clone() for n, p in objective.named_parameters() if p.requires_grad}

    whole = run("whole", 4)
    halves = [run("halves", steps) for steps in (2, 4)]
    assert any(name.startswith("heads.") for name in whole)
    for name, value in whole.items():
        assert torch.equal(value, halves[1][name]), name
        assert not torch.equal(value, halves[0][name]), name


def test_what_cannot_have_heads_is_refused(pairs, tmp_path):
    sharded = TrainExecution(shard=True)
    with pytest.raises(ValueError, match="adversarial heads: leave out --shard"):
        train(pairs, objective_of(0.5), tmp_path, write=lambda *_: None, execution=sharded)
    with pytest.raises(ValueError, match="CogVideoX"):
        heads_of(COGVIDEOX_2B)
