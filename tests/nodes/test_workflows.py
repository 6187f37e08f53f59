"""Workflows and blueprints agree with the nodes and with each other, and are fit to look at."""

import json
import urllib.error
import urllib.parse
from itertools import combinations
from typing import Any

import pytest
from PIL import Image

from star_core.checkpoints.download import PUBLISHED
from tests.nodes.recorder import recorded_nodes
from tests.nodes.server import FOLDER
from tests.nodes.workflow import (
    BLUEPRINTS,
    ENTRY,
    EXIT,
    MODEL_FILES,
    NOTES,
    WIDGETS,
    WORKFLOWS,
    api_prompt,
    definitions,
    inputs_of,
    links_of,
    needs_download,
    nodes_of,
    read,
    subgraphs_of,
    values_of,
    widgets_of,
)

NODES = recorded_nodes()
KNOWN = definitions()
FILES = [*WORKFLOWS, *BLUEPRINTS]
FETCHING = [path for path in WORKFLOWS if needs_download(api_prompt(read(path), KNOWN))]
TITLE, APART = 30, 60  # pixels: a node's title, which lies above its place; room between nodes
every_file = pytest.mark.parametrize(
    "workflow", [read(p) for p in FILES], ids=[p.stem for p in FILES]
)


def graphs_of(workflow):
    """The workflow itself and its subgraphs, the ends of these among their nodes."""
    yield workflow
    for inner in subgraphs_of(workflow).values():
        entry = {"id": ENTRY, "type": ENTRY, "outputs": [slot(i) for i in inner["inputs"]]}
        leave = {"id": EXIT, "type": EXIT, "inputs": [slot(o) for o in inner["outputs"]]}
        yield {**inner, "nodes": [*inner["nodes"], entry, leave], "links": links_of(inner)}


def slot(end):
    """An input or output of a subgraph, as a node inside sees it."""
    return {**end, "links": end["linkIds"], "link": end["linkIds"][0]}


def types_in(workflow, graph):
    """Of the graph's nodes: outputs, and the types of inputs by name."""
    known: dict[Any, Any] = {
        kind: (definition["output"], {name: i[0] for name, i in inputs_of(definition).items()})
        for kind, definition in KNOWN.items()
    }
    for kind, inner in subgraphs_of(workflow).items():
        outputs = [output["type"] for output in inner["outputs"]]
        known[kind] = outputs, {i["name"]: i["type"] for i in inner["inputs"]}
    known[ENTRY] = [i["type"] for i in graph.get("inputs", [])], {}
    known[EXIT] = [], {o["name"]: o["type"] for o in graph.get("outputs", [])}
    return known


def test_a_title_is_the_name_of_the_file_and_said_in_plain_words():
    """What hosts and frontends show: they know of no other title, and list every file there is."""
    assert WORKFLOWS and BLUEPRINTS
    for path in FILES:
        assert " " in path.stem and "_" not in path.stem and path.stem[0].isupper()
    assert not {path.stem for path in WORKFLOWS} & {"index", "index.schema"}


def test_every_node_is_used_in_a_workflow():
    used = {node["type"] for path in WORKFLOWS for node in nodes_of(read(path))}
    assert {node.id for node in NODES} <= used


@every_file
def test_nodes_exist_and_are_switched_on(workflow):
    assert not {node["type"] for node in nodes_of(workflow)} - KNOWN.keys()
    ids = []
    for graph in [workflow, *subgraphs_of(workflow).values()]:
        assert not [node["id"] for node in graph["nodes"] if node.get("mode", 0)]
        ids += [node["id"] for node in graph["nodes"]]
    assert len(ids) == len(set(ids)), "frontends give nodes new ids where subgraphs repeat one"
    assert workflow["last_node_id"] >= max(ids)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_notes(path):
    assert [node for node in read(path)["nodes"] if node["type"] in NOTES]


@every_file
def test_links_join_slots_that_exist_and_fit(workflow):
    links = [link[0] for graph in graphs_of(workflow) for link in graph["links"]]
    assert len(links) == len(set(links)), "frontends renumber links where subgraphs repeat one"
    for graph in graphs_of(workflow):
        known = types_in(workflow, graph)
        nodes = {node["id"]: node for node in graph["nodes"]}
        into = {(n["id"], s["link"]) for n in nodes.values() for s in n.get("inputs", [])}
        out_of = {
            (n["id"], place, link)
            for n in nodes.values()
            for place, output in enumerate(n.get("outputs", []))
            for link in output.get("links") or []
        }
        for link, source, output, target, place, kind in graph["links"]:
            entry = nodes[target]["inputs"][place]
            given, _ = known[nodes[source]["type"]]
            _, taken = known[nodes[target]["type"]]
            given = "COMBO" if isinstance(given[output], list) else given[output]
            fits = taken[entry["name"]] == "*" or given in taken[entry["name"]].split(",")
            assert kind == given and fits, f"link {link}"
            assert entry["link"] == link and (source, output, link) in out_of, f"link {link}"
        links = {link[0] for link in graph["links"]}
        assert {link for _, link in into if link is not None} == links
        assert {link for *_, link in out_of} == links


