import torch

from star_core.models.liem import SpatialLIEM, TemporalLIEM


def test_spatial_gate_is_the_sigmoid_of_a_convolution_of_maximum_and_mean():
    liem = SpatialLIEM()
    weight = torch.zeros(1, 2, 7, 7)
    weight[0, 0, 3, 3], weight[0, 1, 3, 2] = 2.0, -1.0  # maximum here, mean of the left neighbour
    liem.conv1.weight.data.copy_(weight)
    x = torch.randn(2, 5, 4, 6)
    left_mean = torch.nn.functional.pad(x.mean(1), (1, 0))[..., :-1]
    gate = torch.sigmoid(2 * x.amax(1) - left_mean)
    torch.testing.assert_close(liem(x), gate[:, None] * x)


def test_temporal_gate_weighs_each_token_by_its_own_channels_alone():
    liem = TemporalLIEM()
    x = torch.randn(3, 4, 8)
    changed = x.clone()
    changed[:, 1] += 1
    same = [0, 2, 3]
    torch.testing.assert_close(liem(changed)[:, same], liem(x)[:, same])
    maximum, mean = liem.conv1.weight[0]
    gate = torch.sigmoid(maximum * x.amax(-1) + mean * x.mean(-1))
    torch.testing.assert_close(liem(x), gate[..., None] * x)
