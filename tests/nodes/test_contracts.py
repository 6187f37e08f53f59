"""What every node promises, read from its recorded schema: no host is needed."""

import inspect
import re
from collections import Counter

import pytest

from tests.nodes.recorder import PACK, arguments, object_info, recorded_nodes

NODES = recorded_nodes()
every_node = pytest.mark.parametrize("node", NODES, ids=lambda node: node.id)


def inputs_of(node):
    return node.schema.inputs or []


def keywords(function):
    """The arguments that have to be named."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def is_socket(i):
    return i.io_type not in {"BOOLEAN", "INT", "FLOAT", "STRING", "COMBO"}


def test_the_list_has_every_node_that_is_written():
    """One that cannot be imported is left out there, with a word in the log."""
    sources = [path.read_text(encoding="utf-8") for path in (PACK / "nodes").glob("*.py")]
    written = re.findall(r"^class (\w+)\(io\.ComfyNode\)", "\n".join(sources), re.MULTILINE)
    assert sorted(node.cls.__name__ for node in NODES) == sorted(written)


def test_ids_of_nodes_are_unique():
    assert not [name for name, count in Counter(node.id for node in NODES).items() if count > 1]


@every_node
def test_a_node_is_found_under_star_and_explains_itself(node):
    assert re.fullmatch(r"STAR_[A-Za-z]+", node.id)
    assert re.fullmatch(r"STAR/[a-z]+", node.schema.category)
    assert node.schema.display_name.startswith("STAR ")
    assert node.schema.description
    assert node.schema.search_aliases


@every_node
def test_every_input_and_output_has_a_tooltip_in_sentences(node):
    texts = {i.id: i.tooltip for i in [*inputs_of(node), *(node.schema.outputs or [])]}
    assert all(texts.values()), texts
    assert not [t for t in texts.values() if not t.endswith(".") or t.startswith("Of ")]


@every_node
def test_the_default_of_the_model_file_is_written_in_one_way(node):
    """-1 in numbers, auto in choices, and nothing else."""
    for name, (kind, options) in [*object_info(node)["input"]["required"].items()] + [
        *object_info(node)["input"]["optional"].items()
    ]:
        if "the model's default" in options["tooltip"]:
            value = "auto" if kind == "COMBO" else -1
            assert options["default"] == value == options.get("min", value), name
            assert options["tooltip"].endswith(f" {value}: the model's default."), name
            assert value in options.get("options", [value])


@every_node
def test_inputs_for_experts_come_last(node):
    """Sockets may be left open, what has a widget may not, so that both are in one order."""
    widgets = [i for i in inputs_of(node) if not is_socket(i)]
    experts = [bool(i.extra_dict.get("advanced")) for i in widgets]
    assert experts == sorted(experts)
    assert not [i.id for i in widgets if i.optional]


@every_node
def test_execute_takes_the_inputs_and_nothing_else(node):
    """An optional input without a link is not passed, so it needs a default."""
    expected = {i.id: bool(i.optional) for i in inputs_of(node)}
    taken = arguments(node.cls.execute)
    if taken.pop("settings", None) is not None:  # `**settings` of the nodes that do everything
        passed_on = node.cls.execute.__globals__["settings_for"]
        taken |= {name: False for name in keywords(passed_on)}
    assert taken.keys() == expected.keys()
    without = {name for name, default in taken.items() if not default}
    assert not {name for name, optional in expected.items() if optional} & without


@every_node
def test_ids_within_a_node_are_unique(node):
    """The host refuses an output that is called like an input."""
    ids = [i.id for i in inputs_of(node)] + [o.id for o in node.schema.outputs or [] if o.id]
    assert len(ids) == len(set(ids))


@every_node
def test_defaults_are_legal(node):
    for kind in object_info(node)["input"].values():
        for name, (_, options) in kind.items():
            if (default := options.get("default")) is not None:
                assert default in options.get("options", [default]), name
                if isinstance(default, int | float):
                    assert options.get("min", default) <= default <= options.get("max", default)


@every_node
@pytest.mark.parametrize("hook", ["validate_inputs", "fingerprint_inputs", "check_lazy_status"])
def test_hooks_name_inputs_one_by_one(node, hook):
    """With `**kwargs` in validate_inputs the host would skip every check of its own."""
    names = arguments(getattr(node.cls, hook)) if hasattr(node.cls, hook) else {}
    assert names.keys() <= {i.id for i in inputs_of(node)}
