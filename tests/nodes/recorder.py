"""Stands in for ComfyUI while the pack's nodes are imported, so that CI reads their schemas.

`comfy_api.latest` is recorded: its classes keep the arguments they are given and refuse the ones
that ComfyUI 0.3.64 refuses, but for those of `NEWER` (`test_recorder.py` compares both).
`folder_paths` is an installation without a single file. Everything else of the host is a dummy
that may be subclassed and called.
"""

import asyncio
import importlib.util
import inspect
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import make_dataclass
from enum import Enum
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

PACK = Path(__file__).resolve().parents[2]
HOST = {
    *("comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths"),
    *("latent_preview", "node_helpers", "nodes", "server", "av"),
}

# What the host's classes take, in its order; "!" marks what has no default.
SOCKET = "id! display_name optional tooltip lazy"
PLAIN = f"{SOCKET} extra_dict"
FORCE = "socketless force_input"
INPUTS = {
    "Boolean": f"{SOCKET} default label_on label_off {FORCE}",
    "Int": f"{SOCKET} default min max step control_after_generate display_mode {FORCE}",
    "Float": f"{SOCKET} default min max step round display_mode {FORCE}",
    "String": f"{SOCKET} multiline placeholder default dynamic_prompts {FORCE}",
    "Combo": "id! options display_name optional tooltip lazy default control_after_generate upload"
    " image_folder remote socketless",
}
OUTPUT = "id display_name tooltip is_output_list"
OUTPUTS = {"Combo": "id display_name options tooltip is_output_list"}
SOCKETS = {
    **{name: name.upper() for name in ("Image", "Mask", "Latent", "Conditioning", "Video")},
    **{name: name.upper() for name in ("Model", "Clip", "Vae", "Audio")},
    **{name: name.upper() for name in ("Sampler", "Sigmas", "Noise", "Guider")},
    "AnyType": "*",
}
SCHEMA = (
    "node_id! display_name category inputs outputs hidden description is_input_list is_output_node"
    " is_deprecated is_experimental is_api_node not_idempotent enable_expand"
)
# Newer hosts know these fields too, and the pack asks whether they do.
NEWER = "search_aliases"
ENUMS = {
    "NumberDisplay": {name: name for name in ("number", "slider")},
    "FolderType": {name: name for name in ("input", "output", "temp")},
    "UploadType": {name: f"{name}_upload" for name in ("image", "audio", "video")},
    "Hidden": {n: n.upper() for n in ("unique_id", "prompt", "extra_pnginfo", "dynprompt")},
}


class Recorded:
    """Base of the recorded classes. The host gives every input an `extra_dict` to write into."""

    extra_dict: Any = None

    def __post_init__(self) -> None:
        self.extra_dict = self.extra_dict or {}


def record(name: str, arguments: str, **constants: Any) -> type:
    """A class that takes these arguments, by place or by name, and no others."""
    taken = [
        (argument[:-1], Any) if argument.endswith("!") else (argument, Any, None)
        for argument in arguments.split()
    ]
    return make_dataclass(name, taken, bases=(Recorded,), namespace=constants, eq=False)


def io_type(name: str, kind: str) -> SimpleNamespace:
    """A type of the host: `io.Int` has `io.Int.Input` and `io.Int.Output`."""
    return SimpleNamespace(
        io_type=kind,
        Type=Any,
        Input=record("Input", INPUTS.get(name, PLAIN), io_type=kind),
        Output=record("Output", OUTPUTS.get(name, OUTPUT), io_type=kind),
    )


class ComfyNode:
    """What nodes derive from."""

    hidden = None


class ComfyExtension:
    """What packs derive from."""


class NodeOutput:
    """What a node returns."""

    def __init__(self, *args: Any, ui=None, expand=None, block_execution=None) -> None:
        self.args, self.ui = args, ui
        self.expand, self.block_execution = expand, block_execution


