"""Quantised weights as ComfyUI's files hold them: recognised, unpacked, made.

Beside the `weight` of a quantised layer stand its scales and `comfy_quant`, bytes of JSON that name
the layer's format: {"format": "int8_tensorwise"}. Older files say the same in their metadata or
with one tensor `scaled_fp8` for all layers. Read here, such a weight is a `PackedTensor`, which
takes the memory of what is stored and gives ordinary values to whoever computes with it.
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
    """How a weight (rows columns) is stored; `name` is ComfyUI's.

    stored: type of the tensor `weight`. packed: values in one of its elements. group: values that
    share a scale, None where all of a row or of the weight do. scales: the names of its scales.
    unpack: the parts, and the size of ConvRot's groups if there are any -> the weight in float32.
    pack: the reverse, None for a format that is only read. full_precision: layers that are written
    ask for products with what comes in as it is, not quantised too.
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
        """Of the weight that is stored so."""
        return torch.Size((*weight.shape[:-1], weight.shape[-1] * self.packed))

    def takes(self, shape: torch.Size) -> bool:
        """Whether a weight of this shape can be stored without padding."""
        return len(shape) == 2 and (self.group is None or not any(n % 16 for n in shape))

    def check(self, parts: Parts) -> str:
        """What is wrong with the parts, beginning with the name of one; "" if nothing is."""
        weight = parts["weight"]
        if weight.dtype != self.stored:
            return f"weight is {weight.dtype}, its format {self.name} asks for {self.stored}"
        rows, columns = weight.shape[0], self.shape(weight)[-1]
        wanted: dict[str, tuple[int, ...]] = dict.fromkeys(self.scales, (1,))
        if self.group is None:
            wanted["weight_scale"] = (1, rows)
        elif weight.ndim != 2 or columns % self.group:
            return f"weight is {list(weight.shape)}, not rows of groups of {self.group} values"
        else:
            wanted["weight_scale"] = (_up(rows, 128) * _up(columns // self.group, 4),)
        for name, counts in wanted.items():
            if name not in parts:
                return f"{name} is missing"
            if self.group and name == "weight_scale" and parts[name].dtype.itemsize != 1:
                return f"{name} is {parts[name].dtype}, not of one byte"
            if parts[name].numel() not in counts:
                return (
                    f"{name} has {parts[name].numel()} values for a weight of "
                    f"{list(self.shape(weight))}, not {' or '.join(map(str, counts))}"
                )
        return ""


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _unpack_scaled(parts: Parts, rotated: int | None = None) -> Tensor:
    weight, scale = parts["weight"], parts["weight_scale"].float()
    # One scale for all, or one a row.
    weight = weight.float() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    if rotated is None:
        return weight
    groups = weight.unflatten(-1, (-1, rotated))
    return (groups @ hadamard(rotated)).flatten(-2)  # it is its own inverse


def hadamard(size: int) -> Tensor:
    """The symmetric orthogonal matrix (size size) of ConvRot; size: a power of 4."""
    quarter = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, quarter)
    return matrix / len(matrix) ** 0.5


def _pack_fp8(weight: Tensor) -> dict[str, Tensor]:
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (weight.abs().amax() / largest).clamp(min=1e-30)
    # Rounding may lift the largest a little beyond the range, where it would be no number.
    scaled = (weight / scale).clamp(-largest, largest)
    return {"weight": scaled.to(torch.float8_e4m3fn), "weight_scale": scale}


def _pack_int8(weight: Tensor) -> dict[str, Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


# Values of four bits, and the borders between them; the fifth bit down is the sign.
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_FP4_BORDERS = (_FP4[1:] + _FP4[:-1]) / 2


def _blocked(scales: Tensor) -> Tensor:
    """Scales of groups (rows groups) in the order in which NVIDIA's matrix products read them."""
    rows, groups = (_up(n, by) for n, by in zip(scales.shape, (128, 4), strict=True))
    padded = scales.new_zeros(rows, groups)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    order = rearrange(padded, "(R i j) (C c) -> (R C j i c)", i=4, j=32, c=4)
    return order.reshape(rows, groups)


def _unblocked(stored: Tensor, rows: int, groups: int) -> Tensor:
    """The inverse of `_blocked`."""
    blocks = {"R": _up(rows, 128) // 128, "i": 4, "j": 32, "c": 4}
    scales = rearrange(stored.flatten(), "(R C j i c) -> (R i j) (C c)", **blocks)
    return scales[:rows, :groups]


def _pack_nvfp4(weight: Tensor) -> dict[str, Tensor]:
    finest = torch.finfo(torch.float8_e4m3fn).max
    whole = (weight.abs().amax() / (finest * _FP4[-1])).clamp(min=1e-30)
    groups = weight.unflatten(1, (-1, 16))
    scales = (groups.abs().amax(-1) / _FP4[-1] / whole).clamp(max=finest).to(torch.float8_e4m3fn)
    each = (whole * scales.float())[..., None]
    each = each.masked_fill(each == 0, torch.inf)  # a group of zeros, or nearly
    codes = torch.bucketize((groups / each).abs(), _FP4_BORDERS).to(torch.uint8)
    codes = (codes | (groups.signbit() * 8).to(torch.uint8)).flatten(1)
    return {
        "weight": codes[:, ::2] << 4 | codes[:, 1::2],
        "weight_scale": _blocked(scales.view(torch.uint8)).view(torch.float8_e4m3fn),
        "weight_scale_2": whole,
    }


def _unpack_nvfp4(parts: Parts, rotated: int | None = None) -> Tensor:
    stored = parts["weight"]
    codes = torch.stack([stored >> 4, stored & 15], dim=-1).flatten(1).int()
    groups = torch.cat([_FP4, -_FP4])[codes].unflatten(1, (-1, 16))
    scales = _unblocked(parts["weight_scale"].view(torch.uint8), *groups.shape[:2])
    each = scales.contiguous().view(torch.float8_e4m3fn).float() * parts["weight_scale_2"].float()
    return (groups * each[..., None]).flatten(1)


def _unpack_mxfp8(parts: Parts, rotated: int | None = None) -> Tensor:
    stored = parts["weight"].view(torch.float8_e4m3fn).float()
    groups = stored.unflatten(1, (-1, 32))
    exponents = _unblocked(parts["weight_scale"].view(torch.uint8), *groups.shape[:2])
    return (groups * torch.exp2(exponents.float() - 127)[..., None]).flatten(1)


E4M3 = Format(
    name="float8_e4m3fn",
    stored=torch.float8_e4m3fn,
    unpack=_unpack_scaled,
    pack=_pack_fp8,
    full_precision=True,  # or ComfyUI would cut off at 448 what comes in, without a scale
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
# Those that are written, by the names that people give them.
WRITTEN = {"fp8_scaled": E4M3, "int8": INT8, "nvfp4": NVFP4}


class PackedTensor(Tensor):
    """The weight of a quantised layer: with its shape, and unpacked by whatever is done with it.

    parts: the layer's tensors as the file holds them, by their names after the layer's. dtype: of
    the values; unpacking computes in float32.
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
        return FORMATS[self.config["format"]]

    def unpacked(self) -> Tensor:
        """The values in float32, a new tensor each time."""
        return self.format.unpack(self.parts, _rotated(self.config))

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"PackedTensor({self.format.name}, {list(self.shape)})"

    # Or what is computed from it were of this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(packed: PackedTensor) -> Tensor:
            return packed.unpacked().to(packed.dtype)

        args, kwargs = tree_map_only(PackedTensor, plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def packed_layers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a file, each quantised layer's in one `PackedTensor` under its weight's key.

    ValueError, naming the tensor, for a layer whose format is unknown or misses a part.
    """
    tensors, configs = _told_apart(tensors, metadata)
    found = {key: tensor for key, tensor in tensors.items() if not key.endswith(f".{CONFIG}")}
    for key in found:
        stem, _, end = key.rpartition(".")
        weight = found.get(f"{stem}.weight")
        narrow = weight is not None and weight.dtype.itemsize == 1
        if end == "weight_scale" and narrow and stem not in configs:
            raise ValueError(
                f"'{stem}.{CONFIG}' is missing, which says how '{stem}.weight' is to be read"
            )
    if not configs:
        return found
    layers = {stem: _parts(stem, config, found) for stem, config in configs.items()}
    dtype = usual_type(found.values())
    for stem, config in configs.items():
        found[f"{stem}.weight"] = PackedTensor(layers[stem], config, dtype)
    return found


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `packed_layers`: all tensors as today's files hold them."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, PackedTensor):
            stem = key.removesuffix("weight")
            found |= {stem + name: part for name, part in tensor.parts.items()}
            found[stem + CONFIG] = _encoded(tensor.config)
        else:
            found[key] = tensor
    return found


def formats_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many layers are in which format, by its name; {} for a file that is not quantised."""
    return dict(Counter(t.format.name for t in tensors.values() if isinstance(t, PackedTensor)))


def quantized(weight: Tensor, format: Format) -> dict[str, Tensor]:
    """The tensors of a layer with this weight (rows columns), by their names after the layer's."""
    assert format.pack is not None and format.takes(weight.shape)
    config = {"format": format.name, **(_FULL_PRECISION if format.full_precision else {})}
    return {**format.pack(weight.float()), CONFIG: _encoded(config)}


def _encoded(config: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def _told_apart(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors under today's names, and the configuration of each quantised layer by its name."""
    tensors, configs = dict(tensors), {}
    if METADATA in metadata:
        try:
            stated = dict(json.loads(metadata[METADATA])["layers"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the metadata {METADATA!r} is unreadable ({error!r})") from None
        configs |= {stem: _checked(stem, config) for stem, config in stated.items()}
    for mark in [key for key in tensors if key.rpartition(".")[2] == _OLD_MARK]:
        prefix = mark.removesuffix(_OLD_MARK)
        how = _FULL_PRECISION if tensors.pop(mark).numel() == 2 else {}
        for key in [key for key in tensors if key.startswith(prefix)]:
            stem, _, end = key.rpartition(".")
            if end in _OLD_NAMES:
                tensors[f"{stem}.{_OLD_NAMES[end]}"] = tensors.pop(key)
            if end == "scale_weight":
                weight = tensors.get(f"{stem}.weight")
                e5m2 = weight is not None and weight.dtype == torch.float8_e5m2
                configs[stem] = {"format": (E5M2 if e5m2 else E4M3).name, **how}
    for key in tensors:
        stem, _, end = key.rpartition(".")
        if end == CONFIG:
            try:
                config = json.loads(bytes(tensors[key].tolist()))
            except (ValueError, TypeError):
                raise ValueError(f"{key!r} is no JSON: the file is damaged") from None
            configs[stem] = _checked(stem, config)
    return tensors, configs


def _checked(stem: str, config: Any) -> dict[str, Any]:
    name = config.get("format") if isinstance(config, dict) else None
    if name not in FORMATS:
        raise ValueError(
            f"'{stem}.{CONFIG}' names the format {name!r}, which is not known here: the known ones "
            f"are {', '.join(FORMATS)}"
        )
    return config


def _parts(stem: str, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's, taken out of the tensors, its weight excepted."""
    if f"{stem}.weight" not in tensors:
        raise ValueError(f"'{stem}.weight' is missing, which '{stem}.{CONFIG}' describes")
    if f"{stem}.pre_quant_scale" in tensors:
        raise ValueError(f"'{stem}.pre_quant_scale' scales what comes in, which is not known here")
    parts = {name: tensors.pop(f"{stem}.{name}") for name in _SCALES if f"{stem}.{name}" in tensors}
    parts = {"weight": tensors[f"{stem}.weight"], **parts}
    if wrong := FORMATS[config["format"]].check(parts):
        raise ValueError(f"{stem}.{wrong}: the file is damaged or of a newer kind")
    rotated, columns = _rotated(config), parts["weight"].shape[-1]
    if rotated is not None and (rotated not in _ROTATIONS or columns % rotated):
        raise ValueError(
            f"'{stem}.{CONFIG}' states convrot_groupsize {rotated!r}, which is no power of 4 that "
            f"divides the {columns} columns of its weight"
        )
    return parts


_ROTATIONS = tuple(4**n for n in range(1, 9))


def _rotated(config: Mapping[str, Any]) -> Any:
    """Size of the groups of columns that ConvRot has turned, None where it has not."""
    params = config.get("params")
    stated = {**(params if isinstance(params, dict) else {}), **config}
    return stated.get("convrot_groupsize", 256) if stated.get("convrot") else None


def usual_type(tensors: Iterable[Tensor]) -> torch.dtype:
    """Of most tensors that are not quantised; float32 if there are none."""
    wide = [t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1]
    return Counter(wide).most_common(1)[0][0] if wide else torch.float32
