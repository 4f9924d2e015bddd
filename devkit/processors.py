"""Other processors that this one can play: which instructions torch's libraries may use. Standard library only.

`ONEDNN_MAX_CPU_ISA` bounds oneDNN's kernels, `ATEN_CPU_CAPABILITY` torch's own, `MKL_ENABLE_INSTRUCTIONS` MKL's (matrix
products in float32). Each is read once per process. A bound above what the processor has changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    """words: what it stands for. needs: flags of /proc/cpuinfo without which it would be another. variables: of the
    environment."""

    words: str
    needs: tuple[str, ...]
    variables: dict[str, str]


def _bounds(onednn: str, aten: str | None = None, mkl: str | None = None) -> dict[str, str]:
    given = {"ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten, "MKL_ENABLE_INSTRUCTIONS": mkl}
    return {name: value for name, value in given.items() if value is not None}


PROCESSORS = {
    "amx": Processor(
        "Intel from Sapphire Rapids on: int8 tiles", ("amx_int8",), _bounds("AVX512_CORE_AMX")
    ),
    "avx512-bf16": Processor(
        "AMD from Zen 4, Intel Cooper Lake", ("avx512_bf16",), _bounds("AVX512_CORE_BF16")
    ),
    "avx512-vnni": Processor(
        "Intel Cascade Lake to Tiger Lake", ("avx512_vnni",), _bounds("AVX512_CORE_VNNI")
    ),
    "avx2-vnni": Processor(
        "Intel Core from the 12th generation on", ("avx_vnni",), _bounds("AVX2_VNNI", "avx2", "AVX2")
    ),
    "avx2": Processor(
        "most of 2013 to 2022, AMD up to Zen 3: no integer instructions that oneDNN's sums could trust",
        ("avx2",), _bounds("AVX2", "avx2", "AVX2"),
    ),
    "sse4": Processor(
        "no vectors of eight at all: torch's plain code", (), _bounds("SSE41", "default", "SSE4_2")
    ),
}  # fmt: skip


def flags(text: str) -> frozenset[str]:
    """Those of the first processor in the text of /proc/cpuinfo."""
    lines = (line.partition(":") for line in text.splitlines())
    return frozenset(next((value for name, _, value in lines if name.strip() == "flags"), "").split())


def variables(name: str, cpuinfo: str) -> dict[str, str]:
    """Of the processor called `name`. cpuinfo: the text of /proc/cpuinfo, empty where there is none.

    Raises ValueError, with a sentence, for a name that is none, or that this processor cannot play.
    """
    if name not in PROCESSORS:
        raise ValueError(f"There is no processor {name!r}; there is: {', '.join(PROCESSORS)}.")
    lacking = set(PROCESSORS[name].needs) - flags(cpuinfo) if cpuinfo else set()
    if lacking:
        raise ValueError(f"This processor has no {', '.join(sorted(lacking))}: it cannot play {name}.")
    return PROCESSORS[name].variables