@every_file
def test_inputs_exist_and_the_required_ones_are_given(workflow):
    promised = set()  # by the inputs of a box
    for box in workflow["nodes"]:
        if inner := subgraphs_of(workflow).get(box["type"]):
            nodes = {node["id"]: node for node in inner["nodes"]}
            promised |= {
                (f"{box['id']}:{target}", nodes[target]["inputs"][place]["name"])
                for _, source, _, target, place, _ in links_of(inner)
                if source == ENTRY
            }
    blueprint = len(workflow["nodes"]) == 1
    for name, node in api_prompt(workflow, KNOWN).items():
        inputs = inputs_of(KNOWN[node["class_type"]])
        needed = {entry for entry, (_, _, required) in inputs.items() if required}
        missing = {(name, entry) for entry in needed - node["inputs"].keys()}
        assert missing <= (promised if blueprint else set()), node["class_type"]
        assert node["inputs"].keys() <= inputs.keys(), node["class_type"]


@every_file
def test_slots_carry_the_names_of_the_nodes(workflow):
    uploads = {"upload"}  # the button of LoadVideo
    for node in nodes_of(workflow):
        known = KNOWN[node["type"]]
        assert {entry["name"] for entry in node["inputs"]} <= inputs_of(known).keys() | uploads
        outputs = [output["name"] for output in node["outputs"]]
        assert outputs == known["output_name"], node["type"]


@every_file
def test_values_are_legal(workflow):
    """Hosts before v0.8 check numbers, but not choices of nodes like ours."""
    for node in nodes_of(workflow):
        inputs = inputs_of(KNOWN[node["type"]])
        for name, value in values_of(node, KNOWN[node["type"]]).items():
            kind, options, _ = inputs[name]
            where = f"{node['type']} {node['id']}: {name} = {value!r}"
            if kind == "COMBO":
                uploaded = any(key.endswith("_upload") for key in options)
                own_file = str(value).endswith(MODEL_FILES) and not node["type"].startswith("STAR_")
                assert uploaded or own_file or value in options["options"], where
            elif kind == "BOOLEAN":
                assert isinstance(value, bool), where
            elif kind == "STRING":
                assert isinstance(value, str), where
            else:
                whole = int if kind == "INT" else (int, float)
                assert isinstance(value, whole) and not isinstance(value, bool), where
                assert options.get("min", value) <= value <= options.get("max", value), where


@every_file
def test_files_that_nodes_name_have_an_address(workflow):
    """So that the frontend offers what is missing. Ours are those that the pack fetches."""
    ours = {
        file.file: {
            "name": file.file,
            "url": f"https://huggingface.co/{file.repo}/resolve/main/{file.path}",
            "directory": file.folder,
        }
        for file in PUBLISHED.values()
    }
    fetched = {f"{name} (download)": file.file for name, file in PUBLISHED.items()}
    for node in nodes_of(workflow):
        values = [v for v in node["widgets_values"] if isinstance(v, str)]
        named = {fetched.get(v, v) for v in values if v in fetched or v.endswith(MODEL_FILES)}
        models = {model["name"]: model for model in node["properties"].get("models", [])}
        assert named <= models.keys(), node["type"]
        for name, model in models.items():
            assert model == ours.get(name, model)
            assert model.keys() == {"name", "url", "directory"}
            assert model["url"].startswith("https://huggingface.co/")


@every_file
def test_a_box_shows_the_inputs_and_values_that_are_in_it(workflow):
    """Some frontends take a value from the box, others from inside."""
    subgraphs = subgraphs_of(workflow)
    for box in workflow["nodes"]:
        if (inner := subgraphs.get(box["type"])) is None:
            continue
        nodes = {node["id"]: node for node in inner["nodes"]}
        links = {link[0]: link for link in links_of(inner)}
        shown = []
        for entry in inner["inputs"]:
            values = []
            for link in entry["linkIds"]:
                node = nodes[links[link][3]]
                name = node["inputs"][links[link][4]]["name"]
                if name in {n for n, *_ in widgets_of(KNOWN[node["type"]])}:
                    values.append(values_of(node, KNOWN[node["type"]])[name])
            assert all(value == values[0] for value in values)
            shown += values[:1]
        assert box["widgets_values"] == shown
        ends = [(i["name"], i["type"]) for i in inner["inputs"]]
        assert [(i["name"], i["type"]) for i in box["inputs"]] == ends
        assert [i["name"] for i in box["inputs"] if "widget" in i] == [
            name for name, kind in ends if kind in WIDGETS
        ]
        outputs = [(o["name"], o["type"]) for o in inner["outputs"]]
        assert [(o["name"], o["type"]) for o in box["outputs"]] == outputs


