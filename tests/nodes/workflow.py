"""Workflows in the UI's format, read as the frontend reads them, without a browser.

A workflow may hold subgraphs: graphs that are shown as one node, called their box here.

`core_nodes.json` holds what the server tells about the node types of others that the shipped
workflows use. With a host at hand, make it anew with `python -m tests.nodes.workflow`.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.nodes.recorder import object_info, recorded_nodes
from tests.nodes.server import ROOT, Prompt, Server

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
CORE_NODES = Path(__file__).with_name("core_nodes.json")
NOTES = {"Note", "MarkdownNote"}  # the only node types of the frontend alone that we use
ENTRY, EXIT = -10, -20  # stand for the inputs and the outputs of a subgraph in its links
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
CONTROLS = {"fixed", "increment", "decrement", "randomize"}
TOLD = ("output", "output_name", "output_node")
KEPT = {"default", "min", "max", "options", "control_after_generate", "forceInput"}
MODEL_FILES = (".pt", ".pth", ".ckpt", ".safetensors", ".gguf")

Json = dict[str, Any]


def read(path: Path) -> Json:
    return json.loads(path.read_text(encoding="utf-8"))


def definitions() -> Json:
    """What /object_info tells, for our nodes and for those of others that the workflows use."""
    return {**read(CORE_NODES), **{node.id: object_info(node) for node in recorded_nodes()}}


def subgraphs_of(workflow: Json) -> dict[str, Json]:
    """The subgraphs, by the type of their boxes."""
    return {inner["id"]: inner for inner in workflow.get("definitions", {}).get("subgraphs", [])}


def links_of(graph: Json) -> list[list[Any]]:
    """Id, source, its output, target, its input, type. Subgraphs spell them out."""
    return [[v[k] for k in LINK] if isinstance(v, dict) else v for v in graph["links"]]


def nodes_of(workflow: Json) -> list[Json]:
    """The nodes that become part of the prompt; those of a subgraph in the place of its box.

    The id is then `box:node`, as the frontend has it. `sources` tells what the inputs are linked
    to: name -> [id, output]. Boxes in a subgraph are not in use here, and not looked into.
    """
    subgraphs = subgraphs_of(workflow)
    types = {str(node["id"]): node["type"] for node in workflow["nodes"]}
    boxes = {name: subgraphs[kind] for name, kind in types.items() if kind in subgraphs}
    nodes, given, leaving = {}, {}, {}
    for box, graph in {"": workflow, **boxes}.items():
        prefix = box and f"{box}:"
        nodes |= {f"{prefix}{node['id']}": node for node in graph["nodes"]}
        for _, source, output, target, place, _ in links_of(graph):
            if target == EXIT:
                leaving[box, place] = f"{prefix}{source}", output
            else:
                entry = nodes[f"{prefix}{target}"]["inputs"][place]["name"]
                given[f"{prefix}{target}", entry] = f"{prefix}{source}", output

    def origin(source: str, output: int) -> list[Any] | None:
        """The output of a node, also behind the inputs and outputs of boxes."""
        box, _, node = source.rpartition(":")
        if node == str(ENTRY):
            outside = given.get((box, boxes[box]["inputs"][output]["name"]))
        else:
            outside = leaving.get((source, output))
            if outside is None:
                return [source, output]
        return outside and origin(*outside)

    found = []
    for name, node in nodes.items():
        if name not in boxes and node["type"] not in NOTES:
            linked = {entry: origin(*start) for (to, entry), start in given.items() if to == name}
            sources = {entry: source for entry, source in linked.items() if source}
            found.append({**node, "id": name, "sources": sources})
    return found


def inputs_of(definition: Json) -> dict[str, tuple[str, Json, bool]]:
    """Name -> type, options, whether required. A list of choices in place of a type is a COMBO."""
    inputs = {}
    for kind in ("required", "optional"):
        for name, (kind_of, *rest) in definition["input"].get(kind, {}).items():
            options = dict(rest[0]) if rest else {}
            if isinstance(kind_of, list):
                kind_of, options["options"] = "COMBO", kind_of
            inputs[name] = (kind_of, options, kind == "required")
    return inputs


def widgets_of(definition: Json) -> list[tuple[str, Json, bool]]:
    """The inputs with a widget, their options, and whether a control of a seed follows."""
    return [
        (name, options, options.get("control_after_generate", name in {"seed", "noise_seed"}))
        for name, (kind, options, _) in inputs_of(definition).items()
        if kind in WIDGETS and not options.get("forceInput")
    ]


def values_of(node: Json, definition: Json) -> Json:
    """Widget -> value; an upload's button and a report, which come last, are no values."""
    stored = node.get("widgets_values") or []
    if isinstance(stored, dict):
        return {name: stored[name] for name, *_ in widgets_of(definition) if name in stored}
    rest, values = list(stored), {}
    uploads, report = 0, "report" in definition["output_name"]
    for name, options, controlled in widgets_of(definition):
        values[name] = rest.pop(0)
        if controlled and (control := rest.pop(0)) not in CONTROLS:
            raise ValueError(f"{node['type']} {node['id']}: {control} after {name}")
        uploads += any(key.endswith("_upload") for key in options)
    if len(rest) not in {uploads, uploads + report}:
        raise ValueError(f"{node['type']} {node['id']}: {rest} are values of no widget")
    return values


def api_prompt(workflow: Json, known: Json) -> Prompt:
    """The prompt that the frontend derives from a workflow."""
    return {
        node["id"]: {
            "class_type": node["type"],
            "inputs": values_of(node, known[node["type"]]) | node["sources"],
        }
        for node in nodes_of(workflow)
    }


def needs_download(prompt: Prompt) -> bool:
    """Whether it names a model file: the built-in model and VAE need none."""
    values = [value for node in prompt.values() for value in node["inputs"].values()]
    return any(mark in str(value) for value in values for mark in (*MODEL_FILES, "(download)"))


def trimmed(kind: Any, options: Json | None = None) -> list[Any]:
    """An input without the host's words."""
    options = options or {}
    return [kind, {k: v for k, v in options.items() if k in KEPT or k.endswith("_upload")}]


def record_core_nodes() -> None:
    """Writes `core_nodes.json`: what the server tells about the node types of others in use."""
    files = [*WORKFLOWS, *BLUEPRINTS]
    used = {node["type"] for path in files for node in nodes_of(read(path))}
    with tempfile.TemporaryDirectory() as base, Server(Path(base)) as server:
        reported = server.get("/object_info")
    others = sorted(used & reported.keys() - {node.id for node in recorded_nodes()})
    known = {name: {key: reported[name][key] for key in TOLD} for name in others}
    for name, definition in known.items():
        definition["input"] = {
            kind: {
                key: trimmed(*given) for key, given in reported[name]["input"].get(kind, {}).items()
            }
            for kind in ("required", "optional")
        }
    CORE_NODES.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record_core_nodes()
