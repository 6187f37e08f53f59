"""What every node promises, read from its recorded schema: no host is needed."""

import re
from collections import Counter

import pytest

from tests.nodes.recorder import PACK, arguments, object_info, recorded_nodes

NODES = recorded_nodes()
every_node = pytest.mark.parametrize("node", NODES, ids=lambda node: node.id)


def inputs_of(node):
    return node.schema.inputs or []


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
    assert node.schema.category == "STAR"
    assert node.schema.display_name.startswith("STAR ")
    assert node.schema.description


@every_node
def test_every_input_has_a_tooltip(node):
    assert not [i.id for i in inputs_of(node) if not i.tooltip]


@every_node
def test_execute_takes_the_inputs_and_nothing_else(node):
    """An optional input without a link is not passed, so it needs a default."""
    expected = {i.id: bool(i.optional) for i in inputs_of(node)}
    assert arguments(node.cls.execute).keys() == expected.keys()
    without = {name for name, default in arguments(node.cls.execute).items() if not default}
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
