"""Weights beside DeepSpeed's own objects: read without building these."""

import argparse
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from star_core.checkpoints.deepspeed import read_module
from star_core.checkpoints.tensors import open_tensors


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_tensors_are_those_that_were_written(tmp_path, dtype):
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    module = OrderedDict(whole=whole, view=whole[1:, ::2], turned=whole.T, none=whole[:0])
    if dtype.is_floating_point:
        module["parameter"] = nn.Parameter(whole)
    torch.save({"module": module, "optimizer": None, "rng": np.random.get_state()}, tmp_path / "a")
    found = read_module(tmp_path / "a")
    assert found.keys() == module.keys()
    assert all(torch.equal(found[key], module[key].detach()) for key in module)


@pytest.mark.parametrize("where", ["beside", "in the module"])
def test_objects_are_not_built_and_nothing_is_run(tmp_path, where):
    target = tmp_path / "made"
    module: dict[str, Any] = {"a": torch.ones(2)}
    content: dict[str, Any] = {"module": module, "args": argparse.Namespace(lr=1)}
    (content if where == "beside" else module)["evil"] = Malicious(target)
    torch.save(content, tmp_path / "x.pt")
    file = open_tensors(tmp_path / "x.pt")
    assert list(file) == ["a"] and file.format == "torch (DeepSpeed)"
    assert not target.exists()


def test_tensors_stay_in_the_file(tmp_path):
    torch.save({"module": {"a": torch.zeros(2**20)}, "x": Malicious(tmp_path)}, tmp_path / "x.pt")
    tensor = read_module(tmp_path / "x.pt")["a"]
    with (tmp_path / "x.pt").open("r+b") as file:
        place = file.read().rindex(b"\0" * 4096)
        file.seek(place)
        file.write(b"\x3f" * 4)
    assert tensor.any()  # a copy would not see what is written afterwards


@pytest.mark.parametrize("content", [{"weights": {}}, {"module": 3}, [1]])
def test_files_without_a_module_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no readable weights"):
        read_module(tmp_path / "x.pt")
