import os
import socket
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import multiprocessing

from star_core.diffusion.schedule import star_schedule
from star_core.losses import DFLossConfig, df_loss
from star_core.sampling_defaults import LatentFormat
from star_core.star_checkpoint import load_model
from star_core.training.checkpointing import recompute
from star_core.training.objective import (
    DEGRADE,
    RESTORE,
    SHARPEN,
    Prompts,
    TrainConfig,
    TrainingObjective,
    draw_batch,
    draw_timestep,
)
from star_core.training.optimizers import Muon, learning_rate
from star_core.training.pairs import LatentPairs
from star_core.training.pixels import Decoder, PixelCrop
from star_core.training.tiny import (
    MODEL_FILE,
    NETWORK,
    SAMPLING,
    new_network,
    write_tiny,
)
from star_core.training.trainer import choose_trained, train
from tests.small_run import Distance

SMALL = replace(
    NETWORK, in_dim=4, out_dim=4, dim_mult=(1,), attn_scales=(1.0,), hint_prior=0.5, dropout=0.1
)
CONFIG = TrainConfig(steps=4, batch=2, warmup=1, learning_rate=5e-3)
write = partial(write_tiny, latents=LatentFormat())


@pytest.fixture
def pairs(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lq = torch.randn(6, 4, 2, 4, 4, generator=generator)
    folder = tmp_path / "pairs"
    folder.mkdir()
    save_file({"hq": (0.5 * lq).half(), "lq": lq.half()}, folder / "pairs_000.safetensors")
    return LatentPairs(folder, (2, 4, 4))


def objective(network, config, prompts) -> TrainingObjective:
    return TrainingObjective(network, config, prompts=prompts)


def last(network) -> torch.nn.Conv2d:
    return network.out[-1]


def offset(network) -> torch.Tensor:
    return network.state_dict()["out.2.bias"]


def run(pairs, out, config=CONFIG, **options):
    """Trains a small network anew; what was written."""
    network, prompts = new_network(SMALL, 0)
    train(pairs, objective(network, config, prompts), out, write=write, **options)
    return load_model(out / MODEL_FILE, dtype=torch.float32)


def test_training_starts_from_copying_the_hint():
    network, _ = new_network(SMALL, 0)
    hint = torch.randn(1, 4, 2, 4, 4)
    pure_noise = torch.randn(1, 4, 2, 4, 4)
    v = network(pure_noise, torch.tensor([999]), torch.zeros(1, 2, SMALL.context_dim), hint)
    torch.testing.assert_close(-v, hint)


def test_loss_reaches_network_controlnet_gates_and_prompts_after_the_first_step(pairs, tmp_path):
    network, prompts = new_network(SMALL, 0)
    train(pairs, objective(network, CONFIG, prompts), tmp_path, write=write)
    config = replace(CONFIG, degraded=0.5)
    trained = TrainingObjective(network, config, prompts=prompts)
    trained.zero_grad()
    loss, _ = trained(draw_batch(pairs, range(100, 104), config))
    loss.backward()
    parameters = dict(trained.named_parameters())
    for part in ("VideoControlNet.input_hint_block", "local1", "out.2", "positive", "negative"):
        gradients = [p.grad for key, p in parameters.items() if part in key]
        assert gradients
        assert any(g is not None and g.any() for g in gradients), part


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(pairs, tmp_path, optimizer):
    steady = replace(CONFIG, degraded=0.3, optimizer=optimizer)
    whole = run(pairs, tmp_path / "whole", steady, every=2)

    class Stop(Exception):
        pass

    def stop(step, steps, parts):
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        run(pairs, tmp_path / "cut", steady, every=2, on_step=stop)
    cut = run(pairs, tmp_path / "cut", steady, every=2).network.state_dict()
    assert all(torch.equal(value, cut[key]) for key, value in whole.network.state_dict().items())


def test_muon_trains_a_convolution_as_the_matrix_that_it_is():
    conv = torch.nn.Parameter(torch.randn(20, 4, 3, 3))
    matrix = torch.nn.Parameter(conv.detach().flatten(1).clone())
    ours = Muon([conv], lr=0.1, weight_decay=0.01)
    theirs = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        gradient = torch.randn(20, 4, 3, 3)
        conv.grad, matrix.grad = gradient, gradient.flatten(1)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        assert conv.grad is None
    torch.testing.assert_close(conv.flatten(1), matrix)


def test_errors_count_as_pixels_show_them_in_shares_of_what_the_hint_leaves_open(pairs):
    network, prompts = new_network(replace(SMALL, dropout=0.0), 0)
    config = replace(CONFIG, degraded=0.0, start=1.0, df=DFLossConfig(beta=0))
    batch = draw_batch(pairs, range(3), config)
    pixel_kernel = torch.zeros(1, 4, 3, 3)
    pixel_kernel[0, 1, 1, 1] = 10.0
    untrained, _ = TrainingObjective(network, config, prompts=prompts, pixel_kernel=pixel_kernel)(
        batch
    )
    # An untrained network knows the hint alone.
    assert untrained.item() == pytest.approx(1, abs=0.01)
    unseen = batch._replace(hq=batch.hq.clone())
    unseen.hq[:, (0, 2, 3)] += 1.0
    same, _ = TrainingObjective(network, config, prompts=prompts, pixel_kernel=pixel_kernel)(unseen)
    assert same.item() == pytest.approx(untrained.item(), rel=1e-3)
    unseen.hq[:, 1] += unseen.hq[:, 1] - unseen.lq[:, 1]
    twice, _ = TrainingObjective(network, config, prompts=prompts, pixel_kernel=pixel_kernel)(
        unseen
    )
    assert twice.item() == pytest.approx(1, abs=0.01)


def test_a_degraded_sample_is_complete_when_the_hint_stays_as_it_is(pairs):
    network, prompts = new_network(replace(SMALL, dropout=0.0), 0)  # copies the hint
    config = replace(CONFIG, start=1.0, df=DFLossConfig(beta=0))
    batch = draw_batch(pairs, range(3), config)

    def loss(task):
        tasks = torch.full_like(batch.task, task)
        trained = TrainingObjective(network, config, prompts=prompts)
        return trained(batch._replace(task=tasks))[0].item()

    assert loss(DEGRADE) < 0.01 * loss(RESTORE)


@pytest.mark.parametrize("df", [DFLossConfig(beta=0.25), DFLossConfig(alpha=4.0, cutoff=0.2)])
def test_the_df_loss_compares_with_the_clean_clip_as_configured(pairs, df):
    network, prompts = new_network(replace(SMALL, dropout=0.0), 0)  # copies the hint
    config = replace(CONFIG, degraded=0.0, start=1.0, df=df)
    batch = draw_batch(pairs, range(3), config)
    _, parts = TrainingObjective(network, config, prompts=prompts)(batch)
    expected = df_loss(batch.lq, batch.hq, batch.t, df).mean().item()
    assert parts["df"] == pytest.approx(expected, rel=0.02)


def test_tasks_are_drawn_by_their_shares(pairs):
    config = replace(CONFIG, degraded=0.3, sharp=0.4, crop=PixelCrop(frames=1, height=2, width=2))
    tasks = draw_batch(pairs, range(600), config).task
    for task, share in ((DEGRADE, 0.3), (SHARPEN, 0.4), (RESTORE, 0.3)):
        assert (tasks == task).float().mean().item() == pytest.approx(share, abs=0.06)


def test_later_levels_are_learned_on_what_the_network_itself_made_of_the_hint(pairs, monkeypatch):
    network, prompts = new_network(replace(SMALL, dropout=0.0), 0)
    torch.nn.init.normal_(last(network).weight)
    config = replace(CONFIG, degraded=0.0, own=True)
    batch = draw_batch(pairs, range(2), config)._replace(t=torch.tensor([899, 300]))
    trained, seen = TrainingObjective(network, config, prompts=prompts), []
    forward = network.forward

    def recorded(x, t, y, hint):
        v = forward(x, t, y, hint)
        seen.append((x, t, v, torch.is_grad_enabled()))
        return v

    monkeypatch.setattr(network, "forward", recorded)
    trained(batch)[0].backward()
    (x, t, v, with_gradient), (x_t, *_) = seen
    assert t.tolist() == [899] and not with_gradient
    schedule = star_schedule()
    noised_hint = schedule.add_noise(batch.lq, batch.noise, torch.full((2,), 899))
    torch.testing.assert_close(x[0], noised_hint[1])
    torch.testing.assert_close(x_t[0], noised_hint[0])
    made = schedule.add_noise(schedule.x_0(x, v, t), batch.noise[1:], batch.t[1:])
    torch.testing.assert_close(x_t[1], made[0])


def test_only_what_is_sharpened_meets_the_metric_and_the_sharp_prompt(pairs):
    network, prompts = new_network(SMALL, 0)
    torch.nn.init.normal_(last(network).weight)
    prompts = Prompts(prompts.learned()._replace(sharp=prompts.positive))
    assert prompts.sharp is not None
    crop = PixelCrop(frames=2, height=2, width=3)
    config = replace(CONFIG, sharp=0.5, perceptual=3.0, crop=crop)
    metric = Distance()
    with pytest.raises(ValueError, match="sharpening needs"):
        TrainingObjective(network, config, prompts=prompts)
    decoder = Decoder(lambda z: z[:, :3], 1)
    trained = TrainingObjective(
        network, config, prompts=prompts, decoder=decoder, perceptual=metric
    )
    batch = draw_batch(pairs, range(6), config)
    sharp = batch.task == SHARPEN
    assert 0 < sharp.sum() < 6
    trained.zero_grad()
    loss, parts = trained(batch)
    loss.backward()
    assert metric.pictures == sharp.sum() * crop.frames
    assert prompts.sharp.grad is not None and prompts.sharp.grad.any()
    trained.zero_grad()
    trained(draw_batch(pairs, range(6), replace(config, sharp=0.0)))[0].backward()
    assert prompts.sharp.grad is None or not prompts.sharp.grad.any()
    assert prompts.positive.grad is not None and prompts.positive.grad.any()
    assert parts["perceptual"] > 0


def test_written_model_describes_itself_and_moves_slower_than_the_trained_one(pairs, tmp_path):
    network, prompts = new_network(SMALL, 0)
    train(pairs, objective(network, CONFIG, prompts), tmp_path, write=write)
    model = load_model(tmp_path / MODEL_FILE, dtype=torch.float32)
    assert (model.config, model.sampling) == (SMALL, SAMPLING)
    assert model.prompts is not None
    assert model.prompts.positive.shape == (1, 4, SMALL.context_dim)
    start = new_network(SMALL, 0)[0].state_dict()["out.2.bias"]
    moved = (network.state_dict()["out.2.bias"] - start).norm()
    assert 0 < (model.network.state_dict()["out.2.bias"] - start).norm() < 0.2 * moved


def test_star_trains_controlnet_and_liem_and_nothing_else_moves_or_drops(pairs, tmp_path):
    network, prompts = new_network(SMALL, 0)
    torch.nn.init.normal_(last(network).weight)  # or its zeros would stop every gradient
    before = {key: value.clone() for key, value in network.state_dict().items()}
    once = replace(CONFIG, steps=2, trains="star")
    train(pairs, objective(network, once, prompts), tmp_path, write=write)
    changed = {key for key, value in network.state_dict().items() if (value != before[key]).any()}
    liem = {key for key in before if ".local" in key}
    assert changed & liem and any(key.startswith("VideoControlNet.zero_convs") for key in changed)
    assert all(key.startswith("VideoControlNet.") or key in liem for key in changed)
    choose_trained(network, "star")
    assert not any(module.training for module in network.middle_block.modules())
    assert network.VideoControlNet.middle_block.training


def test_all_gradients_are_clipped_together(pairs, tmp_path):
    begun = offset(new_network(SMALL, 0)[0])

    def moved(clip):
        # So small a norm drowns in Adam's epsilon: what is clipped to it hardly moves.
        config = replace(CONFIG, steps=1, clip=clip, weight_decay=0.0, ema=0.0)
        network, prompts = new_network(SMALL, 0)
        train(pairs, objective(network, config, prompts), tmp_path / str(clip), write=write)
        return (offset(network) - begun).norm()

    assert moved(1e-9) < 0.1 * moved(1.0)


def gradients(trained, batch):
    trained.zero_grad()
    loss, _ = trained(batch)
    loss.backward()
    return {key: p.grad.clone() for key, p in trained.named_parameters() if p.grad is not None}


def test_checkpointing_changes_no_gradient(pairs):
    config = replace(CONFIG, degraded=0.0)
    network, prompts = new_network(replace(SMALL, dropout=0.0, dim_mult=(1, 1)), 0)
    torch.nn.init.normal_(last(network).weight)
    batch = draw_batch(pairs, range(2), config)
    # Two levels take other sizes.
    batch = batch._replace(**{k: torch.randn(2, 4, 2, 6, 4) for k in ("hq", "lq", "noise")})
    trained = TrainingObjective(network, config, prompts=prompts)
    plain = gradients(trained, batch)
    recompute(network)
    again = gradients(trained, batch)
    assert plain.keys() == again.keys()
    for key, value in plain.items():
        torch.testing.assert_close(value, again[key])


def test_bfloat16_trains_much_as_float32_does(pairs):
    network, prompts = new_network(replace(SMALL, dropout=0.0), 0)
    torch.nn.init.normal_(last(network).weight, std=0.02)
    batch = draw_batch(pairs, range(4), CONFIG)
    full, half = (
        TrainingObjective(network, replace(CONFIG, bf16=bf16), prompts=prompts)(batch)[0].item()
        for bf16 in (False, True)
    )
    assert half == pytest.approx(full, rel=0.02) and half != full


def test_the_df_term_reaches_controlnet_and_liem_in_latents_and_in_pixels(pairs):
    network, prompts = new_network(SMALL, 0)
    torch.nn.init.normal_(last(network).weight)
    for conv in network.VideoControlNet.zero_convs.parameters():
        torch.nn.init.normal_(conv, std=0.1)

    def decode(z):
        return torch.nn.functional.interpolate(z.tanh()[:, :3], scale_factor=(1, 4, 4))

    for space in ("latents", "pixels"):
        config = replace(CONFIG, df_space=space, crop=PixelCrop(frames=1, height=2, width=3))
        df = TrainingObjective(network, config, prompts=prompts, decoder=Decoder(decode, 4))
        none = TrainingObjective(
            network, replace(config, df=DFLossConfig(beta=0)), prompts=prompts, decoder=df.decoder
        )
        network.eval()
        batch = draw_batch(pairs, range(2), config)
        with_df, without = gradients(df, batch), gradients(none, batch)
        for part in ("VideoControlNet.input_hint_block", ".local1."):
            assert any(
                part in key and (value != without[key]).any() for key, value in with_df.items()
            ), (space, part)


def test_validation_sees_the_averaged_weights_and_its_figures_are_logged(pairs, tmp_path):
    seen = []

    def validate(network, prompts, step):
        seen.append((step, offset(network).clone()))
        return {"psnr": 30.0 + step}

    network, prompts = new_network(SMALL, 0)
    trained = objective(network, CONFIG, prompts)
    train(pairs, trained, tmp_path, write=write, validate=validate, every=2)
    assert [step for step, _ in seen] == [2, 4]
    assert not torch.equal(seen[-1][1], offset(network))
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "log")).Reload()
    assert [event.value for event in events.Scalars("psnr")] == [32.0, 34.0]


