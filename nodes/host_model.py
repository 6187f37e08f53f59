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
from ..star_core.checkpoints.tensors import load_into
from ..star_core.diffusion.levels import trained_schedule
from ..star_core.diffusion.shortcuts import BatchedFeatures, DeepFeatures
from ..star_core.lora import SETTINGS, SETTINGS_SIZE, read_settings, with_loras
from ..star_core.models.attention import in_rows
from ..star_core.models.slicing import Slicing
from ..star_core.models.unet import ControlledVideoUNet, UNetConfig
from ..star_core.planning.cost import Pass, peak_of
from ..star_core.sampling_defaults import SamplingDefaults
from ..star_core.star_checkpoint import ModelFile
from ..star_core.windows.tiling import Tile
from .host_features import lacking_for, patcher_class

# Keys of CONDITIONING: raw latents (b c f h w) of the low-quality video, and how far predictions
# may move away from them, 0 to 1.
HINT, STRENGTH = "star_hint", "star_strength"
# Keys of transformer_options: the window (a range of frames) that is being denoised; arguments of
# `ControlledVideoUNet.working` and `reuse` of Shortcuts; and a function from a key to the deep
# features of the current run.
WINDOW, WORK_OPTIONS, DEEP = "star_window", "star_how", "star_deep"

# The host's solvers need finite noise levels, but the schedule ends in pure noise, whose level is
# infinite. The host uses this value instead for its own models with zero terminal SNR.
PURE_NOISE = 4518.0

# The lowest level above 0 of the host's schedulers: that of Stable Diffusion, for which its solvers
# were made. STAR's own, 0.001, is a long step further, in which second-order solvers overshoot.
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
        # The host's schedulers begin at the last of these, the model's own noise level. From pure
        # noise the host's second-order solvers would diverge.
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
        # The host leaves the latents out at its highest level, which is not always pure noise here.
        latents = latent_image if sigma < PURE_NOISE else 0 * latent_image
        return super().noise_scaling(sigma, noise, latents)


class HostAttention:
    """The host's attention for the core's layers; `options` are those of the current call."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return optimized_attention(q, k, v, heads, transformer_options=self.options)

        return in_rows(attend, q, k, v, heads)


class Hosted:
    """Mixin that gives a network of the core the interface of the host's networks."""

    def __init__(self, config: Any, *, dtype: torch.dtype, device, operations) -> None:
        attention = HostAttention()
        options = {"operations": operations, "attention": attention}
        options |= {"device": device, "dtype": dtype}
        super().__init__(config, **options)  # pyright: ignore[reportCallIssue]
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
        """Returns the velocity of x (b c f h w), which may be a window of the clip in `hint`."""
        frames = x.shape[2]
        if (window := transformer_options.get(WINDOW)) is not None and hint.shape[2] != frames:
            hint = hint[:, :, window.start : window.stop]
        # Newer hosts cut the hint themselves, see `resize_cond_for_context_window`.
        window = transformer_options.get("context_window")
        if window is not None and hint.shape[2] != frames:
            hint = window.get_tensor(hint, dim=2)
        override = "optimized_attention_override" in transformer_options
        self.attention.options = transformer_options if override else {}
        work = {"slicing": self.slicing, **transformer_options.get(WORK_OPTIONS, {})}
        deep = None
        if work.pop("reuse", 0) and (prompts := transformer_options.get("uuids")):
            features = features_for(prompts, transformer_options)
            deep = BatchedFeatures(features) if features else None
        try:
            # Clones of a MODEL share this module.
            with self.working(**work):  # pyright: ignore[reportAttributeAccessIssue]
                return super().forward(  # pyright: ignore[reportAttributeAccessIssue]
                    x, timesteps.long(), context, hint, deep=deep
                )
        finally:
            self.attention.options = {}


class HostUNet(Hosted, ControlledVideoUNet):
    """STAR's network on I2VGen-XL, called as the host calls its own."""