IO = {
    **{name: io_type(name, name.upper()) for name in INPUTS},
    **{name: io_type(name, kind) for name, kind in SOCKETS.items()},
    **{name: Enum(name, members, type=str) for name, members in ENUMS.items()},
    "Input": record("Input", PLAIN),
    "Output": record("Output", OUTPUT),
    "Custom": lambda io_type_: io_type("Custom", io_type_),
    "Schema": record("Schema", f"{SCHEMA} {NEWER}"),
    "ComfyNode": ComfyNode,
    "NodeOutput": NodeOutput,
}


class _Open(type):
    """Classes of this type have every attribute, and nothing in them to go through."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Open(name, (Dummy,), {})

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


class Dummy(metaclass=_Open):
    """Anything of the host that is not recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Open(name, (Dummy,), {})


class _Host(MetaPathFinder, Loader):
    """Every module of the host: recorded, or a dummy."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        of_the_host = fullname.split(".")[0] in HOST
        return ModuleSpec(fullname, self, is_package=True) if of_the_host else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.name == "comfy_api.latest":
            module = ModuleType(spec.name)
            module.__dict__.update(
                io=SimpleNamespace(**IO),
                ui=Dummy,
                ComfyExtension=ComfyExtension,
                Input=Dummy,
                InputImpl=Dummy,
            )
        else:
            module = _Module(spec.name)
        if spec.name == "folder_paths":
            folders = defaultdict(lambda: ([], set()))
            module.__dict__.update(
                models_dir="models",
                folder_names_and_paths=folders,
                get_filename_list=lambda folder_name: [],
                get_folder_paths=lambda folder_name: folders[folder_name][0],
                get_full_path=lambda folder_name, filename: None,
            )
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def stand_in(pack: str) -> Iterator[None]:
    """Within it the host is recorded; after it `sys.modules` is what it was, `pack` is gone."""

    def concerned() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in HOST | {pack}]

    before = {name: sys.modules.pop(name) for name in concerned()}
    host = _Host()
    sys.meta_path.insert(0, host)
    try:
        yield
    finally:
        sys.meta_path.remove(host)
        for name in concerned():
            del sys.modules[name]
        sys.modules.update(before)


class Node(NamedTuple):
    """A node as the pack lists it."""

    cls: Any
    schema: Any

    @property
    def id(self) -> str:
        return self.schema.node_id


@cache
def recorded_nodes(folder: Path = PACK) -> list[Node]:
    """The nodes of the pack in `folder`, in the order of its list. Their schemas are recorded."""
    name = "recorded_pack"
    with stand_in(name):
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        assert spec and spec.loader
        pack = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(pack)
        extension = asyncio.run(pack.comfy_entrypoint())
        return [Node(cls, cls.define_schema()) for cls in asyncio.run(extension.get_node_list())]


OPTIONS = ("tooltip", "default", "min", "max", "step", "options", "control_after_generate")


def object_info(node: Node) -> dict[str, Any]:
    """The part of the server's /object_info that workflows depend on."""
    schema, inputs = node.schema, {"required": {}, "optional": {}}
    for i in schema.inputs or []:
        reported = {name: getattr(i, name, None) for name in OPTIONS}
        if isinstance(reported["options"], type):
            reported["options"] = [
                member.value for member in reported["options"].__members__.values()
            ]
        if isinstance(reported["default"], Enum):
            reported["default"] = reported["default"].value
        reported["forceInput"] = getattr(i, "force_input", None)
        reported["advanced"] = i.extra_dict.get("advanced")
        options = {name: value for name, value in reported.items() if value is not None}
        inputs["optional" if i.optional else "required"][i.id] = [i.io_type, options]
    return {
        "input": inputs,
        "output": [o.io_type for o in schema.outputs or []],
        "output_name": [o.display_name or o.io_type for o in schema.outputs or []],
        "display_name": schema.display_name,
        "category": schema.category,
        "description": schema.description,
        "output_node": bool(schema.is_output_node),
    }


def arguments(function: Any) -> dict[str, bool]:
    """The names that a function or class takes, and whether each of them has a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default is not p.empty for p in parameters}