def test_samples_do_not_depend_on_how_they_are_split_between_processes(pairs):
    config = replace(CONFIG, df_space="pixels", crop=PixelCrop(frames=1, height=2, width=2))
    together = draw_batch(pairs, range(8, 12), config)
    halves = [draw_batch(pairs, range(a, a + 2), config) for a in (8, 10)]
    for one, first, second in zip(together, *halves, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, torch.cat([first, second]))
        elif one is not None:
            assert one == first + second


def two_ranks(rank, folder, port):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    one = replace(CONFIG, batch=1, steps=2)
    still = replace(SMALL, dropout=0.0)
    network, prompts = new_network(still, 0)
    pairs = LatentPairs(folder / "pairs", (2, 4, 4))
    train(pairs, objective(network, one, prompts), folder / "ranks", write=write)


def test_two_ranks_give_the_weights_of_one_with_twice_the_batch(pairs, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(two_ranks, (tmp_path, port), nprocs=2)  # pyright: ignore
    network, prompts = new_network(replace(SMALL, dropout=0.0), 0)
    both = replace(CONFIG, batch=2, steps=2)
    train(pairs, objective(network, both, prompts), tmp_path / "one", write=write)
    ranks, one = (
        torch.load(tmp_path / name / "state-0000002.pt", weights_only=True)["trained"]
        for name in ("ranks", "one")
    )
    assert ranks.keys() == one.keys()
    for key, value in one.items():
        # Two steps of 5e-3: where gradients are nearly nothing, Adam makes much of rounding.
        torch.testing.assert_close(ranks[key], value, rtol=1e-4, atol=5e-4)


def test_learning_rate_rises_and_falls():
    config = TrainConfig(steps=100, warmup=10, decay_from=50, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert rates[-1] < 0.01
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_timesteps_stay_below_the_noise_level_and_prefer_its_last_quarter_and_end():
    config = TrainConfig(steps=1, noise_level=600, early=0.5)
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([draw_timestep(config, generator) for _ in range(4000)])
    assert t.min() >= 0 and t.max() < 600
    assert (t >= 450).float().mean().item() == pytest.approx(0.625, abs=0.04)
    everything = replace(config, noise_level=1000, early=0.0)
    t = torch.tensor([draw_timestep(everything, generator) for _ in range(4000)])
    assert t.float().mean().item() == pytest.approx(499.5, abs=20)
    assert t.min() < 10 and t.max() > 990
    at_start = replace(config, start=0.3)
    t = torch.tensor([draw_timestep(at_start, generator) for _ in range(4000)])
    assert (t == 599).float().mean().item() == pytest.approx(0.3, abs=0.04)
