"""Writes docs/cli.md from the parsers of the command line: `python -m tests.cli_page`."""

import argparse
from collections.abc import Iterator

from star_core.cli import parser
from tests.paths import ROOT

PAGE = ROOT / "docs" / "cli.md"
HEAD = """# Command line

`star-vsr COMMAND` where the package is installed, `python -m star_core COMMAND` in a checkout.
`COMMAND --help` prints what stands here, which `python -m tests.cli_page` writes from the program
itself.

A command returns 0 on success, 2 for what its user can correct, and 130 after Ctrl-C.
"""


def page() -> str:
    """The text of docs/cli.md."""
    return "\n".join([HEAD, *(line for command in _commands() for line in command)])


def _commands() -> Iterator[list[str]]:
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        lines = [f"## {name}", "", command.description or "", ""]
        for group in command._action_groups:
            actions = [a for a in group._group_actions if "-h" not in a.option_strings]
            if not actions:
                continue
            if group.title not in ("positional arguments", "options"):
                lines += [f"{group.title or ''}".capitalize() + ":", ""]
            lines += ["| argument | |", "| --- | --- |", *map(_row, actions), ""]
        yield lines


def _row(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings)
    if action.nargs == 0:
        value = ""
    elif action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    elif isinstance(action.metavar, tuple):
        value = " ".join(action.metavar)
    else:
        value = action.metavar or action.dest.upper()
    if action.nargs in ("*", "+") and not isinstance(action.metavar, tuple):
        value += " ..."
    words = (action.help or "").replace("%%", "%").replace("|", "\\|")
    return f"| `{f'{name} {value}'.strip()}` | {words} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
