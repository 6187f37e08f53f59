import json

import pytest
import torch

from star_core.metrics import Setup, compare
from star_core.metrics.dover import (
    DOVER,
    DoverMeter,
    aesthetic_frames,
    fragments,
    fused,
    load_dover,
    technical_frames,
)
from star_core.metrics.video_convnext import VideoConvNeXt
from star_core.metrics.video_swin import VideoSwin
from tests.metric_inputs import waves
from tests.paths import GOLDEN

EXPECTED = json.loads((GOLDEN / "metrics/golden.json").read_text())


def by_formula(network):
    """Not the published weights: by formula, in the order of their keys."""
    state = network.state_dict()
    keys = sorted(key for key in state if not key.endswith("index"))
    for number, key in enumerate(keys):
        shape = tuple(state[key].shape)
        values = waves(shape, 0.01 * number)
        if len(shape) > 1 and "bias_table" not in key:
            values = values * (2 / state[key][0].numel()) ** 0.5
        elif key.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values = (0.5 if "gamma" in key else 0.3) * values
        state[key] = values
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


@pytest.fixture
def video():
    return waves((1, 3, 32, 224, 224), 0.2)


class Means:
    """Stands for DOVER: how bright each view is, the later frames more."""

    def technical(self, clips):
        weights = torch.linspace(0, 0.1, 32)[:, None, None]
        return (clips * weights).mean(dim=(1, 2, 3, 4))

    aesthetic = technical


def generator():
    return torch.Generator().manual_seed(0)


def test_the_technical_network_on_random_weights_is_that_of_its_authors(video):
    features = by_formula(VideoSwin(8, (2, 2, 2, 2), (1, 1, 2, 2)))(video)
    found = features[0, ::8, ::3, 3, ::2].flatten()
    torch.testing.assert_close(found, torch.tensor(EXPECTED["video_swin"]), rtol=1e-4, atol=2e-5)


def test_the_aesthetic_network_on_random_weights_is_that_of_its_authors(video):
    network = by_formula(VideoConvNeXt((2, 2, 3, 1), (8, 16, 24, 32)))
    found = network(video[:, :, :8, :96, :64])[0, ::8].flatten()
    torch.testing.assert_close(
        found, torch.tensor(EXPECTED["video_convnext"]), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("count", [1, 31, 96, 200, 1000])
def test_frames_of_the_views_are_of_the_video_and_in_order_where_it_is_long(count):
    technical, aesthetic = (
        technical_frames(count, generator()),
        aesthetic_frames(count, generator()),
    )
    assert (len(technical), len(aesthetic)) == (96, 32)
    assert {*technical, *aesthetic} <= set(range(count))
    if count >= 200:
        assert aesthetic == sorted(aesthetic)
        assert all(b - a == 2 for a, b in zip(technical[:31], technical[1:32], strict=True))
        assert all(n * count // 3 <= technical[32 * n] for n in range(3))


@pytest.mark.parametrize("size", [(224, 224), (300, 480), (720, 1280), (100, 150)])
def test_fragments_are_pieces_of_the_frame_at_their_place(size):
    h, w = size
    rows, columns = torch.arange(h) / h, torch.arange(w) / w
    frame = torch.stack((rows[:, None].expand(size), columns.expand(size), torch.zeros(size)))
    pieces = fragments(frame, torch.rand(7, 7, 2, generator=generator()))
    assert pieces.shape == (3, 224, 224)
    for n in range(7):
        inside = slice(32 * n, 32 * n + 32)
        assert (
            pieces[0, inside].min() >= n / 7 - 0.02
            and pieces[0, inside].max() <= (n + 1) / 7 + 0.02
        )
        assert pieces[1, :, inside].min() >= n / 7 - 0.02
    if min(size) > 224:  # pixels as they were
        step = (pieces[1, 0, 1:32] - pieces[1, 0, :31]).mean()
        assert step == pytest.approx(1 / w, rel=1e-3)


def test_fusion_has_the_authors_constants():
    assert fused(0.1107, -0.08285) == pytest.approx(0.5)
    assert fused(0.1107 + 0.07355, -0.08285 + 0.03774) == pytest.approx(1 / (1 + 2.718281828**-1))


def test_a_video_has_one_score_that_depends_on_what_it_shows():
    frames = [torch.rand(3, 230, 240, generator=generator()) * n / 5 for n in range(5)]

    def score(video):
        with DoverMeter(Means(), len(video)) as meter:
            for frame in video:
                meter.add(frame, None)
            result = meter.result()
        assert isinstance(result, float)
        return result

    first = score(frames)
    assert 0 <= first <= 1
    assert score(frames) == first
    assert score(frames[::-1]) != first
    with pytest.raises(ValueError, match="expected 6 frames and got 0"):
        DoverMeter(Means(), 6).result()


def test_dover_is_one_value_of_the_video_and_needs_its_length(monkeypatch):
    monkeypatch.setattr("star_core.metrics.catalogue.load_dover", lambda **_: Means())
    frames = [torch.full((3, 224, 224), 0.5)] * 2
    result = compare(frames, None, metrics=["dover"])
    assert result.per_frame == {} and result.means == result.whole
    with pytest.raises(ValueError, match="must know the number of frames"):
        compare(iter(frames), None, metrics=["dover"])
    assert compare(iter(frames), None, metrics=["dover"], setup=Setup(frames=2)) == result


def test_keys_are_those_of_the_published_file():
    with torch.device("meta"):
        state = DOVER().state_dict()
    assert len(state) == 381
    table = "technical_backbone.layers.2.blocks.5.attn.fragment_position_bias_table"
    assert state[table].shape == (15 * 13 * 13, 12)
    assert state["aesthetic_backbone.stages.2.8.dwconv.weight"].shape == (384, 1, 1, 7, 7)
    assert state["technical_head.fc_hid.weight"].shape == (64, 768, 1, 1, 1)


def test_missing_or_other_weights_are_told(tmp_path):
    with pytest.raises(ValueError, match="DOVER.pth is missing: put .* VQAssessment/DOVER"):
        load_dover(folder=tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "DOVER.pth")
    with pytest.raises(ValueError, match="is not DOVER: .* is missing"):
        load_dover(folder=tmp_path)
    (tmp_path / "DOVER.pth.sha256").write_text("0" * 64 + "  DOVER.pth\n")
    with pytest.raises(ValueError, match="its hash differs"):
        load_dover(folder=tmp_path)
