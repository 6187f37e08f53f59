import json

import pytest
import torch

from star_core.metrics import ilniqe
from star_core.metrics.ilniqe import FEATURES, ILNIQE, load_ilniqe
from tests.metric_inputs import pictures, waves
from tests.paths import GOLDEN

EXPECTED = json.loads((GOLDEN / "metrics/golden.json").read_text())


def model():
    """By formula, not the authors': mean, covariance, centre, axes."""
    a = waves((60, 60), 0.4).double()
    axes = waves((FEATURES, 60), 0.6).double() * 0.05
    return waves((60,), 0.3), a @ a.T / 60 + torch.eye(60), waves((FEATURES,), 0.5), axes


def test_ilniqe_on_a_random_model_is_that_of_pyiqa():
    # pyiqa ends its fit of the Weibull distribution earlier and has windows in float32.
    restored, _ = pictures(192, 208)
    assert ILNIQE(*model())(restored) == pytest.approx(EXPECTED["ilniqe"], rel=2e-4)


def test_weibull_values_give_back_their_scale_and_shape():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(1, 2, 200, 200, dtype=torch.float64, generator=generator)
    scale, shape = torch.tensor([3.0, 0.5])[:, None, None], torch.tensor([1.5, 0.7])[:, None, None]
    values = scale * (-torch.log1p(-uniform)) ** (1 / shape)
    found = ilniqe._weibull(values)
    torch.testing.assert_close(
        found, torch.tensor([[3.0, 1.5, 0.5, 0.7]], dtype=torch.float64), rtol=0.02, atol=0
    )


def test_the_authors_file_is_read(tmp_path):
    scipy = pytest.importorskip("scipy.io", reason="the model is a MATLAB file")
    import numpy as np

    cells = np.empty((1, 4), dtype=object)
    for place, array in enumerate(model()):
        cells[0, place] = array.numpy()
    scipy.savemat(tmp_path / "ILNIQE_templateModel.mat", {"templateModel": cells})
    metric = load_ilniqe(folder=tmp_path)
    read = metric.mean, metric.covariance, metric.centre, metric.axes
    for mine, theirs in zip(read, model(), strict=True):
        torch.testing.assert_close(mine, theirs.double())
    scipy.savemat(tmp_path / "ILNIQE_templateModel.mat", {"other": cells})
    with pytest.raises(ValueError, match="is not a model of ILNIQE"):
        load_ilniqe(folder=tmp_path)


def test_a_missing_model_is_told_with_its_source(tmp_path):
    with pytest.raises(ValueError, match="ILNIQE_templateModel.mat is missing: .*authors"):
        load_ilniqe(folder=tmp_path)
    with pytest.raises(ValueError, match="not a model of ILNIQE: its axes are"):
        ILNIQE(*(tensor[:5] for tensor in model()))
