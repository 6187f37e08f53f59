"""STAR's network as a MODEL of the host, for its samplers, LoRA, previews and offloading."""

from collections.abc import Sequence
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.supported_models_base
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ..star_core.backbones import NetworkConfig, build_network
from ..star_core.checkpoints.quantization import formats_of
from ..star_core.diffusion.levels import trained_schedule
from ..star_core.diffusion.shortcuts import BatchedFeatures, DeepFeatures
from ..star_core.models.attention import in_rows
from ..star_core.models.slicing import Slicing
from ..star_core.models.unet import ControlledVideoUNet, UNetConfig
from ..star_core.planning.cost import Pass, peak_of
from ..star_core.sampling_defaults import SamplingDefaults
from ..star_core.star_checkpoint import ModelFile, load_into
from ..star_core.windows.tiling import Tile
from .host_features import lacking_for, patcher_class

# Of CONDITIONING: raw latents (b c f h w) of the low-quality video, and how far predictions may go
# from them, 0 to 1.
HINT, STRENGTH = "star_hint", "star_strength"
# Of transformer_options: the frames (a range) that the latents at hand are a window of; how the
# network works, arguments of `ControlledVideoUNet.working` and `reuse` of Shortcuts; and the deep
# features of this run, those of a key.
WINDOW, WORK_OPTIONS, DEEP = "star_window", "star_how", "star_deep"

# Solvers of the host need finite noise levels; the schedule ends in pure noise, which is infinite.
# The host stands in this level for it with its own zero-terminal-SNR models.
PURE_NOISE = 4518.0

# Where the host's schedulers end before 0: the level of Stable Diffusion, which its solvers are
# made for. STAR's own, 0.001, is one long step away, and solvers of second order overshoot in it.
LEAST_NOISE = 0.03

WEIGHT_TYPES = {
    "auto": None,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class ModelSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
    """The model's schedule; velocities are converted at the rounded timestep, as STAR does."""

    def __init__(self, sampling: SamplingDefaults) -> None:
        super().__init__()
        self.schedule, noise_level = trained_schedule(sampling), sampling.noise_level
        # The host's schedulers begin at the last of these: where the model wants to begin. From
        # pure noise the host's solvers of second order would blow up.
        self.set_sigmas(self.schedule.log_edm_sigmas[:noise_level].exp().clamp(max=PURE_NOISE))

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[self.timestep(torch.tensor(LEAST_NOISE))]

    def timestep(self, sigma: Tensor) -> Tensor:
        return self.schedule.model_timestep(torch.where(sigma < PURE_NOISE, sigma, torch.inf))

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor):
        t = self.timestep(sigma).reshape(-1)
        return self.schedule.x_0(self.calculate_input(sigma, model_input), model_output, t)

    def noise_scaling(self, sigma, noise: Tensor, latent_image: Tensor, max_denoise=False):
        # Not the host's way at its highest level, which would leave out the latents' share.
        kept = latent_image if sigma < PURE_NOISE else 0 * latent_image
        return super().noise_scaling(sigma, noise, kept)


class HostAttention:
    """The host's attention for the core's layers; `options` are those of the call under way."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return optimized_attention(q, k, v, heads, transformer_options=self.options)

        return in_rows(attend, q, k, v, heads)


class Hosted:
    """What makes one of the core's networks be called as the host calls its own."""

    def __init__(self, config: Any, *, dtype: torch.dtype, device, operations) -> None:
        attention = HostAttention()
        how = {"operations": operations, "attention": attention, "device": device, "dtype": dtype}
        super().__init__(config, **how)  # pyright: ignore[reportCallIssue]
        self.attention = attention
        self.dtype = dtype
        self.slicing = Slicing()

    def forward(
        self,
        x,
        timesteps,
        context=None,
        control=None,
        transformer_options=None,
        hint=None,
        **kwargs,
    ):
        transformer_options = transformer_options or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
        )
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self.velocity, self, wrappers
        ).execute(x, timesteps, context, hint, transformer_options)

    def velocity(self, x, timesteps, context, hint, transformer_options) -> Tensor:
        """v of x (b c f h w), which may be a window of the clip that the hint shows."""
        frames = x.shape[2]
        if (window := transformer_options.get(WINDOW)) is not None and hint.shape[2] != frames:
            hint = hint[:, :, window.start : window.stop]
        # Newer hosts cut the hint themselves, see `resize_cond_for_context_window`.
        window = transformer_options.get("context_window")
        if window is not None and hint.shape[2] != frames:
            hint = window.get_tensor(hint, dim=2)
        override = "optimized_attention_override" in transformer_options
        self.attention.options = transformer_options if override else {}
        how = {"slicing": self.slicing, **transformer_options.get(WORK_OPTIONS, {})}
        deep = None
        if how.pop("reuse", 0) and (prompts := transformer_options.get("uuids")):
            features = features_of(prompts, transformer_options)
            deep = BatchedFeatures(features) if features else None
        try:
            # Clones of a MODEL share this module.
            with self.working(**how):  # pyright: ignore[reportAttributeAccessIssue]
                return super().forward(  # pyright: ignore[reportAttributeAccessIssue]
                    x, timesteps.long(), context, hint, deep=deep
                )
        finally:
            self.attention.options = {}


