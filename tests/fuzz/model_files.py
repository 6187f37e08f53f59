"""Opens damaged model files: each must load, or be refused in one line.

    python -m tests.fuzz.model_files [COUNT] [SEED]

Prints every file that ends otherwise, with its mutation, and returns 1 if there is one.
"""

import json
import random
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from star_core.file_info import describe
from star_core.model import BUILT_IN
from star_core.star_checkpoint import load_model
from star_core.vae.load import load_vae

SECONDS = 60
ODD = (None, True, 0, -1, 3, 10**9, 0.5, "", "x", [], [0], {}, {"a": 1}, [[1]], float("inf"))


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def changed(draw: random.Random, tree: Any) -> Any:
    """A JSON tree of which one branch is replaced, removed or renamed."""
    if isinstance(tree, dict) and tree and draw.random() < 0.9:
        key = draw.choice(list(tree))
        others = {name: value for name, value in tree.items() if name != key}
        kind = draw.random()
        if kind < 0.1:
            return others
        if kind < 0.2:
            return others | {f"{key}x": tree[key]}
        return tree | {key: changed(draw, tree[key])}
    if isinstance(tree, list) and tree and draw.random() < 0.7:
        index = draw.randrange(len(tree))
        return [*tree[:index], changed(draw, tree[index]), *tree[index + 1 :]]
    return draw.choice(ODD)


def of_metadata(draw: random.Random, data: bytes) -> bytes:
    header, rest = split(data)
    metadata = header["__metadata__"]
    key = draw.choice([name for name in metadata if metadata[name].startswith("{")])
    metadata[key] = json.dumps(changed(draw, json.loads(metadata[key])))
    return joined(header, rest)


def of_header(draw: random.Random, data: bytes) -> bytes:
    header, rest = split(data)
    return joined(changed(draw, header), rest)


def of_bytes(draw: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.randrange(1, 20)):
        damaged[draw.randrange(min(len(data), 20000))] = draw.randrange(256)
    return bytes(damaged)


def of_length(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data))]


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    of_metadata,
    of_metadata,
    of_header,
    of_bytes,
    of_length,
)


def fault_of(path: Path, load: Callable[[Path], object]) -> str | None:
    """Why a file neither loads nor is refused in one line; None if it does."""

    def too_late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(SECONDS)
    try:
        for step in (describe, load):
            step(path)
    except (ValueError, OSError) as error:
        if "\n" in str(error).strip():
            return f"several lines: {error}"
    except BaseException:
        return traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
    return None


def main(count: int = 300, seed: int = 0) -> int:
    torch.set_num_threads(1)
    loads = (lambda path: load_model(path, dtype=torch.float32), load_vae)
    whole = [path.read_bytes() for path in BUILT_IN["tiny"]]
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            which, mutation = draw.randrange(2), draw.choice(MUTATIONS)
            path.write_bytes(mutation(draw, whole[which]))
            if fault := fault_of(path, loads[which]):
                faults += 1
                print(f"{number}: {mutation.__name__} of {BUILT_IN['tiny'][which].name}\n{fault}")
    print(f"{count} files, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
