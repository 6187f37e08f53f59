"""Recognises, unpacks and writes quantised weights in the formats of ComfyUI's files.

Besides its `weight`, a quantised layer has scales and `comfy_quant`, bytes of JSON that name the
layer's format: {"format": "int8_tensorwise"}. Older files state the format in their metadata or
with one tensor `scaled_fp8` for all layers. Such a weight is read as a `PackedTensor`, which
occupies only the memory of the stored bytes and unpacks itself when it is computed with.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.utils._pytree import tree_map_only

CONFIG = "comfy_quant"
_INPUT_SCALE = "input_scale"  # for activations, which are not quantised here
_SCALES = ("weight_scale", "weight_scale_2", _INPUT_SCALE)
_OLD_MARK = "scaled_fp8"
_OLD_NAMES = {"scale_weight": "weight_scale", "scale_input": _INPUT_SCALE}
_FULL_PRECISION = {"full_precision_matrix_mult": True}
METADATA = "_quantization_metadata"

Parts = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format in which a weight (rows columns) is stored.

    name: ComfyUI's. stored: type of the tensor `weight`. packed: values in one of its elements.
    group: number of values that share a scale, None if a row or the whole weight shares one.
    scales: the names of its scales. unpack: returns the weight in float32 from its parts and the
    size of ConvRot's groups, None without ConvRot. pack: the inverse, None for a format that is
    only read. full_precision: written layers ask the host not to quantise their inputs.
    """

    name: str
    stored: torch.dtype
    packed: int = 1
    group: int | None = None
    scales: tuple[str, ...] = ("weight_scale",)
    unpack: Callable[[Parts, int | None], Tensor]
    pack: Callable[[Tensor], dict[str, Tensor]] | None = None
    full_precision: bool = False

    def shape(self, weight: Tensor) -> torch.Size:
        """Returns the shape of the weight whose stored tensor is `weight`."""
        return torch.Size((*weight.shape[:-1], weight.shape[-1] * self.packed))

    def fits(self, shape: torch.Size) -> bool:
        """Tests whether a weight of this shape can be stored without padding."""
        return len(shape) == 2 and (self.group is None or not any(n % 16 for n in shape))

    def check(self, parts: Parts) -> str:
        """Returns what is wrong with a layer's parts, beginning with the name of one, else ""."""
        weight = parts["weight"]
        if weight.dtype != self.stored:
            return f"weight is {weight.dtype}, its format {self.name} needs {self.stored}"
        rows, columns = weight.shape[0], self.shape(weight)[-1]
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(self.scales, (1,))
        if self.group is None:
            expected["weight_scale"] = (1, rows)
        elif weight.ndim != 2 or columns % self.group:
            return f"weight is {list(weight.shape)}, not rows of groups of {self.group} values"
        else:
            expected["weight_scale"] = (_round_up(rows, 128) * _round_up(columns // self.group, 4),)
        for name, counts in expected.items():
            if name not in parts:
                return f"{name} is missing"
            if self.group and name == "weight_scale" and parts[name].dtype.itemsize != 1:
                return f"{name} is {parts[name].dtype}, not a type of one byte"
            if parts[name].numel() not in counts:
                return (
                    f"{name} has {parts[name].numel()} values for a weight of "
                    f"{list(self.shape(weight))}, not {' or '.join(map(str, counts))}"
                )
        return ""


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _unpack_scaled(parts: Parts, convrot_size: int | None = None) -> Tensor:
    weight, scale = parts["weight"], parts["weight_scale"].float()
    # One scale for the whole weight, or one for each row.
    weight = weight.float() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    if convrot_size is None:
        return weight
    groups = weight.unflatten(-1, (-1, convrot_size))
    return (groups @ hadamard(convrot_size)).flatten(-2)  # the matrix is its own inverse


def hadamard(size: int) -> Tensor:
    """Returns the symmetric orthogonal matrix (size size) of ConvRot; size: a power of 4."""
    quarter = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, quarter)
    return matrix / len(matrix) ** 0.5


def _pack_fp8(weight: Tensor) -> dict[str, Tensor]:
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (weight.abs().amax() / largest).clamp(min=1e-30)
    # Rounding may lift the largest value slightly beyond the range, where it would become NaN.
    scaled = (weight / scale).clamp(-largest, largest)
    return {"weight": scaled.to(torch.float8_e4m3fn), "weight_scale": scale}


def _pack_int8(weight: Tensor) -> dict[str, Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


# The magnitudes of four-bit values and the borders between them; the highest bit is the sign.
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_FP4_BORDERS = (_FP4[1:] + _FP4[:-1]) / 2


def _blocked(scales: Tensor) -> Tensor:
    """Returns scales (rows groups) in the order in which NVIDIA's matrix products read them."""
    rows, groups = (_round_up(n, by) for n, by in zip(scales.shape, (128, 4), strict=True))
    padded = scales.new_zeros(rows, groups)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    order = rearrange(padded, "(R i j) (C c) -> (R C j i c)", i=4, j=32, c=4)
    return order.reshape(rows, groups)


def _unblocked(stored: Tensor, rows: int, groups: int) -> Tensor:
    blocks = {"R": _round_up(rows, 128) // 128, "i": 4, "j": 32, "c": 4}
    scales = rearrange(stored.flatten(), "(R C j i c) -> (R i j) (C c)", **blocks)
    return scales[:rows, :groups]


def _pack_nvfp4(weight: Tensor) -> dict[str, Tensor]:
    finest = torch.finfo(torch.float8_e4m3fn).max
    whole = (weight.abs().amax() / (finest * _FP4[-1])).clamp(min=1e-30)
    groups = weight.unflatten(1, (-1, 16))
    scales = (groups.abs().amax(-1) / _FP4[-1] / whole).clamp(max=finest).to(torch.float8_e4m3fn)
    each = (whole * scales.float())[..., None]
    each = each.masked_fill(each == 0, torch.inf)  # a group of zeros or of values close to them
    codes = torch.bucketize((groups / each).abs(), _FP4_BORDERS).to(torch.uint8)
    codes = (codes | (groups.signbit() * 8).to(torch.uint8)).flatten(1)
    return {
        "weight": codes[:, ::2] << 4 | codes[:, 1::2],
        "weight_scale": _blocked(scales.view(torch.uint8)).view(torch.float8_e4m3fn),
        "weight_scale_2": whole,
    }


def _unpack_nvfp4(parts: Parts, convrot_size: int | None = None) -> Tensor:
    stored = parts["weight"]
    codes = torch.stack([stored >> 4, stored & 15], dim=-1).flatten(1).int()
    groups = torch.cat([_FP4, -_FP4])[codes].unflatten(1, (-1, 16))
    scales = _unblocked(parts["weight_scale"].view(torch.uint8), *groups.shape[:2])
    each = scales.contiguous().view(torch.float8_e4m3fn).float() * parts["weight_scale_2"].float()
    return (groups * each[..., None]).flatten(1)


def _unpack_mxfp8(parts: Parts, convrot_size: int | None = None) -> Tensor:
    stored = parts["weight"].view(torch.float8_e4m3fn).float()
    groups = stored.unflatten(1, (-1, 32))
    exponents = _unblocked(parts["weight_scale"].view(torch.uint8), *groups.shape[:2])
    return (groups * torch.exp2(exponents.float() - 127)[..., None]).flatten(1)


E4M3 = Format(
    name="float8_e4m3fn",
    stored=torch.float8_e4m3fn,
    unpack=_unpack_scaled,
    pack=_pack_fp8,
    full_precision=True,  # otherwise ComfyUI would clamp the inputs to 448 without scaling them
)
E5M2 = Format(name="float8_e5m2", stored=torch.float8_e5m2, unpack=_unpack_scaled)
INT8 = Format(name="int8_tensorwise", stored=torch.int8, unpack=_unpack_scaled, pack=_pack_int8)
NVFP4 = Format(
    name="nvfp4",
    stored=torch.uint8,
    packed=2,
    group=16,
    scales=("weight_scale", "weight_scale_2"),
    unpack=_unpack_nvfp4,
    pack=_pack_nvfp4,
)
MXFP8 = Format(name="mxfp8", stored=torch.float8_e4m3fn, group=32, unpack=_unpack_mxfp8)
FORMATS = {format.name: format for format in (E4M3, E5M2, INT8, NVFP4, MXFP8)}
# The formats that can be written, by the names that users give.
WRITTEN = {"fp8_scaled": E4M3, "int8": INT8, "nvfp4": NVFP4}


class PackedTensor(Tensor):
    """The weight of a quantised layer, which has its true shape and unpacks in every operation.

    parts: the layer's tensors as the file stores them, by their names after the layer's. config:
    the layer's `comfy_quant`. dtype: of the values; unpacking computes in float32.
    """

    parts: dict[str, Tensor]
    config: dict[str, Any]

    @staticmethod
    def __new__(
        cls, parts: dict[str, Tensor], config: dict[str, Any], dtype: torch.dtype
    ) -> "PackedTensor":
        shape = FORMATS[config["format"]].shape(parts["weight"])
        packed = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)  # pyright: ignore
        packed.parts, packed.config = parts, config
        return packed

    @property
    def format(self) -> Format:
        """The format in which the weight is stored."""
        return FORMATS[self.config["format"]]

    def unpacked(self) -> Tensor:
        """Returns the values in float32, computed anew by each call."""
        return self.format.unpack(self.parts, _convrot_size(self.config))

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"PackedTensor({self.format.name}, {list(self.shape)})"

    # Otherwise the results of operations would be of this class too.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(packed: PackedTensor) -> Tensor:
            return packed.unpacked().to(packed.dtype)

        args, kwargs = tree_map_only(PackedTensor, plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def packed_layers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns the tensors of a file, those of each quantised layer as one `PackedTensor`.

    A packed tensor has the key of the layer's weight. metadata: the file's, where older files
    state the formats. Raises ValueError, with the tensor's name, for a layer whose format is
    unknown or that lacks a part.
    """
    tensors, configs = _layer_configs(tensors, metadata)
    result = {key: tensor for key, tensor in tensors.items() if not key.endswith(f".{CONFIG}")}
    for key in result:
        stem, _, end = key.rpartition(".")
        weight = result.get(f"{stem}.weight")
        narrow = weight is not None and weight.dtype.itemsize == 1
        if end == "weight_scale" and narrow and stem not in configs:
            raise ValueError(
                f"'{stem}.{CONFIG}' is missing, which states the format of '{stem}.weight'"
            )
    if not configs:
        return result
    layers = {stem: _parts(stem, config, result) for stem, config in configs.items()}
    dtype = usual_type(result.values())
    for stem, config in configs.items():
        result[f"{stem}.weight"] = PackedTensor(layers[stem], config, dtype)
    return result


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns all tensors as current files store them: the inverse of `packed_layers`."""
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, PackedTensor):
            stem = key.removesuffix("weight")
            result |= {stem + name: part for name, part in tensor.parts.items()}
            result[stem + CONFIG] = _encoded(tensor.config)
        else:
            result[key] = tensor
    return result


def formats_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns the number of layers in each format, by its name; {} if none is quantised."""
    return dict(Counter(t.format.name for t in tensors.values() if isinstance(t, PackedTensor)))


def quantized(weight: Tensor, format: Format) -> dict[str, Tensor]:
    """Quantises a weight (rows columns) to the layer's tensors, by their names after the layer's.

    The format must be one that can be written and that fits the weight's shape.
    """
    assert format.pack is not None and format.fits(weight.shape)
    config = {"format": format.name, **(_FULL_PRECISION if format.full_precision else {})}
    return {**format.pack(weight.float()), CONFIG: _encoded(config)}


def _encoded(config: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def _layer_configs(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Returns tensors under current names, and the configuration of each quantised layer."""
    tensors, configs = dict(tensors), {}
    if METADATA in metadata:
        try:
            stated = dict(json.loads(metadata[METADATA])["layers"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the metadata {METADATA!r} is unreadable ({error!r})") from None
        configs |= {stem: _checked(stem, config) for stem, config in stated.items()}
    for mark in [key for key in tensors if key.rpartition(".")[2] == _OLD_MARK]:
        prefix = mark.removesuffix(_OLD_MARK)
        options = _FULL_PRECISION if tensors.pop(mark).numel() == 2 else {}
        for key in [key for key in tensors if key.startswith(prefix)]:
            stem, _, end = key.rpartition(".")
            if end in _OLD_NAMES:
                tensors[f"{stem}.{_OLD_NAMES[end]}"] = tensors.pop(key)
            if end == "scale_weight":
                weight = tensors.get(f"{stem}.weight")
                e5m2 = weight is not None and weight.dtype == torch.float8_e5m2
                configs[stem] = {"format": (E5M2 if e5m2 else E4M3).name, **options}
    for key in tensors:
        stem, _, end = key.rpartition(".")
        if end == CONFIG:
            try:
                config = json.loads(bytes(tensors[key].tolist()))
            except (ValueError, TypeError):
                raise ValueError(f"{key!r} is not JSON: the file is damaged") from None
            configs[stem] = _checked(stem, config)
    return tensors, configs


def _checked(stem: str, config: Any) -> dict[str, Any]:
    name = config.get("format") if isinstance(config, dict) else None
    if name not in FORMATS:
        raise ValueError(
            f"'{stem}.{CONFIG}' names the format {name!r}, which is unknown: the known formats are "
            f"{', '.join(FORMATS)}"
        )
    return config


def _parts(stem: str, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a layer's parts; those other than the weight are removed from `tensors`."""
    if f"{stem}.weight" not in tensors:
        raise ValueError(f"'{stem}.weight' is missing, which '{stem}.{CONFIG}' describes")
    if f"{stem}.pre_quant_scale" in tensors:
        raise ValueError(f"'{stem}.pre_quant_scale' scales the inputs, which is not supported")
    parts = {name: tensors.pop(f"{stem}.{name}") for name in _SCALES if f"{stem}.{name}" in tensors}
    parts = {"weight": tensors[f"{stem}.weight"], **parts}
    if wrong := FORMATS[config["format"]].check(parts):
        raise ValueError(f"{stem}.{wrong}: the file is damaged or of a newer kind")
    size, columns = _convrot_size(config), parts["weight"].shape[-1]
    if size is not None and (size not in _CONVROT_SIZES or columns % size):
        raise ValueError(
            f"'{stem}.{CONFIG}' states convrot_groupsize {size!r}, which is not a power of 4 that "
            f"divides the {columns} columns of its weight"
        )
    return parts


_CONVROT_SIZES = tuple(4**n for n in range(1, 9))


def _convrot_size(config: Mapping[str, Any]) -> Any:
    """Returns the size of the groups of columns that ConvRot has rotated, None without ConvRot."""
    params = config.get("params")
    stated = {**(params if isinstance(params, dict) else {}), **config}
    return stated.get("convrot_groupsize", 256) if stated.get("convrot") else None


def usual_type(tensors: Iterable[Tensor]) -> torch.dtype:
    """Returns the most frequent type of tensors that are not quantised; float32 without any."""
    wide = [t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1]
    return Counter(wide).most_common(1)[0][0] if wide else torch.float32