def test_the_boxes_of_workflows_are_the_blueprint():
    """All but the values that they show outside."""

    def form(workflow):
        (inner,) = subgraphs_of(workflow).values()
        nodes = [{**node, "widgets_values": []} for node in inner["nodes"]]
        return {**inner, "nodes": nodes}

    (blueprint,) = BLUEPRINTS
    boxed = [read(path) for path in WORKFLOWS if subgraphs_of(read(path))]
    assert len(boxed) >= 2
    assert all(form(workflow) == form(read(blueprint)) for workflow in boxed)
    (inner,) = subgraphs_of(read(blueprint)).values()
    assert inner["name"] == blueprint.stem
    assert len(read(blueprint)["nodes"]) == 1, "what the frontend asks of a blueprint"


@every_file
def test_an_app_names_inputs_and_results_that_exist(workflow):
    shown = workflow["extra"].get("linearData", {"inputs": [], "outputs": []})
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert (
        bool(shown["inputs"])
        == bool(shown["outputs"])
        == workflow["extra"].get("linearMode", False)
    )
    for node, name in shown["inputs"]:
        assert name in {n for n, *_ in widgets_of(KNOWN[nodes[node]["type"]])}
    assert all(KNOWN[nodes[node]["type"]]["output_node"] for node in shown["outputs"])


def test_a_workflow_opens_as_an_app():
    assert [path for path in WORKFLOWS if read(path)["extra"].get("linearMode")]


def rectangle(node):
    """Left, top, right, bottom with the title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


@every_file
def test_there_is_room_between_nodes(workflow):
    """In Nodes 2.0 they are taller, and newer hosts have more inputs; reports need room as well."""
    for graph in [workflow, *subgraphs_of(workflow).values()]:
        for one, other in combinations(graph["nodes"], 2):
            a, b = rectangle(one), rectangle(other)
            beside = max(a[0] - b[2], b[0] - a[2])
            below = max(a[1] - b[3], b[1] - a[3])
            where = f"{one['type']} {one['id']} and {other['type']} {other['id']}"
            assert max(beside, below) >= APART, where


@every_file
def test_every_node_lies_in_one_group(workflow):
    for graph in [workflow, *subgraphs_of(workflow).values()]:
        groups = [group["bounding"] for group in graph["groups"]]
        for node in graph["nodes"] if groups else []:
            left, top, right, bottom = rectangle(node)
            around = [
                (x, y, w, h)
                for x, y, w, h in groups
                if x <= left and y <= top and right <= x + w and bottom <= y + h
            ]
            assert len(around) == 1, f"{node['type']} {node['id']}"
        for (x, _, w, _), (next_x, *_) in zip(groups, groups[1:], strict=False):
            assert next_x - (x + w) >= APART / 2


@pytest.mark.host
def test_the_host_lists_the_workflows(server):
    templates = server.get("/workflow_templates")[FOLDER]
    assert sorted(templates) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        quoted = urllib.parse.quote(path.stem)
        assert server.get(f"/api/workflow_templates/{FOLDER}/{quoted}.json") == read(path)


@pytest.mark.host
def test_the_host_lists_the_blueprint(server):
    try:
        listed = server.get("/global_subgraphs")
    except urllib.error.HTTPError:
        pytest.skip("this host lists no subgraphs")
    ours = {
        key: entry for key, entry in listed.items() if entry["info"]["node_pack"].endswith(FOLDER)
    }
    assert [entry["name"] for entry in ours.values()] == [path.stem for path in BLUEPRINTS]
    (key,) = ours
    assert json.loads(server.get(f"/global_subgraphs/{key}")["data"]) == read(BLUEPRINTS[0])


@pytest.mark.host
@pytest.mark.parametrize("path", FETCHING, ids=lambda path: path.stem)
def test_a_workflow_is_taken_when_the_files_are_there_already(server, path):
    """What it names to be fetched stays a choice once it is there: its second run."""
    prompt = api_prompt(read(path), KNOWN)
    models = [m for node in nodes_of(read(path)) for m in node["properties"].get("models", [])]
    files = [server.base / "models" / model["directory"] / model["name"] for model in models]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    try:
        result = server.run(prompt)  # raises what the host refuses
    finally:
        for file in files:
            file.unlink()
    assert result.error, "the files are empty"
    assert "Load" in result.error["node_type"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_a_picture_of_its_own(path):
    """The template browser shows it; hosts find it by the workflow's name."""
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.size == (512, 512)
        low, high = picture.convert("L").getextrema()
        assert high - low > 100  # neither black nor blank
