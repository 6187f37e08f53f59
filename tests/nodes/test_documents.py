"""Help pages and translations agree with the nodes, and the host serves them."""

import json
import re

import pytest

from tests.nodes.pages import DOCS, as_it_must_be, page_of, written
from tests.nodes.recorder import PACK, recorded_nodes
from tests.nodes.server import FOLDER
from tests.nodes.workflow import read

NODES = recorded_nodes()
every_node = pytest.mark.parametrize("node", NODES, ids=lambda node: node.id)
LANGUAGES = sorted(path.name for path in (PACK / "locales").iterdir() if path.is_dir())
every_language = pytest.mark.parametrize("language", LANGUAGES)


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


@pytest.mark.host
def test_the_host_serves_help_and_translations(server):
    for node in NODES:
        assert server.fetch(f"/extensions/{FOLDER}/docs/{node.id}.md")
    served = server.get("/i18n")
    for language in LANGUAGES:
        assert {node.id for node in NODES} <= served[language]["nodeDefs"].keys()
