"""What a layer becomes (Scheme), what a person asks for (Recipe), what was decided (Plan): data only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .words import Choice

STATIC, DYNAMIC, NONE = "static", "dynamic", "none"
AUTO = "auto"
ACTIVATIONS = {
    AUTO: Choice("per layer, by the calibrated errors and the cost on this machine"),
    STATIC: Choice("a range per interval, from the calibration"),
    DYNAMIC: Choice("a range per token, found at run time"),
}
INT, NF4, FP4 = "int", "nf4", "fp4"
SMALLEST_GROUP = 16  # columns of a 4-bit weight, or channels of a rotation
# Ways to lay out a static range over time that are no method to choose one interval's range.
ONE_RANGE, TDQ = "one range", "tdq"


@dataclass(frozen=True)
class Scheme:
    """How one layer is represented.

    `weight_bits`: width of the weight codes: 8 (symmetric, one scale per output channel) or 4 (`int4`).
    `activation`: "static" (affine uint8, one scale and zero point per interval), "dynamic" (affine, per token) or
    "none" (left in float: the weight is decoded and the layer computes in float).
    `branches`: 2 where a static activation has a grid of its own for conditional and unconditional rows.
    `balanced`: whether input channels are rescaled before quantization, the inverse folded into the weight.
    `rotation`: block size of the rotation of the (balanced) input of a Linear, 0 for none. `permuted`: whether it
    has permutations of the channels (`tfmq.formats.hadamard`).
    `group`: input columns that share a factor of a 4-bit weight, 0 at 8 bits. `weight_format`: "int", or "nf4" or
    "fp4", the formats of bitsandbytes.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    activation: str = STATIC
    balanced: bool = False
    branches: int = 1
    rotation: int = 0
    group: int = 0
    weight_format: str = INT
    permuted: bool = False

    def problem(self) -> str | None:
        """Why no layer can have this scheme, in words that follow "has" or "gives"; None where some layer can."""
        for f in fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            if type(value) is not kind:
                return f"the {f.name} {value!r}, where {'an int' if kind is int else f'a {kind.__name__}'} belongs"
        if self.weight_bits not in (4, 8):
            return f"{self.weight_bits} bits per weight, not 4 or 8"
        if self.activation not in (STATIC, DYNAMIC, NONE):
            return f"activation {self.activation!r}, not static, dynamic or none"
        if self.activation != NONE and not 2 <= self.activation_bits <= 8:
            return f"{self.activation_bits} activation bits, not 2 to 8"
        if self.weight_format not in (INT, NF4, FP4):
            return f"the weight format {self.weight_format!r}, not int, nf4 or fp4"
        if self.weight_format != INT and (self.weight_bits != 4 or self.activation != NONE):
            return f"the format {self.weight_format}, which is for Linear layers with 4-bit weights and activation none"
        if self.weight_format == INT and self.weight_bits == 4 and not _is_width(self.group):
            return f"4 bits in groups of {self.group}, not a power of 2 from {SMALLEST_GROUP} on"
        if self.branches not in (1, 2):
            return f"{self.branches} branches, not 1 or 2"
        if self.rotation and not _is_width(self.rotation):
            return f"a rotation in blocks of {self.rotation}, not a power of 2 from {SMALLEST_GROUP} on"
        if self.permuted and not self.rotation:
            return "permutations, which only a rotation has"
        return None

    @property
    def grouped(self) -> bool:
        """Whether the weight is packed integers of 4 bits, with a factor and a zero per group."""
        return self.weight_bits == 4 and self.weight_format == INT

    @property
    def label(self) -> str:
        suffix = ", branches apart" if self.branches > 1 else ""
        balanced = (" balanced" if self.balanced else "") + (" rotated" if self.rotation else "")
        if self.weight_format != INT:
            return f"W{self.weight_bits}A16 {self.weight_format}{balanced}"
        group = f" groups of {self.group}" if self.group else ""
        if self.activation == NONE:
            return f"W{self.weight_bits}A16{group}{balanced}"
        return f"W{self.weight_bits}A{self.activation_bits} {self.activation}{group}{balanced}{suffix}"


def _is_width(columns: int) -> bool:
    return columns >= SMALLEST_GROUP and columns & (columns - 1) == 0


@dataclass(frozen=True)
class Recipe:
    """What a person asks for.

    `convolutions`: quantize Conv2d too. `activations`: one of `ACTIVATIONS` (Linear only; a convolution is always
    static). `ranges`: how a static range is chosen, one of `decide.grids.RANGES`. `branches_apart`: allow a grid of its
    own for conditional and unconditional rows. `temporal`: what becomes of the temporal path; "float" leaves it alone.
    `weight_format`: of Linear layers. `group`: wanted size of the groups of 4-bit weights. `rounding`: how 4-bit codes
    are found, one of `rounding.efforts.EFFORTS`. activation_bits 16 leaves activations in float.
    `mixed`: choose the bits per layer from {4, 8, 16}, with the least error under `budget` bytes, or with the fewest
    bytes whose predicted error is at least `quality` dB below the prediction (0: not asked for).
    """

    name: str
    weight_bits: int = 8
    activation_bits: int = 8
    convolutions: bool = True
    activations: str = AUTO
    ranges: str = "mse"
    branches_apart: bool = True
    temporal: str = "float"
    weight_format: str = INT
    group: int = 32
    rounding: str = "nearest"
    mixed: bool = False
    budget: int = 0
    quality: float = 0.0


UNDER_A_SIZE, AT_A_QUALITY = "best under a size", "smallest at a quality"
RECIPES = {
    "W8A8": Choice("8-bit weights and activations", Recipe("W8A8")),
    "W8A8 Linear only": Choice("convolutions stay in float", Recipe("W8A8 Linear only", convolutions=False)),
    "W4A8": Choice("4-bit weights, half the size", Recipe("W4A8", weight_bits=4)),
    "W4A16": Choice("4-bit weights, computes in float", Recipe("W4A16", weight_bits=4, activation_bits=16)),
    "W4A16 NF4": Choice(
        "the same, with Linear layers in NF4 by bitsandbytes",
        Recipe("W4A16 NF4", weight_bits=4, activation_bits=16, weight_format=NF4),
    ),
    "W4A16 FP4": Choice(
        "the same, with Linear layers in FP4 by bitsandbytes",
        Recipe("W4A16 FP4", weight_bits=4, activation_bits=16, weight_format=FP4),
    ),
    UNDER_A_SIZE: Choice("4, 8 or 16 bits per layer, at most size_mb", Recipe(UNDER_A_SIZE, mixed=True)),
    AT_A_QUALITY: Choice("4, 8 or 16 bits per layer, at least quality_db", Recipe(AT_A_QUALITY, mixed=True)),
}
PRESETS: dict[str, Recipe] = {name: choice.value for name, choice in RECIPES.items()}


@dataclass(frozen=True)
class Plan:
    """`layers`: layer path -> scheme. `reasons`: layer path -> one line why. `left`: path -> why it stays in float.
    `temporal`: where the temporal path is maintained, path -> how and why, one line for each of its layers."""

    recipe: Recipe
    layers: dict[str, Scheme]
    reasons: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    temporal: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Raises KeyError, TypeError or ValueError for what is no plan, or has a scheme that cannot be."""
        layers = {path: Scheme(**scheme) for path, scheme in data["layers"].items()}
        for path, scheme in layers.items():
            if problem := scheme.problem():
                raise ValueError(f"layer {path} has {problem}")
        temporal = dict(data.get("temporal", {}))
        return cls(Recipe(**data["recipe"]), layers, dict(data["reasons"]), dict(data["left"]), temporal)
