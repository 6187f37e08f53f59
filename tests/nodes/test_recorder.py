"""The stand-in for the host: what it records, what it refuses, and that it is true to the host."""

import sys

import pytest

from tests.nodes.recorder import (
    HOST,
    INPUTS,
    NEWER,
    SOCKETS,
    arguments,
    object_info,
    recorded_nodes,
)
from tests.nodes.recorder import IO as RECORDED

EXTENSION = """
async def comfy_entrypoint():
    from .nodes import Extension
    return Extension()
"""
NODES = """
import comfy.model_base
import folder_paths
from comfy import model_management as mm
from comfy_api.latest import ComfyExtension, io, ui

class Model(comfy.model_base.BaseModel):
    device: "mm.Device | None" = mm.get_torch_device()

class Example(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = folder_paths.get_filename_list("star")
        return io.Schema(
            node_id="STAR_Example", display_name="Example", category="STAR", {unknown}
            inputs=[
                io.Model.Input("model", tooltip="A model."),
                io.Combo.Input("file", ["tiny", *files], default="tiny"),
                io.Int.Input("steps", optional=True, default=5, min=1, max=9),
            ],
            outputs=[io.Custom("STAR_X").Output("x")],
        )

    @classmethod
    def execute(cls, model, file, steps=5) -> io.NodeOutput:
        return io.NodeOutput(model, ui=ui.PreviewText("done"))

class Extension(ComfyExtension):
    async def get_node_list(self):
        return [Example]
"""


@pytest.fixture
def example_pack(tmp_path):
    def written(unknown=""):
        (tmp_path / "__init__.py").write_text(EXTENSION)
        (tmp_path / "nodes.py").write_text(NODES.replace("{unknown}", unknown))
        return tmp_path

    return written


def test_nodes_are_recorded_without_the_host(example_pack):
    [node] = recorded_nodes(example_pack())
    info = object_info(node)
    assert node.id == "STAR_Example"
    assert info["input"]["required"]["model"] == ["MODEL", {"tooltip": "A model."}]
    assert info["input"]["required"]["file"] == ["COMBO", {"default": "tiny", "options": ["tiny"]}]
    assert info["input"]["optional"]["steps"] == ["INT", {"default": 5, "min": 1, "max": 9}]
    assert info["output"] == ["STAR_X"]


def test_a_schema_field_that_the_host_does_not_know_is_refused(example_pack):
    with pytest.raises(TypeError, match="price_badge"):
        recorded_nodes(example_pack("price_badge=None,"))


def test_recording_leaves_the_modules_as_they_were(example_pack):
    before = dict(sys.modules)
    recorded_nodes(example_pack())
    changed = {n for n in sys.modules.keys() | before if sys.modules.get(n) is not before.get(n)}
    assert not {name for name in changed if name.split(".")[0] in HOST | {"recorded_pack"}}


@pytest.mark.host
def test_the_recorder_takes_what_the_host_takes(pack):
    from comfy_api.latest import io  # pyright: ignore[reportMissingImports]

    for name in [*INPUTS, *SOCKETS]:
        for side in ("Input", "Output"):
            host, recorded = getattr(getattr(io, name), side), getattr(RECORDED[name], side)
            # Newer hosts take more.
            assert arguments(recorded).items() <= arguments(host).items(), f"{name}.{side}"
            if (name, side) != ("Combo", "Output"):  # its type is the list of its choices
                assert recorded("x").io_type == host("x").io_type


@pytest.mark.host
def test_the_recorder_knows_the_hosts_schema_and_names(pack):
    from comfy_api.latest import io  # pyright: ignore[reportMissingImports]

    recorded = arguments(RECORDED["Schema"])
    known = {name: default for name, default in recorded.items() if name not in NEWER.split()}
    assert known.items() <= arguments(io.Schema).items()
    for name in ("Hidden", "NumberDisplay", "FolderType", "UploadType"):
        recorded = {member.name: member.value for member in RECORDED[name]}
        assert (
            recorded.items() <= {member.name: member.value for member in getattr(io, name)}.items()
        )


@pytest.mark.host
def test_the_recorder_says_of_every_node_what_the_server_says(server):
    reported = server.get("/object_info")
    for node in recorded_nodes():
        recorded, real = object_info(node), reported[node.id]
        assert real.get("search_aliases") in (node.schema.search_aliases, None)
        for key in recorded.keys() - {"input"}:
            assert recorded[key] == real[key], f"{node.id}: {key}"
        for kind, inputs in recorded["input"].items():
            assert list(inputs) == list(real["input"].get(kind, {}))
            for name, (type_, options) in inputs.items():
                assert type_ == real["input"][kind][name][0]
                assert options.items() <= real["input"][kind][name][1].items(), f"{node.id}: {name}"
