import pytest
import torch

from star_core import devices
from star_core.cli import main
from star_core.devices import best_device, send, stash, supports, total_memory
from tests.standin import StandIn, on_card


@pytest.mark.parametrize(
    ("present", "expected"),
    [({"cuda", "mps", "xpu"}, "cuda"), ({"mps", "xpu"}, "mps"), ({"xpu"}, "xpu"), (set(), "cpu")],
)
def test_the_first_device_that_there_is_is_chosen(present, expected, monkeypatch):
    for name, module in {
        "cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu
    }.items():  # fmt: skip
        monkeypatch.setattr(module, "is_available", lambda name=name: name in present)
    assert best_device() == torch.device(expected)


def test_what_a_device_lacks_is_asked():
    assert supports("cpu", torch.float64) and supports("cpu", torch.bfloat16)
    assert not supports("xpu" if not torch.xpu.is_available() else "mps", torch.float32)
    assert total_memory(torch.device("cpu")) is None


def test_copies_to_and_from_the_card_make_nobody_wait():
    with StandIn() as card:
        x = send(torch.arange(4.0), "cuda", torch.float16)
        assert on_card(x) and x.dtype == torch.float16
        back = stash(x)
        assert not on_card(back) and card.counts["synchronisations"] == 0
        assert send(x, x.device) is x and stash(back) is back
    assert back.tolist() == [0, 1, 2, 3]


def test_memory_is_released_where_there_is_any(monkeypatch):
    released = []
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "empty_cache", lambda: released.append("xpu"))
    devices.release_cached_memory()
    assert released == ["xpu"]


def test_a_device_that_cannot_be_used_is_refused(capsys):
    assert main(["demo", "--quick", "--device", "nonsense"]) == 2
    assert "device nonsense cannot be used" in capsys.readouterr().err
