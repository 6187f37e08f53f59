import math

import pytest
import torch

from star_core.losses import DFLossConfig, df_loss, low_frequencies, velocity_loss

CONFIG = DFLossConfig()


def wave(cycles, size=32):
    columns = torch.arange(size) / size
    return torch.cos(2 * math.pi * cycles * columns).expand(1, 1, 1, size, size)


def test_low_and_high_are_told_apart_by_radius():
    low = low_frequencies(32, 32, CONFIG)
    assert low[0, 0] > 0.99
    assert low[0, 16] < 0.01
    assert low[16, 0] < 0.01
    torch.testing.assert_close(low[3, 4], low[0, 5])


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
