"""What a calibration knows about one layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..scheme import Scheme


@dataclass(frozen=True)
class LayerStatistics:
    """What was learnt about one layer.

    kind: "linear" or "conv2d". shape: of the weight. order: place in the order of execution. All else is equal in
    Linear layers that read one tensor. low, high [I]: least and
    greatest balanced input. balance [K] or None. histogram [I, B] of the balanced input over equal bins of
    [bin_low, bin_high]. row_error [I, 2]: squared error of per-token quantization, and energy (zeros for conv2d).
    vector: every input had one row per image (no tokens, no pixels). branches [2, I, B]: the histogram of the
    conditional and of the unconditional rows, only where a grid for each lowers the error. rotated: the same about the
    rotated input (`rotation`), or None where the channels do not divide into blocks; permutations [1, K] or [2, K]:
    of that rotation, or None. weight_error [2, 2]: squared error of the weight, plain and rotated, in 8 and in 4 bits,
    on the scale on which the error of an input is relative (`observe.rotation`).
    mean_square [K]: of the balanced input's channels. rows [R, K']: a sample of what the weight is multiplied by before
    balance and rotation, bfloat16, in the order of `weight.flatten(1)`; None of a grouped convolution and of a vector.
    Intervals that no call visited have zero counts.
    """

    kind: str
    shape: tuple[int, ...]
    order: int
    low: Tensor
    high: Tensor
    balance: Tensor | None
    histogram: Tensor
    bin_low: Tensor
    bin_high: Tensor
    row_error: Tensor
    vector: bool = False
    branches: Tensor | None = None
    mean_square: Tensor | None = None
    rotated: LayerStatistics | None = None
    permutations: Tensor | None = None
    weight_error: Tensor | None = None
    rows: Tensor | None = None

    def under(self, scheme: Scheme) -> LayerStatistics:
        """The statistics of the input that is quantized: of the rotated one where the scheme says so."""
        return self.rotated if scheme.rotation and self.rotated is not None else self
