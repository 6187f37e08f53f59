"""Files of tensors: what is opened, how little memory it takes, what is refused."""

import argparse
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from star_core.checkpoints import tensors as tensor_files
from star_core.checkpoints.tensors import load_into, open_tensors, write_tensors

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")


def linears(count=2, width=8, *, device="cpu", dtype=torch.float32):
    return nn.Sequential(
        *(nn.Linear(width, width, device=device, dtype=dtype) for _ in range(count))
    )


def save(path: Path, tensors: dict, *, wrapped=False, old=False) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        content = {"state_dict": tensors, "epoch": 3} if wrapped else tensors
        torch.save(content, path, _use_new_zipfile_serialization=not old)
    return path


@pytest.fixture
def tensors():
    return {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(4), "n": torch.tensor(7)}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["x.pt", "x.ckpt", "old.pt", "x.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_come_back_as_saved(tmp_path, tensors, name, wrapped, dtype):
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    path = save(tmp_path / name, tensors, wrapped=wrapped, old=name == "old.pt")
    found = open_tensors(path)
    assert set(found) == set(tensors)
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)


def test_content_decides_not_the_name(tmp_path, tensors):
    save(tmp_path / "x.safetensors", tensors).rename(tmp_path / "x.pt")
    save(tmp_path / "y.pt", tensors).rename(tmp_path / "y.safetensors")
    assert open_tensors(tmp_path / "x.pt").format == "safetensors"
    with pytest.raises(ValueError, match="PyTorch file: rename it to .pt"):
        open_tensors(tmp_path / "y.safetensors")


def mapped_files(tensor: torch.Tensor) -> list[str]:
    """The files whose mapping into this process holds the tensor's memory."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= tensor.data_ptr() < end:
            found.append(name)
    return found


@linux_only
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_tensors_are_views_of_the_mapped_file_before_and_after_loading(tmp_path, name):
    path = save(tmp_path / name, linears().state_dict())
    module = linears(device="meta")
    file = open_tensors(path)
    load_into(module, file)
    for tensor in [*file.values(), *module.state_dict().values()]:
        assert mapped_files(tensor) == [str(path)]


def anonymous_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@linux_only
@pytest.mark.parametrize(
    "name, stored", [("x.pt", torch.float32), ("x.safetensors", torch.float32),
                     ("x.pt", torch.float16), ("x.safetensors", torch.float16)],
)  # fmt: skip
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, monkeypatch, name, stored):
    path = save(tmp_path / name, linears(32, 512, dtype=stored).state_dict())
    module = linears(32, 512, device="meta")
    memory = []
    cast = tensor_files.cast

    def watched(*args):
        result = cast(*args)
        memory.append(anonymous_memory())
        return result

    monkeypatch.setattr(tensor_files, "cast", watched)
    before = anonymous_memory()
    load_into(module, open_tensors(path), dtype=torch.float16)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    assert len(memory) == 64 and max(memory) - before <= 1.15 * weights


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_loaded_weights_have_the_type_asked_for(tmp_path, stored):
    source = linears(dtype=stored)
    module = linears(device="meta")
    load_into(module, open_tensors(save(tmp_path / "x.pt", source.state_dict())), dtype=torch.half)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[key].half())


def test_integer_tensors_keep_their_type_when_loaded():
    source = nn.BatchNorm1d(4)
    module = nn.BatchNorm1d(4, device="meta")
    load_into(module, source.state_dict(), dtype=torch.float16)
    assert module.num_batches_tracked is not None
    assert module.num_batches_tracked.dtype == torch.int64
    assert module.weight.dtype == torch.float16


def test_missing_and_mismatched_keys_are_named_with_what_the_file_seems_to_be():
    tensors = linears().state_dict()
    del tensors["1.weight"], tensors["1.bias"]
    tensors["0.weight"] = torch.ones(8, 9)
    tensors["encoder.block.0.layer.0.SelfAttention.q.weight"] = torch.ones(1)
    with pytest.raises(ValueError) as error:
        load_into(linears(device="meta"), tensors, name="some.pt")
    message = str(error.value)
    for part in (
        "some.pt",
        "'1.weight' is missing (and 1 more)",
        "'0.weight' is torch.float32 [8, 9] instead of [8, 8]",
        "'encoder.block.0.layer.0.SelfAttention.q.weight' is unexpected",
        "T5 text encoder",
    ):
        assert part in message


class WaitingLinear(nn.Module):
    """As a host's layer that has no weight until its own is loaded."""

    def __init__(self):
        super().__init__()
        self.register_parameter("weight", None)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.weight = nn.Parameter(state_dict[prefix + "weight"])


def test_layers_without_weights_get_those_that_are_expected():
    expected = nn.Sequential(nn.Linear(8, 8, bias=False, device="meta")).state_dict()
    weight = torch.rand(8, 8)
    module = nn.Sequential(WaitingLinear())
    load_into(module, {"0.weight": weight, "other": weight}, expected=expected, dtype=torch.float16)
    assert torch.equal(module.state_dict()["0.weight"], weight.half())
    with pytest.raises(ValueError, match="'0.weight' is missing"):
        load_into(nn.Sequential(WaitingLinear()), {}, expected=expected)


def test_quantised_weights_are_refused():
    tensors = linears().state_dict()
    tensors["0.weight"] = tensors["0.weight"].to(torch.int8)
    with pytest.raises(ValueError, match=r"'0.weight' is torch.int8"):
        load_into(linears(device="meta"), tensors)


