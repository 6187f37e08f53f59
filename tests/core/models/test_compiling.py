"""Which parts of the networks torch compiles; that it can is checked, what it makes is torch's."""

import pytest
import torch

from star_core import model
from star_core.backbones import build_network
from star_core.cli import main
from star_core.devices import check_compiler
from star_core.models.cogvideox_weights import CogVideoXConfig
from star_core.models.unet import ControlledVideoUNet, UNetConfig
from star_core.models.unet_blocks import BasicTransformerBlock, ResBlock
from tests.test_architecture import ROOT

UNET = UNetConfig(
    dim=8, context_dim=8, dim_mult=(1,), num_heads=1, head_dim=8, num_res_blocks=1,
    attn_scales=(1.0,), norm_groups=4,
)  # fmt: skip
DIT = CogVideoXConfig(
    in_dim=4, context_dim=16, context_length=7, dim=64, num_heads=2, num_layers=2, time_dim=16,
    grid=(3, 4),
)  # fmt: skip


def test_transformer_blocks_and_residual_blocks_are_compiled():
    network = build_network(UNET, device="meta")
    network.compile_blocks()
    blocks = [m for m in network.modules() if isinstance(m, BasicTransformerBlock)]
    assert blocks and all(m._compiled_call_impl is not None for m in blocks)
    residual = [m for m in network.modules() if isinstance(m, ResBlock)]
    assert residual and all("_spatial" in vars(m) for m in residual)
    other = build_network(DIT, device="meta")
    other.compile_blocks()
    assert all(block._compiled_call_impl is not None for block in other.blocks)


def test_where_torch_cannot_compile_that_is_said(monkeypatch):
    def compile(fn):
        raise RuntimeError("no working C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(ValueError, match="leave out --compile: no working C[+][+] compiler was"):
        check_compiler("cpu")


def test_the_option_compiles_and_tells_when_the_first_frame_was_ready(
    monkeypatch, tmp_path, capsys
):
    compiled = []
    monkeypatch.setattr(model, "check_compiler", compiled.append)
    monkeypatch.setattr(ControlledVideoUNet, "compile_blocks", lambda self: compiled.append(self))
    source = ROOT / "star_core" / "demo_data" / "degraded.mkv"
    command = ["upscale", str(source), str(tmp_path / "out.mkv"), "--shots", "off", "--scale", "1"]
    command += ["--frames", "0:1", "--crop", "32x32+0+0", "--steps", "1", "--solver-mode", "normal"]
    assert main([*command, "--device", "cpu", "--compile"]) == 0
    assert len(compiled) == 2
    assert "the first frame was ready after" in capsys.readouterr().err