class HostUNet(Hosted, ControlledVideoUNet):
    pass


def host_network(config: NetworkConfig, **options: Any) -> Any:
    """The network of a size for the host; options: dtype, device, operations."""
    if isinstance(config, UNetConfig):
        return HostUNet(config, **options)
    # Not at the top: diffusers takes seconds to import, and most graphs do without.
    from ..star_core.models.cogvideox_dit import CogVideoXDiT

    class HostDiT(Hosted, CogVideoXDiT):
        pass

    return HostDiT(config, **options)


def features_of(prompts: Sequence[Any], options: dict[str, Any]) -> list[DeepFeatures]:
    """Of each prompt, named by the host, for the window of a call's transformer_options."""
    features = options.get(DEEP)
    if features is None:  # no run that could keep any
        return []
    context = options.get("context_window")
    window = (options.get(WINDOW), context and tuple(context.index_list))
    return [features((prompt, window)) for prompt in prompts]


class StarBaseModel(comfy.model_base.BaseModel):
    """What the host samples; `star` says how the model wants to be used."""

    def __init__(
        self, config: "StarConfig", star: ModelFile, device: torch.device | str = "meta"
    ) -> None:
        v_prediction = comfy.model_base.ModelType.V_PREDICTION
        super().__init__(config, v_prediction, device=device, unet_model=host_network)
        self.model_sampling = ModelSampling(star.sampling)
        self.star = star
        self.how: dict[str, Any] = {}  # HOW of the run under way

    def extra_conds(self, **kwargs) -> dict[str, Any]:
        hint, noise = kwargs.get(HINT), kwargs["noise"]
        if hint is None:
            raise ValueError(
                "the conditioning of this STAR model holds no low-quality video: pass positive "
                "and negative through STAR Conditioning, and take both from it"
            )
        if hint.shape[1:] != noise.shape[1:]:
            raise ValueError(
                f"the latents to sample are {list(noise.shape)}, the low-quality video of STAR "
                f"Conditioning is {list(hint.shape)}, [batch, channels, frames, height, width]: "
                "take the LATENT from the same STAR Conditioning, or one of the same size"
            )
        hint = comfy.conds.CONDNoiseShape(self.process_latent_in(hint))
        strength = comfy.conds.CONDConstant(kwargs.get(STRENGTH, 1.0))
        return super().extra_conds(**kwargs) | {"hint": hint, "strength": strength}

    def resize_cond_for_context_window(
        self, cond_key, cond_value, window, x_in, device, retain_index_list=()
    ):
        """What of a condition belongs to a window of the host; None for what the host does itself.

        The host goes by sizes: it would cut text with as many channels as the clip has frames.
        """
        return cond_value if cond_key == "c_crossattn" else None

    def memory_required(self, input_shape, cond_shapes=None) -> float:
        """Bytes of activations for latents (b c f h w), all frames at once."""
        dtype = self.manual_cast_dtype or self.get_dtype()
        how = {name: self.how[name] for name in ("slicing", "tile") if name in self.how}
        return activations(self.star.config, input_shape, dtype, **how)


def hold_back(args: dict[str, Any]) -> Tensor:
    """A guided prediction, which stays near the low-quality latents as the conditioning asks.

    After guidance, as in the core: before it, the rescaling of guidance would see other contrasts.
    """
    x_0, conds = args["denoised"], args["cond"][0]["model_conds"]
    if (strength := conds["strength"].cond) == 1:
        return x_0
    hint = conds["hint"].cond.to(x_0)
    if (window := args["model_options"]["transformer_options"].get(WINDOW)) is not None:
        hint = hint[:, :, window.start : window.stop]
    return torch.lerp(hint, x_0, strength)