def test_unexpected_keys_are_listed_and_dropped_where_nothing_is_missing(caplog):
    source = linears()
    extra = {"ema.decay": torch.ones(1), "old.bias": torch.ones(2)}
    module = linears(device="meta")
    load_into(module, {**source.state_dict(), **extra}, name="some.pt")
    assert "some.pt: 2 unexpected keys are ignored: ema.decay, old.bias" in caplog.text
    assert torch.equal(module.state_dict()["0.weight"], source.state_dict()["0.weight"])


def test_weights_too_large_for_the_type_are_refused_not_made_infinite():
    tensors = linears().state_dict()
    tensors["1.bias"][3] = 1e5
    with pytest.raises(ValueError, match=r"'1.bias' .* beyond torch.float16.*wider type"):
        load_into(linears(device="meta"), tensors, dtype=torch.float16)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old", [False, True])
def test_malicious_pickle_is_named_and_not_run(tmp_path, old):
    target = tmp_path / "made"
    path = save(tmp_path / "x.pt", {"a": torch.ones(2), "b": Malicious(target)}, old=old)
    with pytest.raises(ValueError, match=r"x.pt was not loaded.*\.mkdir.*could run any code"):
        open_tensors(path)
    assert not target.exists()


def test_python_objects_beside_the_tensors_are_refused(tmp_path):
    path = save(tmp_path / "x.pt", {"a": torch.ones(2), "args": argparse.Namespace(lr=1)})
    with pytest.raises(ValueError, match=r"argparse.Namespace.*state_dict alone"):
        open_tensors(path)


def spoil(kind: str, path: Path) -> None:
    """Writes a file that is no checkpoint, or no longer one."""
    save(path.with_name("good.pt"), linears(4, 64).state_dict())
    save(path.with_name("good.safetensors"), linears(4, 64).state_dict())
    torch_zip = path.with_name("good.pt").read_bytes()
    safe = path.with_name("good.safetensors").read_bytes()
    if kind == "zip archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
        return
    if kind == "TorchScript":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("net/data.pkl", b"")
            archive.writestr("net/constants.pkl", b"")
        return
    middle = torch_zip.find(b"ctorch._utils")
    path.write_bytes(
        {
            "empty": b"",
            "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "web page": b"<!DOCTYPE html><html></html>",
            "text": b'{\n  "a": {"b": 1}}',
            "truncated torch": torch_zip[: len(torch_zip) // 2],
            "corrupt torch": torch_zip[:middle] + b"\0\xff" * 20 + torch_zip[middle + 40 :],
            "raw pickle": pickle.dumps({"a": [1, 2]}),
            "truncated safetensors": safe[: len(safe) // 2],
            "truncated header": safe[:100],
            "corrupt header": safe[:60] + b"\xff\0zz" + safe[64:],
            "wrong offsets": safe.replace(b'"F32"', b'"F16"', 1),
        }[kind]
    )


@pytest.mark.parametrize(
    "kind, says",
    [
        ("empty", "is empty"),
        ("git-lfs pointer", "Git LFS pointer"),
        ("web page", "neither a safetensors nor a PyTorch file"),
        ("text", "neither a safetensors nor a PyTorch file"),
        ("zip archive", "zip archive without a checkpoint"),
        ("TorchScript", "TorchScript"),
        ("truncated torch", "truncated"),
        ("corrupt torch", "damaged"),
        ("raw pickle", "damaged or contains something other"),
        ("truncated safetensors", r"truncated: it has \d+ of at least \d+ bytes"),
        ("truncated header", "truncated"),
        ("corrupt header", "damaged"),
        ("wrong offsets", "damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_is_no_checkpoint_says_so(tmp_path, kind, says):
    path = tmp_path / "x.pt"
    spoil(kind, path)
    with pytest.raises(ValueError, match=says) as error:
        open_tensors(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [{"epoch": 3, "optimizer": {}}, [torch.ones(2)], {}])
def test_a_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no tensors at its top level"):
        open_tensors(tmp_path / "x.pt")


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_tensors(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="is a folder"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_written_files_are_read_by_safetensors(tmp_path, dtype):
    tied = torch.randn(3, 5)
    tensors = {
        "odd": torch.ones(3, dtype=torch.uint8),
        "tied.a": tied,
        "tied.b": tied,
        "transposed": tied.t(),
        "scalar": torch.tensor(2.5),
        "count": torch.tensor(7),
        "flag": torch.tensor([True, False]),
        "none": torch.empty(0, 4),
        "half": torch.ones(5, dtype=torch.float16),
    }
    write_tensors(tmp_path / "x.safetensors", tensors, dtype=dtype, metadata={"k": "v"})
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for key, tensor in tensors.items():
        expected = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        assert found[key].dtype == expected.dtype and torch.equal(found[key], expected)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "k": "v"}


def test_an_existing_file_is_kept_unless_overwriting_is_asked_for(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    path.write_text("precious")
    with pytest.raises(ValueError, match="exists"):
        write_tensors(path, tensors)
    assert path.read_text() == "precious"
    write_tensors(path, tensors, overwrite=True)
    assert set(open_tensors(path)) == set(tensors)


def test_a_failed_write_leaves_nothing_behind(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    path.write_text("precious")
    tensors["b.c"][0] = 1e30
    with pytest.raises(ValueError, match="beyond"):
        write_tensors(path, tensors, dtype=torch.float16, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_text() == "precious"


def test_an_unwritable_place_is_named(tmp_path, tensors):
    with pytest.raises(ValueError, match="cannot be written"):
        write_tensors(tmp_path / "missing" / "x.safetensors", tensors)
    with pytest.raises(ValueError, match="must end in .safetensors"):
        write_tensors(tmp_path / "x.pt", tensors)
