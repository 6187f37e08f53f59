"""Makes the pictures of the workflows anew: left before, right after, square.

    COMFYUI_DIR=/path/to/ComfyUI python -m tests.nodes.pictures [NAME ...]

Each workflow runs as it is shipped, but for two frames of the clip that comes with the pack, and
with the built-in model, so that nothing is fetched. Without names, all of them are made.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.nodes.server import Prompt, Server
from tests.nodes.workflow import WORKFLOWS, api_prompt, definitions, read

SIDE = 512  # pixels of the picture; template browsers show about 260
# Frames, and left edges of the part that is shown, one after the other: no two look alike.
STARTS, LEFTS = (0, 14, 8, 20, 4, 18), (96, 288, 192, 32, 256, 144, 224)
LINE = 3

# What stands in where something would be fetched or loaded, by class: new values, or a new node.
BUILT_IN = {
    "STAR_LoadModel": {"model_name": "tiny (built in)", "vae_name": "auto", "text_encoder": "auto"},
    "CFGGuider": {"cfg": 1.0},
    "STAR_ColorFix": {"method": "none"},
    "STAR_Sampling": {"noise_level": -1},
}
SOURCES = {"GetVideoComponents", "VHS_LoadVideo", "VAEDecode", "STAR_DemoClip"}


def clip(start: int, **values: Any) -> dict[str, Any]:
    return {"class_type": "STAR_DemoClip", "inputs": {**values, "start": start, "frames": 2}}


def prepared(prompt: Prompt, start: int) -> Prompt:
    """The prompt with the clip and the model that need nothing."""
    result = {}
    for name, node in prompt.items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "STAR_DemoClip":
            result[name] = clip(start, clip=inputs["clip"])
        elif kind in SOURCES:
            result[name] = clip(start, clip="degraded")
        elif kind == "LoadVideo":
            result[f"{name} frames"] = clip(start, clip="degraded")
            frames = {"images": [f"{name} frames", 0], "fps": 30.0}
            result[name] = {"class_type": "CreateVideo", "inputs": frames}
        else:
            result[name] = {"class_type": kind, "inputs": inputs | BUILT_IN.get(kind, {})}
    return result


def pair(prompt: Prompt) -> tuple[list[Any], list[Any]]:
    """The outputs that show before and after; to the prompt is added what makes frames of them."""
    kinds = {node["class_type"]: name for name, node in reversed(prompt.items())}
    if name := kinds.get("STAR_Compare"):
        inputs = prompt[name]["inputs"]
        return inputs["before"], inputs["after"]
    if name := kinds.get("STAR_Metrics"):
        inputs = prompt[name]["inputs"]
        return inputs["images_b"], inputs["images"]
    name = kinds["STAR_RestoreVideo"]
    for end, video in ("before", prompt[name]["inputs"]["video"]), ("after", [name, 0]):
        prompt[end] = {"class_type": "GetVideoComponents", "inputs": {"video": video}}
    return ["before", 0], ["after", 0]


def needed(prompt: Prompt, outputs: list[str]) -> Prompt:
    """The part of a prompt that these nodes depend on."""
    rest, found = [*outputs], {}
    while rest:
        name = rest.pop()
        if name not in found:
            found[name] = prompt[name]
            rest += [v[0] for v in prompt[name]["inputs"].values() if isinstance(v, list)]
    return found


def halves(before: Any, after: Any, left: int) -> Any:
    """One picture of two (h w c): the same square of both, left and right of a line."""
    from PIL import Image, ImageDraw  # pyright: ignore[reportMissingImports]

    width, height = after.shape[1], after.shape[0]
    left = min(left, width - height)
    one, other = (
        Image.fromarray(frame)
        .resize((width, height), Image.Resampling.BICUBIC)
        .crop((left, 0, left + height, height))
        .resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        for frame in (before, after)
    )
    one.paste(other.crop((SIDE // 2, 0, SIDE, SIDE)), (SIDE // 2, 0))
    middle = SIDE // 2
    ImageDraw.Draw(one).rectangle((middle - LINE, 0, middle + LINE - 1, SIDE), fill="white")
    return one


def main(names: list[str]) -> None:
    known = definitions()
    with tempfile.TemporaryDirectory() as base, Server(Path(base)) as server:
        for place, path in enumerate(WORKFLOWS):
            if names and path.stem not in names:
                continue
            prompt = prepared(api_prompt(read(path), known), STARTS[place % len(STARTS)])
            shown = dict(zip(("left", "right"), pair(prompt), strict=True))
            for side, images in shown.items():
                prompt[side] = {"class_type": "PreviewImage", "inputs": {"images": images}}
            result = server.run(needed(prompt, [*shown]))
            if result.error:
                raise RuntimeError(f"{path.stem}: {result.error['exception_message']}")
            left, right = (server.image(result.outputs[side]["images"][0]) for side in shown)
            picture = halves(left, right, LEFTS[place % len(LEFTS)])
            picture.save(path.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main(sys.argv[1:])
