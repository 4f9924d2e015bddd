"""How near to float32 do quantized models stay? Ours and what others have, on a checkpoint and its outlier variant.

`python -m bench.quality [--checkpoint FILE] [--prompts FILE] [--device cpu|cuda] [--json FILE] [--count N] [--steps N]
[--cfg X] [--size N] [--only A,B] [--parts A,B] [--keep FOLDER]`. Every model samples the same prompts with the same
seeds (euler, normal); the pictures are compared with those of the float32 model. The outlier variant computes the same
function as the checkpoint with activations that are harder to quantize (`outliers.py`). All models but float32 are made
of the float16 model.

Beside the entries of both models there are, of the checkpoint, `temporal_ablation` (`temporal_ablation.py`) and
`dominates`: whether a mixed plan at the bytes of each other entry is at least as good.

`--only` and `--parts` measure some of it and add it to what FILE holds of the same run; `--keep` keeps the pictures of
float32 and the calibrations in FOLDER for the next of such calls (empty it when the code changes).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.quality.makers import MAKERS
from bench.quality.run import KNOWN_PARTS, OTHERS, OUTLIERS, REFERENCE, measure
from bench.quality.sampling import DEMO, PROMPTS
from demo import checkpoint

COUNT = 64
ENTRIES = (REFERENCE, *MAKERS)


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    logging.getLogger().setLevel(logging.ERROR)  # the host's own words on loading and moving models
    try:
        result = measure(given)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"bench quality: {error}", file=sys.stderr)
        return 1
    print(table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{result['prompts']} prompts, {result['sampling']['steps']} steps, {result['machine']}"]
    for title, part in (("checkpoint", result), ("outlier variant", result.get(OUTLIERS, {}))):
        heads = f"{'PSNR dB':>9}{'worst':>8}{'SSIM':>9}{'adherence':>11}{'MB':>8}{'memory':>8}{'seconds':>9}"
        lines += ["", f"{title:20}{heads}"]
        for name in ENTRIES:
            if name not in part:
                continue
            entry = part[name]
            cells = [entry["psnr_db"], entry["psnr_db_worst"], entry["ssim"], entry.get("adherence")]
            shown = [
                "-" if value is None else f"{value:.{digits}f}"
                for value, digits in zip(cells, (2, 2, 5, 3), strict=True)
            ]
            lines.append(
                f"  {name:18}{shown[0]:>9}{shown[1]:>8}{shown[2]:>9}{shown[3]:>11}{entry['bytes'] / 1e6:>8.1f}"
                f"{entry['resident_bytes'] / 1e6:>8.1f}{entry['seconds']:>9.1f}"
            )
    exact = result.get("outlier_variant", {}).get("float32_psnr_db_against_checkpoint", "not compared")
    lines += ["", f"float32 of the outlier variant against float32 of the checkpoint, dB: {exact or 'identical'}"]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.quality", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint.TARGET, help="SD1.5 format; default: the demo's")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="one per line")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--count", type=_positive, default=COUNT, help="prompts to test")
    parser.add_argument("--steps", type=_positive, help=f"default: {DEMO['steps']}")
    parser.add_argument("--cfg", type=float, help=f"default: {DEMO['cfg']:g} for the demo, else {OTHERS['cfg']:g}")
    parser.add_argument("--only", type=_among(MAKERS), metavar="A,B", help=f"entries: {', '.join(MAKERS)}")
    parser.add_argument("--parts", type=_among(KNOWN_PARTS), metavar="A,B", help=f"parts: {', '.join(KNOWN_PARTS)}")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for runs in pieces")
    parser.add_argument(
        "--size", type=_eights, help=f"pixels; default: {DEMO['size']} for the demo, else {OTHERS['size']}"
    )
    return parser


def _among(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        wanted = [name.strip() for name in text.split(",")]
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; there is: {', '.join(known)}")
        return wanted

    return names


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _eights(text: str) -> int:
    value = _positive(text)
    if value % 8:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 8 pixels")
    return value


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    raise SystemExit(main())
