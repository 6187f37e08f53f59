"""Default prompts, and how the parts of a prompt are joined."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PromptDefaults:
    """Default prompts of a model.

    prompt: description of the video. positive: description of good image quality, added to the
    prompt. negative: the negative prompt, None for an embedding of zeros.
    caption_dropout: share of the captions that training omits.
    """

    prompt: str
    positive: str
    negative: str | None
    caption_dropout: float = 0.5


DEFAULT_PROMPT = "a good video"
POSITIVE_PROMPT = (
    "Cinematic, High Contrast, highly detailed, taken using a Canon EOS R camera,   hyper detailed "
    "photo - realistic maximum detail, 32k, Color Grading, ultra HD, extreme meticulous detailing, "
    " skin pore detailing, hyper sharpness, perfect without deformations."
)
NEGATIVE_PROMPT = (
    "painting, oil painting, illustration, drawing, art, sketch, oil painting, cartoon, CG Style, "
    "3D render, unreal engine, blurring, dirty, messy, worst quality, low quality, frames, "
    "watermark, signature, jpeg artifacts, deformed, lowres, over-smooth"
)
STAR_PROMPTS = PromptDefaults(
    prompt=DEFAULT_PROMPT, positive=POSITIVE_PROMPT, negative=NEGATIVE_PROMPT
)


def join_prompt(prompt: str, positive: str, separator: str) -> str:
    """Joins a prompt and a positive prompt with a separator; empty parts are left out."""
    return separator.join(part for part in (prompt, positive) if part)
