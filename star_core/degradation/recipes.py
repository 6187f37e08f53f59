"""Recipes of degradation: STAR's two stages, those of the evaluation, and those of training."""

from .compression import VideoCodec
from .ops import ResizeMode
from .pipeline import Blur, Codec, Jpeg, Kernels, Noise, OneOf, Range, Recipe, Resize, Sinc, Stage

_ALIKE: dict[ResizeMode, float] = {"area": 1.0, "bilinear": 1.0, "bicubic": 1.0}
_FRAME_BITS: Range = (10_000, 100_000)
_JPEG = Jpeg(quality=(30, 95))
_NOISE_1 = Noise(sigma=(1 / 255, 30 / 255), scale=(0.05, 3), poisson=0.5, grey=0.4)
_NOISE_2 = Noise(sigma=(1 / 255, 25 / 255), scale=(0.05, 2.5), poisson=0.5, grey=0.4)
_SMALL = Resize(scale=1 / 4, modes=_ALIKE)


def _two_stages(name: str, codec: OneOf, *, reference: bool) -> Recipe:
    """Returns Real-ESRGAN's recipe with video codecs; specification of STAR, section 11."""
    return Recipe(
        name=name,
        sharpen=True,
        drift=0.0 if reference else 0.1,
        per_frame=reference,
        stages=(
            Kernels(sigma=(0.2, 3)),
            Resize(scale=1, modes=_ALIKE, up=(0.2, (1, 1.5)), down=(0.7, (0.15, 1)), of_now=True),
            _NOISE_1,
            _JPEG,
            codec,
            Kernels(sigma=(0.2, 1.5), probability=0.8),
            Resize(
                scale=1 / 4,
                modes=_ALIKE,
                up=(0.3, (1, 1.2)),
                down=(0.4, (0.3, 1)),
                reference_width=reference,
            ),
            _NOISE_2,
            OneOf((0.5, 0.5), ((_SMALL, Sinc(), _JPEG), (_JPEG, _SMALL, Sinc()))),
            codec,
        ),
    )


def _codecs(*names: VideoCodec, weights: tuple[float, ...]) -> OneOf:
    return OneOf(weights, tuple((Codec(codec=name, frame_bits=_FRAME_BITS),) for name in names))


STAR_HEAVY = _two_stages(
    "heavy", _codecs("libx264", "libx265", "mpeg4", weights=(1, 1, 1)), reference=False
)
# As in the released code: every frame has parameters of its own, and the second resize distorts.
STAR_REFERENCE = _two_stages(
    "reference", _codecs("libx264", "mpeg4", weights=(2, 1)), reference=True
)
# The recipe of the light model was not released; these ranges are this project's.
STAR_LIGHT = Recipe(
    name="light",
    drift=0.1,
    stages=(
        Kernels(sigma=(0.2, 1.2), size=(7, 13), probability=0.8),
        _SMALL,
        Noise(sigma=(0, 8 / 255), scale=(0.05, 0.8), poisson=0.5, grey=0.4),
        OneOf(
            (1, 1, 1, 1),
            (
                (Jpeg(quality=(70, 95)),),
                (Codec(codec="libx264", quality=(18, 28)),),
                (Codec(codec="libx265", quality=(20, 30)),),
                (Codec(codec="mpeg4", quality=(2, 5)),),
            ),
        ),
    ),
)


def _fixed(name: str, sigma: float, noise: float, quality: float, scale: int) -> Recipe:
    """Returns a recipe without random parameters; sigma: of the blur, in degraded pixels."""
    return Recipe(
        name=name,
        stages=(
            Blur(sigma=(sigma * scale, sigma * scale)),
            Resize(scale=1 / scale, modes={"area": 1}),
            Noise(sigma=(noise / 255, noise / 255)),
            Jpeg(quality=(quality, quality)),
        ),
    )


def mild(scale: int) -> Recipe:
    """Returns the evaluation's mild recipe for a scale: little blur and noise, JPEG 60."""
    return _fixed("fixed-mild", 0.25, 4, 60, scale)


def heavy(scale: int) -> Recipe:
    """Returns the evaluation's heavy recipe for a scale: much blur and noise, JPEG 30."""
    return _fixed("fixed-heavy", 0.4, 12, 30, scale)


MILD, HEAVY = mild(4), heavy(4)

COMPRESSION = Recipe(
    name="compression",
    stages=(
        Resize(scale=1 / 4, modes={"area": 1}),
        Codec(codec="libx264", quality=(30, 30)),
    ),
)

# The built-in model's training data: ranges that include mild and heavy.
_X264 = Codec(codec="libx264", quality=(20, 36), preset="veryfast")
_MPEG4 = Codec(codec="mpeg4", quality=(2, 12))
_COMPRESSED = (
    (Jpeg(quality=(20, 95)),),
    (_X264,),
    (_MPEG4,),
    (Jpeg(quality=(60, 95)), _X264),
    (Jpeg(quality=(60, 95)), _MPEG4),
)


def _training(name: str, scale: int, *, intact: float) -> Recipe:
    """Returns a training recipe; intact: the probability of leaving out each kind of stage."""

    def mostly(*stages: Stage) -> OneOf:
        return OneOf((intact, 1 - intact), ((), stages))

    return Recipe(
        name=name,
        drift=0.1,
        stages=(
            mostly(Blur(sigma=(0.2, max(0.55 * scale, 1.0)), anisotropic=0.3)),
            Resize(scale=1 / scale, modes={"area": 0.7, "bicubic": 0.15, "bilinear": 0.15}),
            mostly(Noise(sigma=(0, 18 / 255), scale=(0, 1.6), poisson=0.25, grey=0.3)),
            OneOf(
                (intact, *((1 - intact) * share for share in (0.75, *4 * (0.0625,)))),
                ((), *_COMPRESSED),
            ),
        ),
    )


TRAINING = _training("training", 4, intact=0.0)
# At lower scales many inputs are good already and must not be changed.
TRAINING_OF_SCALE = {
    4: TRAINING,
    **{scale: _training(f"training-{scale}", scale, intact=0.3) for scale in (1, 2, 3)},
}

# The recipes by the names that users give.
PRESETS = {
    recipe.name: recipe
    for recipe in (STAR_LIGHT, STAR_HEAVY, STAR_REFERENCE, MILD, HEAVY, COMPRESSION, TRAINING)
}
