"""Help pages of the nodes: inputs and outputs come from the schema, the rest is written by hand.

After a change to a schema run `python -m tests.nodes.pages`.
"""

from pathlib import Path

from tests.nodes.recorder import Node, recorded_nodes
from tests.nodes.server import ROOT

DOCS = ROOT / "web" / "docs"
INPUTS, WHEN = "\n## Inputs\n", "\n## When to change it\n"


def page_of(node: Node) -> Path:
    return DOCS / f"{node.id}.md"


def written(page: str) -> tuple[str, str]:
    """The parts of a page that are written by hand: what the node does, and when to change it."""
    head, _, rest = page.partition(INPUTS)
    about = head.split("\n\n")[2:]  # after title and description
    return "\n\n".join(about).strip(), rest.partition(WHEN)[2].strip()


def page(node: Node, about: str, when: str) -> str:
    """The page as it must be, with these parts that are written by hand."""
    schema = node.schema
    inputs = [
        f"- `{i.id}`{' (optional)' if i.optional else ''}: {i.tooltip}" for i in schema.inputs or []
    ]
    outputs = [f"- `{o.display_name or o.io_type}`: {o.tooltip}" for o in schema.outputs or []]
    parts = [f"# {schema.display_name}", schema.description, about]
    parts += ["## Inputs", "\n".join(inputs), "## Outputs", "\n".join(outputs)]
    parts += ["## When to change it", when]
    return "\n\n".join(filter(None, parts)) + "\n"


def as_it_must_be(node: Node) -> str:
    path = page_of(node)
    return page(node, *written(path.read_text(encoding="utf-8") if path.exists() else ""))


if __name__ == "__main__":
    for node in recorded_nodes():
        page_of(node).write_text(as_it_must_be(node), encoding="utf-8")
