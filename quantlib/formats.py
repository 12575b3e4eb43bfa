"""Storage formats: codebooks, double quantization of the scales, and the containers.

Everything here is a definition, in plain PyTorch and without kernels. The formats are those of bitsandbytes
0.50: NF4 and FP4 from QLoRA (https://arxiv.org/abs/2305.14314), the signed 8-bit dynamic map from "8-bit
Approximations for Parallelism in Deep Learning" (https://arxiv.org/abs/1511.04561), and row-wise absmax int8
from LLM.int8() (https://arxiv.org/abs/2208.07339).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")
NESTED_BLOCK_SIZE = 256
SMALLEST_SCALE = 1e-38  # an absmax is raised to this before it divides, so that 0 / 0 is 0
INT8_STEP = 1 / 127  # in float32 arithmetic it rounds to 7.874015718698502e-3, bitsandbytes' constant


def _table(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


# fmt: off
_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022833334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]
# fmt: on
_FP4 = [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]  # twelfths
_CODEBOOKS = {"nf4": _table(_NF4), "fp4": _table(_FP4) / 12}
# Codes by rising value. FP4 has two zeros, 0 and 8: 0 comes first, so that an exact zero becomes code 0.
_SORTED_CODES = {
    "nf4": torch.arange(16, device="cpu"),
    "fp4": torch.tensor([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], device="cpu"),
}


def _midpoints(ascending: Tensor) -> Tensor:
    return (ascending[:-1] + ascending[1:]) / 2


def _dynamic_map() -> Tensor:
    """[256] float32: 7 decades, the i-th cut into 2^i equal steps, of both signs, and 0 and 1."""
    decades = [
        10.0 ** (i - 6) * _midpoints(torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu"))
        for i in range(7)
    ]
    positive = torch.cat(decades)
    return torch.cat([-positive, _table([0.0]), positive, _table([1.0])]).sort().values


_TABLES = {
    **{f"codebook.{name}": table for name, table in _CODEBOOKS.items()},
    **{f"sorted_codes.{name}": order for name, order in _SORTED_CODES.items()},
    **{f"thresholds.{name}": _midpoints(_CODEBOOKS[name][_SORTED_CODES[name]]) for name in QUANT_TYPES},
    "dynamic": _dynamic_map(),
}
_TABLES["dynamic_thresholds"] = _midpoints(_TABLES["dynamic"])
_copies: dict[tuple[str, torch.device], Tensor] = {}


def _on_device(name: str, device: torch.device | str | None) -> Tensor:
    device = torch.device(device or "cpu")
    if device.type == "cpu":
        return _TABLES[name]
    if (name, device) not in _copies:
        copy = _TABLES[name].to(device)
        if type(copy) is not Tensor or torch.compiler.is_compiling():
            return copy  # a tracer's stand-in must not outlive its trace
        _copies[name, device] = copy
    return _copies[name, device]


def codebook(quant_type: str, device: torch.device | str | None = None) -> Tensor:
    """Values of the 16 codes, [16] float32, largest magnitude 1. Shared: do not write to it."""
    return _on_device(f"codebook.{quant_type}", device)


def thresholds(quant_type: str, device: torch.device | str | None = None) -> Tensor:
    """Decision thresholds, [15] float32 ascending: midpoints between neighbouring values of the codebook.

    A scaled value belongs to entry number `(thresholds < value).sum()` of the codebook in ascending order;
    `sorted_codes` maps that number to the stored code.
    """
    return _on_device(f"thresholds.{quant_type}", device)


def sorted_codes(quant_type: str, device: torch.device | str | None = None) -> Tensor:
    """The 16 codes by rising value, [16] int64 (the identity for nf4)."""
    return _on_device(f"sorted_codes.{quant_type}", device)


def dynamic_codebook(device: torch.device | str | None = None) -> Tensor:
    """The signed 8-bit dynamic map, [256] float32 ascending, zero at 127. Shared: do not write to it."""
    return _on_device("dynamic", device)


def scale_blocks(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Divide each block of a flat tensor by its absmax.

    x is [n], float32 or float64. Returns scaled [n], in [-1, 1], and absmax [ceil(n / block_size)], both of
    x's dtype. Full blocks are multiplied by the reciprocal of the absmax; a last, partial block is divided
    and its absmax is never below 1e-38. This is what bitsandbytes does, and the two differ in the last bit. A
    block with a NaN scales to NaN; a block with an infinity scales to zeros and, at the infinities, NaN.
    """
    full = x.numel() // block_size * block_size
    blocks, rest = x[:full].view(-1, block_size), x[full:]
    absmax = blocks.abs().amax(-1)
    reciprocal = 1 / absmax.clamp(min=SMALLEST_SCALE)
    scaled = (blocks * reciprocal[:, None]).clamp(-1, 1).view(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=SMALLEST_SCALE)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, (rest / last).clamp(-1, 1)])
    return scaled, absmax