def activations(
    config: NetworkConfig,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    slicing: Slicing | None = None,
    tile: Tile | None = None,
) -> float:
    """Bytes of a forward pass in slices, for latents (b c f h w) or their tiles.

    Those of all tensors, asked of the network itself, and a tenth more for what libraries take.
    """
    b, _, *sides = shape
    f, h, w = sides if len(sides) == 3 else (1, *sides)
    h, w = (max(map(len, side)) for side in config.tiles((h, w), tile))
    forward = Pass(config=config, dtype=dtype, frames=f, height=h, width=w, batch=b)
    return 1.1 * peak_of(forward, slicing or Slicing()).device


class StarConfig(comfy.supported_models_base.BASE):
    """What the host asks about a model before it builds it."""

    unet_extra_config = {}

    def __init__(self, star: ModelFile) -> None:
        super().__init__({"config": star.config})
        self.latent_format = latent_format(star)


def latent_format(star: ModelFile) -> comfy.latent_formats.LatentFormat:
    """Five-dimensional latents with the model's scale and previews."""
    format = comfy.latent_formats.SD15(star.latents.scale)
    format.latent_channels = star.config.in_dim
    format.latent_dimensions = 3
    if format.latent_channels != 4:
        format.latent_rgb_factors = None
    if star.latents.rgb is not None:
        format.latent_rgb_factors = [list(row) for row in star.latents.rgb]
    format.taesd_decoder_name = None  # it takes pictures, not videos
    return format


def load_patcher(
    star: ModelFile, weight_type: str = "auto", disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """The MODEL of an open file, which the host can make anew, for a second device for example.

    weight_type: a key of `WEIGHT_TYPES`. disable_dynamic: without the host's dynamic VRAM.
    """
    if weight_type not in WEIGHT_TYPES:
        raise ValueError(f"unknown weight type {weight_type!r}: use {', '.join(WEIGHT_TYPES)}")
    config = StarConfig(star)
    parameters = sum(tensor.numel() for tensor in star.tensors.values())
    device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    types = config.supported_inference_dtypes
    dtype = WEIGHT_TYPES[weight_type]
    packed = dtype is None and is_quantized(star)
    if dtype is None:
        kept = next(tensor.dtype for tensor in star.tensors.values())
        dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=types, weight_dtype=kept)
    if packed:
        config.quant_config = {"mixed_ops": True}  # what the host sets; the rest is in the layers
    config.set_inference_dtype(dtype, mm.unet_manual_cast(None if packed else dtype, device, types))
    # The host's quantised layers put what they load where they were made.
    model = StarBaseModel(config, star, offload_device if packed else "meta")
    load_into(
        model.diffusion_model,
        star.tensors,
        # Of plain layers: where weights are streamed from the disk, the host's have none as yet.
        wanted=build_network(star.config, device="meta").state_dict(),
        device=offload_device,
        dtype=dtype,
        packed=packed,
        name=str(star.path),
    )
    model.eval().requires_grad_(False)
    model.device = offload_device
    patcher = patcher_class(disable_dynamic)(
        model, load_device=device, offload_device=offload_device
    )
    patcher.set_model_sampler_post_cfg_function(hold_back)
    patcher.cached_patcher_init = (load_patcher, (star, weight_type))
    return patcher


def is_quantized(star: ModelFile) -> bool:
    """Whether a file's weights are. ValueError if they are and this host does not take them."""
    formats = formats_of(star.tensors)
    if lacking := lacking_for(formats):
        raise ValueError(
            f"{star.path} is quantised, and {lacking}; or choose weight_dtype fp16, which unpacks "
            "the weights"
        )
    return bool(formats)


def star_of(model: comfy.model_patcher.ModelPatcher) -> ModelFile:
    """What a MODEL's file says; ValueError if the MODEL is not STAR's."""
    # By name: a second copy of this pack has classes of its own, and its models serve as well.
    network = getattr(model, "model", model)
    star = getattr(network, "star", None)
    if star is None:
        raise ValueError(
            f"the MODEL is a {type(network).__name__}, not STAR's: connect STAR Load Model"
        )
    return star


def network_of(model: comfy.model_patcher.ModelPatcher) -> tuple[NetworkConfig, torch.dtype]:
    """The size of a MODEL's network and what it computes in; ValueError if it is another's."""
    config, network = star_of(model).config, model.model
    return config, network.manual_cast_dtype or network.get_dtype()
