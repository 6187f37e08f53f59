"""The errors that the benchmark reports for weight types are those of converted files."""

import pytest
import torch
from safetensors.torch import load_file

from star_core.backbones import build_network
from star_core.bench import weight_types
from star_core.bench.weight_types import TYPES, errors, random_network, rounded, size
from star_core.checkpoints.quantization import WRITTEN
from star_core.cli import main
from star_core.conversion import convert
from star_core.models.unet import UNetConfig
from star_core.sampling_defaults import SamplingDefaults
from star_core.star_checkpoint import load_model, save_model

SMALL = UNetConfig(
    dim=32, context_dim=16, dim_mult=(1,), num_heads=1, head_dim=32, num_res_blocks=1,
    attn_scales=(1.0,), norm_groups=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def network():
    return random_network(SMALL)


@pytest.fixture(scope="module")
def source(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("a") / "a.safetensors"
    save_model(path, network, sampling=SamplingDefaults())
    return path


@pytest.mark.parametrize("name", ["float16", "bfloat16", *WRITTEN])
def test_weights_are_rounded_and_counted_as_a_file_of_their_type_has_them(
    tmp_path, network, source, name
):
    convert(source, tmp_path / "b.safetensors", TYPES[name])
    wanted = load_model(tmp_path / "b.safetensors", dtype=torch.float32).network.state_dict()
    found = rounded(network, TYPES[name])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "b.safetensors").values())
    on_meta = build_network(SMALL, device="meta")
    assert size(network, TYPES[name]) == size(on_meta, TYPES[name]) == stored


def test_coarser_types_are_further_from_float32(network):
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    found = errors(network, (2, 6, 4), TYPES)
    assert found["float32"] == 0 < found["float16"] < found["bfloat16"] < found["int8"]
    assert found["int8"] < found["fp8_scaled"] < found["nvfp4"]
    assert found["fp8_scaled"] < found["fp8_e4m3fn, cast"] < found["fp8_e5m2, cast"]
    assert all(torch.equal(network.state_dict()[key], tensor) for key, tensor in before.items())


def test_the_command_prints_a_row_for_each_type(monkeypatch, capsys, network):
    monkeypatch.setattr(weight_types, "NETWORKS", {"small": (lambda: network, (2, 6, 4))})
    monkeypatch.setattr(weight_types, "SIZES", {"full": SMALL})
    main(["bench", "--weight-types"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| weights | error, small | GiB, full |"
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in TYPES]
