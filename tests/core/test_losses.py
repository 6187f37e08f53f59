import math

import pytest
import torch

from star_core.losses import DFLossConfig, df_loss, df_weights, low_frequencies, velocity_loss

CONFIG = DFLossConfig()


def wave(cycles, size=32):
    columns = torch.arange(size) / size
    return torch.cos(2 * math.pi * cycles * columns).expand(1, 1, 1, size, size)


def test_low_and_high_part_at_35_percent_of_nyquist_in_every_direction():
    low = low_frequencies(200, 200, CONFIG)  # steps of a hundredth of Nyquist
    assert low[0, 35] == low[35, 0] == low[-35, 0] == 0.5
    assert low[21, 28] == pytest.approx(0.5, abs=1e-5)
    assert low[0, :31].min() > 0.95 and low[0, 40:].max() < 0.05


def test_both_bands_of_white_noise_err_alike_however_wide_they_are():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 3, 4, 64, 64, generator=generator)
    for order in ("direct", "inverse"):  # at t = 0, high frequencies alone and low ones alone
        config = DFLossConfig(order=order)
        loss = df_loss(noise, torch.zeros_like(noise), torch.tensor([0]), config).item()
        assert loss == pytest.approx(math.sqrt(math.pi) / 2, rel=0.03)  # of a complex normal


@pytest.mark.parametrize(("cycles", "early_is_worse"), [(1, True), (14, False)])
def test_low_errors_weigh_more_early_and_high_ones_late(cycles, early_is_worse):
    error, none = wave(cycles), torch.zeros(1, 1, 1, 32, 32)

    def share(t):  # without b(t), which fades towards noise
        return df_loss(error, none, torch.tensor([t]), CONFIG) / (1 - t / 999)

    assert (share(800) > share(200)) == early_is_worse


def test_gradient_of_the_df_loss_pulls_the_prediction_to_the_target():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, 3, 2, 8, 8, generator=generator)
    x_0 = torch.randn(1, 3, 2, 8, 8, generator=generator, requires_grad=True)
    before = df_loss(x_0, target, torch.tensor([300]), CONFIG).sum()
    before.backward()
    assert x_0.grad is not None
    moved = (x_0 - 5 * x_0.grad).detach()
    assert df_loss(moved, target, torch.tensor([300]), CONFIG) < before


def test_losses_are_zero_for_the_truth_and_per_sample():
    x = torch.randn(2, 3, 1, 6, 5)
    t = torch.tensor([10, 700])
    assert df_loss(x, x, t, CONFIG).tolist() == [0, 0]
    other = x.clone()
    other[1] += 1
    assert velocity_loss(other, x).tolist() == pytest.approx([0, 1], abs=1e-5)
    assert df_loss(other, x, t, CONFIG)[0] == 0


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="cutoff"):
        DFLossConfig(cutoff=0)
    with pytest.raises(ValueError, match="order"):
        DFLossConfig(order="backwards")  # pyright: ignore


def test_the_order_says_which_frequencies_come_first():
    t = torch.tensor([100, 850])
    (low, high), (low_i, high_i), (low_u, high_u) = (
        df_weights(t, DFLossConfig(order=order)) for order in ("direct", "inverse", "unseparated")
    )
    assert (low < high).tolist() == (low_i > high_i).tolist() == [True, False]
    assert torch.equal(low_u, high_u)


def test_weights_are_those_of_the_paper():
    tau = 400 / 999
    low, high = (w.item() for w in df_weights(torch.tensor([400]), DFLossConfig()))
    assert (low, high) == pytest.approx(((1 - tau) * tau**2, (1 - tau) * (1 - tau**2)))
    grown = math.expm1(tau) / math.expm1(1)
    exponential = DFLossConfig(shape="exponential")
    low, high = (w.item() for w in df_weights(torch.tensor([400]), exponential))
    assert (low, high) == pytest.approx(((1 - grown) * grown**2, (1 - grown) * (1 - grown**2)))


@pytest.mark.parametrize("shape", ["linear", "exponential"])
@pytest.mark.parametrize("alpha", [0.25, 1.0, 2.0])
def test_the_weight_fades_from_beta_to_nothing_towards_noise(shape, alpha):
    config = DFLossConfig(shape=shape, alpha=alpha, beta=1.5)
    low, high = df_weights(torch.tensor([0, 400, 999]), config)
    total = low + high
    assert total[[0, 2]].tolist() == pytest.approx([1.5, 0], abs=1e-6)
    assert 0 < total[1] < 1.5


def test_samples_of_a_batch_do_not_mix():
    x, target = torch.randn(2, 3, 2, 10, 9), torch.randn(2, 3, 2, 10, 9)
    t = torch.tensor([300, 600])
    for config in (CONFIG, DFLossConfig(variant="reference")):
        alone = [df_loss(x[i : i + 1], target[i : i + 1], t[i : i + 1], config) for i in (0, 1)]
        torch.testing.assert_close(df_loss(x, target, t, config), torch.cat(alone))


def test_mixed_precision_does_not_reach_the_spectra():
    x, target, t = torch.randn(1, 3, 2, 16, 16), torch.randn(1, 3, 2, 16, 16), torch.tensor([300])
    exact = df_loss(x.bfloat16().float(), target, t, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(df_loss(x.bfloat16(), target, t, CONFIG), exact)


def test_the_reference_variant_sends_no_gradient_and_draws_from_its_generator():
    x = torch.randn(1, 3, 4, 32, 56, requires_grad=True)
    target, t = torch.randn(1, 3, 4, 32, 56), torch.tensor([300])
    config = DFLossConfig(variant="reference")

    def loss(seed):
        return df_loss(x, target, t, config, generator=torch.Generator().manual_seed(seed))

    assert not loss(1).requires_grad
    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))
