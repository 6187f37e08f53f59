import json
from dataclasses import dataclass, field

import pytest
from safetensors.torch import load_file, save_file

from star_core.backbones import I2VGENXL
from star_core.checkpoints.metadata import (
    LARGEST,
    build_checked,
    check_fields,
    dataclass_from_json,
    read_object,
)
from star_core.model import BUILT_IN
from star_core.sampling_defaults import LatentFormat, SamplingDefaults
from star_core.star_checkpoint import load_model, open_model
from tests.fuzz import model_files


@dataclass(frozen=True)
class Sizes:
    width: int = 4
    share: float = 0.5
    name: str = "x"
    on: bool = False
    sides: tuple[int, ...] = (1, 2)
    pair: tuple[int, int] | None = None
    rest: list = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.width == 7:
            raise ValueError("width 7 is odd")


def test_fields_of_the_right_types_are_taken():
    values = {"width": 3, "share": 1, "name": "y", "on": True, "sides": [], "pair": [1, 2]}
    assert dataclass_from_json(Sizes, values, "f") == Sizes(**values)
    assert dataclass_from_json(Sizes, {"pair": None}, "f") == Sizes()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (None, "f must be an object, not null"),
        ([1], r"f must be an object, not \[1\]"),
        ({"height": 1}, "f.height is unknown"),
        ({"width": 2.0}, "f.width cannot be 2.0"),
        ({"width": True}, "f.width cannot be true"),
        ({"width": -1}, "f.width cannot be -1"),
        ({"width": LARGEST + 1}, "f.width cannot be"),
        ({"share": "0.5"}, 'f.share cannot be "0.5"'),
        ({"share": float("inf")}, "f.share cannot be Infinity"),
        ({"name": 1}, "f.name cannot be 1"),
        ({"on": 1}, "f.on cannot be 1"),
        ({"sides": 1}, "f.sides cannot be 1"),
        ({"sides": [1, "2"]}, "f.sides cannot be"),
        ({"pair": [1]}, "f.pair cannot be"),
        ({"width": 7}, "f: width 7 is odd"),
    ],
)
def test_other_values_are_refused_by_the_name_of_the_field(values, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        dataclass_from_json(Sizes, values, "f")


def test_choices_and_every_field_of_the_settings_in_files_are_checked():
    with pytest.raises(ValueError, match='s.solver_mode cannot be "slow"'):
        dataclass_from_json(SamplingDefaults, {"solver_mode": "slow"}, "s")
    for settings in (SamplingDefaults, LatentFormat, I2VGENXL.config):
        check_fields(settings, vars(settings()), "s")
        with pytest.raises(ValueError, match=r"s\.\w+ cannot be"):
            check_fields(settings, {name: object() for name in vars(settings())}, "s")


def test_text_that_is_no_object_and_sizes_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="f is not valid JSON"):
        read_object("{", "f")
    with pytest.raises(ValueError, match="f must be an object"):
        read_object("3", "f")
    with pytest.raises(ValueError, match="f states sizes that fit no network: .*zero"):
        build_checked(lambda: 1 // 0, "f")


def test_a_network_without_heads_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    config = vars(open_model(BUILT_IN["tiny"][0]).config) | {"head_dim": 0}
    star = {"config": config, "sampling": vars(SamplingDefaults())}
    save_file(load_file(BUILT_IN["tiny"][0]), path, metadata={"star": json.dumps(star)})
    with pytest.raises(ValueError, match="fit no network"):
        load_model(path)


def test_damaged_files_load_or_are_refused_in_one_line(capsys):
    assert model_files.main(count=40) == 0, capsys.readouterr().out