def host_network(config: NetworkConfig, **options: Any) -> Any:
    """Builds the network of a configuration for the host; options: dtype, device, operations."""
    if isinstance(config, UNetConfig):
        return HostUNet(config, **options)
    # Imported here because diffusers takes seconds to import, and most graphs do not need it.
    from ..star_core.models.cogvideox_dit import CogVideoXDiT

    class HostDiT(Hosted, CogVideoXDiT):
        pass

    return HostDiT(config, **options)


def features_for(prompts: Sequence[Any], options: dict[str, Any]) -> list[DeepFeatures]:
    """Returns the deep features of each prompt for the window in a call's transformer_options.

    prompts: the host's ids of them. The list is empty outside a run that reuses features.
    """
    features = options.get(DEEP)
    if features is None:
        return []
    context = options.get("context_window")
    window = (options.get(WINDOW), context and tuple(context.index_list))
    return [features((prompt, window)) for prompt in prompts]


class StarBaseModel(comfy.model_base.BaseModel):
    """The model that the host samples; `star` holds its file with the sampling defaults."""

    def __init__(
        self, config: "StarConfig", star: ModelFile, device: torch.device | str = "meta"
    ) -> None:
        v_prediction = comfy.model_base.ModelType.V_PREDICTION
        super().__init__(config, v_prediction, device=device, unet_model=host_network)
        self.model_sampling = ModelSampling(star.sampling)
        self.star = star
        self.work_options: dict[str, Any] = {}  # WORK_OPTIONS of the current run

    def extra_conds(self, **kwargs) -> dict[str, Any]:
        """Returns the host's conditions with hint and strength; ValueError if the hint is wrong."""
        hint, noise = kwargs.get(HINT), kwargs["noise"]
        if hint is None:
            raise ValueError(
                "the conditioning of this STAR model has no low-quality video: connect positive "
                "and negative to STAR Conditioning, and take both from its outputs"
            )
        if hint.shape[1:] != noise.shape[1:]:
            raise ValueError(
                f"the latents to sample have the shape {list(noise.shape)}, the low-quality video "
                f"of STAR Conditioning {list(hint.shape)} (batch channels frames height width): "
                "take the LATENT from the same STAR Conditioning, or one of the same size"
            )
        hint = comfy.conds.CONDNoiseShape(self.process_latent_in(hint))
        strength = comfy.conds.CONDConstant(kwargs.get(STRENGTH, 1.0))
        return super().extra_conds(**kwargs) | {"hint": hint, "strength": strength}

    def resize_cond_for_context_window(
        self, cond_key, cond_value, window, x_in, device, retain_index_list=()
    ):
        """Returns a condition for a window of the host; None where the host is to cut it itself.

        The host decides by size, and would cut text with as many channels as the clip has frames.
        """
        return cond_value if cond_key == "c_crossattn" else None

    def memory_required(self, input_shape, cond_shapes=None) -> float:
        """Returns the bytes of activations for latents (b c f h w), all frames at once."""
        dtype = self.manual_cast_dtype or self.get_dtype()
        options = {k: v for k, v in self.work_options.items() if k in ("slicing", "tile")}
        return activations(self.star.config, input_shape, dtype, **options)


def apply_strength(args: dict[str, Any]) -> Tensor:
    """Returns a guided prediction, pulled towards the low-quality latents by the strength.

    This is done after guidance, as in the core; before it, guidance would be rescaled differently.
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
    """Returns the peak bytes of one sliced forward pass on latents (b c f h w) or their tiles.

    Counted on the meta device, plus a tenth for what libraries allocate.
    """
    b, _, *sides = shape
    f, h, w = sides if len(sides) == 3 else (1, *sides)
    h, w = (max(map(len, side)) for side in config.tiles((h, w), tile))
    forward = Pass(config=config, dtype=dtype, frames=f, height=h, width=w, batch=b)
    return 1.1 * peak_of(forward, slicing or Slicing()).device


class StarConfig(comfy.supported_models_base.BASE):
    """The properties of a model that the host reads before it builds the model."""

    unet_extra_config = {}

    def __init__(self, star: ModelFile) -> None:
        super().__init__({"config": star.config})
        self.latent_format = latent_format(star)


def latent_format(star: ModelFile) -> comfy.latent_formats.LatentFormat:
    """Returns the format of the model's latents (b c f h w): scale and preview colours."""
    format = comfy.latent_formats.SD15(star.latents.scale)
    format.latent_channels = star.config.in_dim
    format.latent_dimensions = 3
    if format.latent_channels != 4:
        format.latent_rgb_factors = None
    if star.latents.rgb is not None:
        format.latent_rgb_factors = [list(row) for row in star.latents.rgb]
    format.taesd_decoder_name = None  # it decodes images, not videos
    return format


