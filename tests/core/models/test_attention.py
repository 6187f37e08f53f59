"""Attention of other packages: how they are called, and what is refused."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from star_core.cli import main
from star_core.models.attention import MAX_ROWS, attention_of, scaled_dot_product


def stand_in(q, k, v, tensor_layout="NHD"):
    """Attention over (b n h d), as both packages have it."""
    assert tensor_layout == "NHD"
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [("flash", "flash_attn", "flash_attn_func"), ("sage", "sageattention", "sageattn")],
)
def test_the_attention_of_a_package_is_called_with_heads_apart(monkeypatch, name, module, function):
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: stand_in}))
    attention = attention_of(name)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 12, generator=generator).bfloat16() for n in (5, 7, 7))
    torch.testing.assert_close(attention(q, k, v, 3), scaled_dot_product(q, k, v, 3))
    rows = torch.zeros(MAX_ROWS + 1, 1, 4).bfloat16()
    assert attention(rows, rows, rows, 1).shape == rows.shape
    with pytest.raises(ValueError, match="16 bits"):
        attention(q.float(), k.float(), v.float(), 3)


def test_a_missing_package_and_an_unknown_name_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sageattention", None)
    assert attention_of("sdpa") is scaled_dot_product
    with pytest.raises(ValueError, match="sdpa, flash, sage"):
        attention_of("xformers")
    command = ["upscale", str(tmp_path / "in.mkv"), str(tmp_path / "out.mkv")]
    assert main([*command, "--attention", "sage"]) == 2
    assert "pip install sageattention" in capsys.readouterr().err