def unscale_blocks(values: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """Multiply each block of a flat tensor, [n], by its absmax, [ceil(n / block_size)]."""
    missing = absmax.numel() * block_size - values.numel()
    padded = F.pad(values, (0, missing)) if missing else values
    return (padded.view(-1, block_size) * absmax[:, None]).view(-1)[: values.numel()]


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize the scales of a 4-bit weight to 8 bits (double quantization, QLoRA section 3).

    The mean is subtracted and the rest is quantized with the dynamic map in blocks of 256.

    Args:
        absmax: [blocks], float32.
    Returns:
        codes [blocks] uint8, nested_absmax [ceil(blocks / 256)] float32, nested_codebook [256] float32 and
        offset [] float32. A NaN or an infinity anywhere makes every decoded scale NaN or infinite.
    """
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    scaled, nested_absmax = scale_blocks(absmax - offset, NESTED_BLOCK_SIZE)
    codes = torch.bucketize(scaled, _on_device("dynamic_thresholds", absmax.device))
    return codes.to(torch.uint8), nested_absmax, dynamic_codebook(absmax.device), offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_codebook: Tensor, offset: Tensor) -> Tensor:
    """The scales that `quantize_absmax` encoded, [blocks] float32: codebook * nested_absmax + offset.

    The product is rounded before the offset is added, as in bitsandbytes: a fused multiply-add would differ.
    """
    return unscale_blocks(nested_codebook[codes.int()], nested_absmax, NESTED_BLOCK_SIZE) + offset


def _moved(container, device):
    tensors = {k: v.to(device) for k, v in vars(container).items() if isinstance(v, Tensor)}
    return replace(container, **tensors)


def _nbytes(container) -> int:
    return sum(v.nbytes for v in vars(container).values() if isinstance(v, Tensor))


@dataclass(eq=False)
class Quantized4bit:
    """A weight of n elements in 4 bits, in blocks of `block_size` along its flattened, row-major elements.

    Attributes:
        packed: [ceil(n / 2), 1] uint8, two codes a byte, the first in the high nibble; or the same bytes
            viewed as a float `quant_storage` dtype, [bytes / itemsize, 1].
        absmax: [ceil(n / block_size)] float32; uint8 under double quantization.
        nested_absmax: [ceil(blocks / 256)] float32, nested_codebook: [256] float32, offset: [] float32; all
            None without double quantization.
        quant_type: "nf4" or "fp4".
        block_size: 32, 64, ... 4096.
        shape, dtype: of the original weight.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_codebook: Tensor | None
    offset: Tensor | None
    quant_type: str
    block_size: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return _nbytes(self)

    def op_args(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, str, int]:
        """The seven arguments that stand for this weight in every op; packed as uint8."""
        packed = self.packed
        if packed.dtype != torch.uint8:
            packed = packed.reshape(-1).view(torch.uint8)[:, None]
        nested = (self.nested_absmax, self.nested_codebook, self.offset)
        return packed, self.absmax, *nested, self.quant_type, self.block_size

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight, of this container's `shape`; dtype defaults to the original one."""
        from quantlib.functional import dequantize_4bit  # above this layer: the method is its shorthand

        return dequantize_4bit(self, dtype)

    def to(self, device: torch.device | str) -> Quantized4bit:
        """A container with every tensor on `device`; tensors already there are shared."""
        return _moved(self, device)


@dataclass(eq=False)
class QuantizedInt8:
    """A tensor in absmax int8: value = values * absmax / 127.

    Attributes:
        values: int8, of the original shape.
        absmax: float32. dim=-1: shape[:-1]; dim=0: shape[1:]; dim None: [], or [ceil(n / block_size)] with a
            block_size, blocks along the flattened, row-major elements.
        outliers: [K] bool, the columns that were left out (their values are 0), or None.
        dim, block_size: what an absmax spans.
        dtype: of the original tensor.
    """

    values: Tensor
    absmax: Tensor
    outliers: Tensor | None
    dim: int | None
    block_size: int | None
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return _nbytes(self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded tensor (outlier columns are zero); dtype defaults to the original one."""
        from quantlib.functional import dequantize_int8  # above this layer: the method is its shorthand

        return dequantize_int8(self, dtype)

    def to(self, device: torch.device | str) -> QuantizedInt8:
        """A container with every tensor on `device`; tensors already there are shared."""
        return _moved(self, device)
