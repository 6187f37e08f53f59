"""Help pages, translations and workflows agree with the nodes. No host is needed."""

import json
import re

import pytest

from tests.nodes.pages import DOCS, as_it_must_be, page_of, written
from tests.nodes.recorder import PACK, recorded_nodes
from tests.nodes.server import FOLDER
from tests.nodes.workflow import (
    MODEL_FILES,
    NOTES,
    WORKFLOWS,
    api_prompt,
    definitions,
    inputs_of,
    nodes_of,
    read,
    values_of,
)

NODES = recorded_nodes()
KNOWN = definitions()
every_node = pytest.mark.parametrize("node", NODES, ids=lambda node: node.id)
LANGUAGES = sorted(path.name for path in (PACK / "locales").iterdir() if path.is_dir())
every_language = pytest.mark.parametrize("language", LANGUAGES)


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request):
    return read(request.param)


@every_node
def test_the_help_page_of_a_node_says_what_its_schema_says(node):
    """`python -m tests.nodes.pages` writes that part."""
    page = page_of(node).read_text(encoding="utf-8")
    assert page == as_it_must_be(node)
    assert written(page)[1], "a word on when to change something is missing"


def test_there_is_no_help_page_without_a_node():
    """`<node>.md`, or `<node>/<language>.md`."""
    pages = {path.relative_to(DOCS).parts[0].removesuffix(".md") for path in DOCS.rglob("*.md")}
    assert pages <= {node.id for node in NODES}


@every_language
def test_the_translation_covers_every_node_and_no_other(language):
    texts = read(PACK / "locales" / language / "nodeDefs.json")
    assert texts.keys() == {node.id for node in NODES}


@every_language
@every_node
def test_the_translation_covers_a_nodes_inputs_and_outputs_and_no_others(node, language):
    texts = read(PACK / "locales" / language / "nodeDefs.json")[node.id]
    inputs = [i.id for i in node.schema.inputs or []]
    outputs = [str(place) for place in range(len(node.schema.outputs or []))]
    assert texts["display_name"] and texts["description"]
    assert list(texts.get("inputs", {})) == inputs
    assert list(texts.get("outputs", {})) == outputs
    assert all(text["name"] and text["tooltip"] for text in texts.get("inputs", {}).values())
    assert all(text["name"] and text["tooltip"] for text in texts.get("outputs", {}).values())


def test_the_chinese_texts_are_chinese():
    texts = json.dumps(read(PACK / "locales" / "zh" / "nodeDefs.json"), ensure_ascii=False)
    tooltips = re.findall(r'"(?:tooltip|description)": "((?:[^"\\]|\\.)*)"', texts)
    assert tooltips and all(re.search(r"[\u4e00-\u9fff]", tooltip) for tooltip in tooltips)


def test_there_are_workflows_and_each_has_a_picture():
    assert WORKFLOWS
    assert not [path.name for path in WORKFLOWS if not path.with_suffix(".jpg").exists()]


def test_every_node_is_used_in_a_workflow():
    used = {node["type"] for path in WORKFLOWS for node in nodes_of(read(path))}
    assert {node.id for node in NODES} <= used


def test_nodes_of_a_workflow_exist_and_are_switched_on(workflow):
    assert not {node["type"] for node in nodes_of(workflow)} - KNOWN.keys()
    assert not [node["id"] for node in workflow["nodes"] if node.get("mode", 0)]
    ids = [node["id"] for node in workflow["nodes"]]
    assert len(ids) == len(set(ids))


def test_a_workflow_has_notes(workflow):
    assert [node for node in workflow["nodes"] if node["type"] in NOTES]


def test_links_of_a_workflow_join_slots_that_exist_and_fit(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    into = {(n["id"], s["link"]) for n in nodes.values() for s in n.get("inputs", [])}
    out_of = {
        (n["id"], slot, link)
        for n in nodes.values()
        for slot, output in enumerate(n.get("outputs", []))
        for link in output.get("links") or []
    }
    for link, source, slot, target, place, kind in workflow["links"]:
        entry = nodes[target]["inputs"][place]
        given = KNOWN[nodes[source]["type"]]["output"][slot]
        taken, *_ = inputs_of(KNOWN[nodes[target]["type"]])[entry["name"]]
        given = "COMBO" if isinstance(given, list) else given
        assert kind == given and (taken == "*" or given in taken.split(",")), f"link {link}"
        assert entry["link"] == link and (source, slot, link) in out_of, f"link {link}"
    links = {link[0] for link in workflow["links"]}
    assert len(links) == len(workflow["links"])
    assert {link for _, link in into if link is not None} == links
    assert {link for *_, link in out_of} == links


def test_inputs_of_a_workflow_exist_and_the_required_ones_are_given(workflow):
    for node in api_prompt(workflow, KNOWN).values():
        inputs = inputs_of(KNOWN[node["class_type"]])
        needed = {name for name, (_, _, required) in inputs.items() if required}
        assert needed <= node["inputs"].keys() <= inputs.keys(), node["class_type"]


def test_slots_of_a_workflow_carry_the_names_of_the_nodes(workflow):
    for node in nodes_of(workflow):
        known = KNOWN[node["type"]]
        uploads = {"upload"}  # the button of LoadImage and LoadVideo
        assert {slot["name"] for slot in node.get("inputs", [])} <= inputs_of(
            known
        ).keys() | uploads
        outputs = [slot["name"] for slot in node.get("outputs", [])]
        assert outputs == known["output_name"], node["type"]


def test_values_of_a_workflow_are_legal(workflow):
    """The server checks numbers, but not choices of nodes like ours."""
    for node in nodes_of(workflow):
        inputs = inputs_of(KNOWN[node["type"]])
        for name, value in values_of(node, KNOWN[node["type"]]).items():
            kind, options, _ = inputs[name]
            where = f"{node['type']} {node['id']}: {name} = {value!r}"
            if kind == "COMBO":
                uploaded = any(key.endswith("_upload") for key in options)
                own_file = str(value).endswith(MODEL_FILES) and not node["type"].startswith("STAR_")
                legal = {value, f"{value} (download)"} & set(options["options"])
                assert uploaded or own_file or legal, where
            elif kind == "BOOLEAN":
                assert isinstance(value, bool), where
            elif kind == "STRING":
                assert isinstance(value, str), where
            else:
                whole = int if kind == "INT" else (int, float)
                assert isinstance(value, whole) and not isinstance(value, bool), where
                assert options.get("min", value) <= value <= options.get("max", value), where


@pytest.mark.host
def test_the_host_serves_help_translations_and_templates(server):
    for node in NODES:
        assert server.fetch(f"/extensions/{FOLDER}/docs/{node.id}.md")
    served = server.get("/i18n")
    for language in LANGUAGES:
        assert {node.id for node in NODES} <= served[language]["nodeDefs"].keys()
    templates = server.get("/workflow_templates")[FOLDER]
    assert sorted(templates) == sorted(path.stem for path in WORKFLOWS)