def load_patcher(
    star: ModelFile, weight_type: str = "auto", disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """Returns the MODEL of an open file; the host can repeat the call, for a second device say.

    weight_type: a key of `WEIGHT_TYPES`. disable_dynamic: do not use the host's dynamic VRAM.
    ValueError for an unknown type, or quantised weights that this host cannot compute with.
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
        stored = next(tensor.dtype for tensor in star.tensors.values())
        dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=types, weight_dtype=stored)
    if packed:
        config.quant_config = {"mixed_ops": True}  # as the host sets it; the layers hold the rest
    config.set_inference_dtype(dtype, mm.unet_manual_cast(None if packed else dtype, device, types))
    # The host's quantised layers load weights on the device on which they were created.
    model = StarBaseModel(config, star, offload_device if packed else "meta")
    load_into(
        model.diffusion_model,
        star.tensors,
        # From plain layers, because the host's have no weights yet where it streams them from disk.
        expected=build_network(star.config, device="meta").state_dict(),
        device=offload_device,
        dtype=dtype,
        packed=packed,
        name=str(star.path),
    )
    # A LoRA file patches it with its settings, see `sampling_defaults`. Nothing else reads it.
    settings = torch.zeros(SETTINGS_SIZE, dtype=torch.uint8, device=offload_device)
    model.diffusion_model.register_buffer(SETTINGS, settings)
    model.eval().requires_grad_(False)
    model.device = offload_device
    patcher = patcher_class(disable_dynamic)(
        model, load_device=device, offload_device=offload_device
    )
    patcher.set_model_sampler_post_cfg_function(apply_strength)
    patcher.cached_patcher_init = (load_patcher, (star, weight_type))
    return patcher


def is_quantized(star: ModelFile) -> bool:
    """Returns whether a file has quantised weights; ValueError if this host cannot use them."""
    formats = formats_of(star.tensors)
    if lacking := lacking_for(formats):
        raise ValueError(
            f"{star.path} is quantised, and {lacking}; or choose weight_dtype fp16, which unpacks "
            "the weights"
        )
    return bool(formats)


def star_of(model: comfy.model_patcher.ModelPatcher) -> ModelFile:
    """Returns the file of a STAR MODEL; ValueError for another MODEL."""
    # By attribute, not class: a second copy of this pack has other classes, but its models work.
    network = getattr(model, "model", model)
    star = getattr(network, "star", None)
    if star is None:
        raise ValueError(
            f"the MODEL is a {type(network).__name__}, not a STAR model: connect STAR Load Model"
        )
    return star


def sampling_defaults(model: comfy.model_patcher.ModelPatcher) -> SamplingDefaults:
    """Returns the sampling settings of a STAR MODEL: its file's, or those that its LoRAs ask for.

    ValueError for another MODEL, and for a LoRA whose settings are damaged.
    """
    own = star_of(model).sampling
    patches = model.patches.get(f"diffusion_model.{SETTINGS}", [])
    # A patch is its strength, what it does, and more; ("set", (tensor,)) replaces the buffer.
    loras = [(patch[0], read_settings(patch[1][1][0], "a LoRA of the MODEL")) for patch in patches]
    return with_loras(own, loras)


def network_of(model: comfy.model_patcher.ModelPatcher) -> tuple[NetworkConfig, torch.dtype]:
    """Returns configuration and compute dtype of a STAR MODEL; ValueError for another MODEL."""
    config, network = star_of(model).config, model.model
    return config, network.manual_cast_dtype or network.get_dtype()
