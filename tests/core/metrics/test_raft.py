import json
import sys

import pytest
import torch

from star_core.metrics import Setup, compare
from star_core.metrics.raft import RAFT, RAFTFlow, load_raft
from tests.metric_inputs import pictures, waves
from tests.paths import GOLDEN

EXPECTED = json.loads((GOLDEN / "metrics/golden.json").read_text())


@pytest.fixture(scope="module")
def by_formula():
    """Not the published weights: by formula, in the order of their keys."""
    network = RAFT()
    state = network.state_dict()
    for number, key in enumerate(sorted(k for k in state if not k.endswith("tracked"))):
        values = waves(tuple(state[key].shape), 0.01 * number)
        if values.ndim > 1:
            values = values * (2 / state[key][0].numel()) ** 0.5
        elif key.endswith(("running_var", "1.weight")):
            values = 1 + 0.1 * values
        else:
            values = 0.1 * values
        state[key] = values
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def test_raft_on_random_weights_is_that_of_torchvision(by_formula):
    frame, target = pictures(128, 136)[1], pictures(128, 136, moved=3)[1]
    flow = RAFTFlow(by_formula, "cpu")(frame, target)
    found = flow[:, 5::16, 7::16].flatten()
    # Twelve rounds of a recurrent network in float32.
    torch.testing.assert_close(found, torch.tensor(EXPECTED["raft"]), rtol=1e-3, atol=1e-3)


def test_frames_of_any_size_get_a_flow_of_their_size(by_formula):
    frame = pictures(30, 45)[0]
    flow = RAFTFlow(by_formula, "cpu")(frame, frame)
    assert flow.shape == (2, 30, 45) and flow.isfinite().all()


def test_raft_takes_the_place_of_opencv_where_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    still = torch.zeros(2, 16, 16)
    monkeypatch.setattr("star_core.metrics.catalogue.load_raft", lambda **_: lambda *_: still)
    frames = [torch.full((3, 16, 16), value) for value in (0.5, 0.6)]
    names = ["warping_error", "own_warping_error", "tof"]
    result = compare(frames, frames, metrics=names, setup=Setup(flow="raft"))
    assert result.means == pytest.approx({**dict.fromkeys(names[:2], 10), "tof": 0}, abs=1e-4)
    with pytest.raises(ValueError, match="choose dis or raft"):
        Setup(flow="spynet")  # pyright: ignore[reportArgumentType]


def test_missing_or_other_weights_are_told(tmp_path):
    with pytest.raises(
        ValueError, match="raft_large_C_T_V1-22a6c225.pth is missing: put .*torchvision"
    ):
        load_raft(folder=tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "raft_large_C_T_V1-22a6c225.pth")
    with pytest.raises(ValueError, match="its hash differs"):
        load_raft(folder=tmp_path)
