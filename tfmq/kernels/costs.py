"""What a kind of Linear layer costs in time, for the plan's choice between them."""

from __future__ import annotations

from dataclasses import dataclass

NARROW = 320  # input channels, with which the product takes little of a layer's time


@dataclass(frozen=True)
class Costs:
    """Times over that of a static layer. `dynamic`: of a per-token one; `narrow`: of a per-token one of up to NARROW
    input channels, where that is more. `rotation`: what a rotation of the input adds, of any shape.
    """

    dynamic: float = 1.0
    rotation: float = 0.0
    narrow: float = 0.0

    def per_token(self, channels: int) -> float:
        """Of a per-token layer. channels: of its input."""
        return max(self.dynamic, self.narrow) if channels <= NARROW else self.dynamic

    def of_rotation(self, shape: tuple[int, ...], group: int, permutations: int = 0, balanced: bool = False) -> float:
        """What a rotation adds, over the time of the static layer. shape: of the weight, [N, K]; group: its block size;
        permutations: how many of the channels; balanced: whether the input is balanced before it."""
        return self.rotation


@dataclass(frozen=True)
class GpuCosts(Costs):
    """A rotation by a roofline, from the shape of its layer.

    Counted per row of the input, of which there are many, in bytes that the memory moves meanwhile. The static layer:
    16 bits read and 8 written per channel by its quantization; its product reads codes, writes 16 bits and multiplies
    in int8. A rotation: every pass reads and writes 16 bits and multiplies in 16 bits, and a permutation and a balance
    read and write 16 bits once more each. Not counted: launches, and reading the weight.

    `float16`, `int8`: operations in the time of a byte. These are of the RTX 4090's data sheet (1008 GB/s, 165.2 TFLOPS
    in float16 with float32 sums, 660.6 TOPS in int8); nothing was measured. With those of a 3090, a 5090, an A100 or an
    H100 the costs are between 0.5 and 1.5 of these.
    """

    float16: float = 165.2e12 / 1008e9
    int8: float = 660.6e12 / 1008e9

    def of_rotation(self, shape: tuple[int, ...], group: int, permutations: int = 0, balanced: bool = False) -> float:
        n, k = shape[0], shape[1]
        layer = 3 * k + max(2 * n * k / self.int8, k + 2 * n)
        one_pass = max(4 * k, 2 * k * group / self.float16)
        return (max(1, permutations) * one_pass + (permutations + balanced) * 4 * k) / layer


FREE = Costs()
