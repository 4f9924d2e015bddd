"""How the keys and values of a report read."""

import math
import re
from collections.abc import Mapping
from html import escape
from numbers import Integral, Real
from typing import Any, TypeGuard

_SHORT_LIST = 8
_SHORT_TEXT = 80
_NAMES = {"bytes": "Size", "seconds": "Time"}
_CAPITALS = frozenset("psnr ssim lpips tib tiar fsc tdq cpu gpu ram vram cfg lora id url vae".split())  # noqa: SIM905
_UNITS = {"db": "dB", "bytes": "bytes", "seconds": "seconds", "s": "seconds", "ms": "ms", "percent": "%"}


# Keys


def _words(key: object) -> list[str]:
    """The words of a snake_case key; none for anything else (a layer path, a model name, a prompt)."""
    text = str(key)
    return text.split("_") if re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", text) else []


def unit(key: object, inherited: str | None = None) -> str | None:
    words = _words(key)
    if not words or words == ["s"] or words[-1] not in _UNITS or "per" in words:
        return inherited
    return _UNITS[words[-1]]


def labels(mapping: Mapping[Any, Any]) -> dict[Any, str]:
    """A readable label per key, without the unit where that leaves no two alike."""
    short = {key: label(key, drop_unit=True) for key in mapping}
    texts = list(short.values())
    return {key: text if texts.count(text) == 1 else label(key, drop_unit=False) for key, text in short.items()}


def label(key: object, drop_unit: bool) -> str:
    words = _words(key)
    if not words:
        return str(key)
    if drop_unit and len(words) == 1:
        return _NAMES.get(words[0], _word(words[0], first=True))
    if drop_unit and unit(key):
        words = words[:-1]
    return " ".join(_word(word, first=index == 0) for index, word in enumerate(words))


def _word(word: str, first: bool) -> str:
    if word in _CAPITALS or re.fullmatch(r"w\d+(a\d+)?|a\d+", word):
        return word.upper()
    return word.capitalize() if first else word


# Values


def is_number(value: object) -> TypeGuard[Real]:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_scalar(value: object) -> bool:
    return not isinstance(value, Mapping | list | tuple | set | frozenset)


def is_short(value: object) -> bool:
    text = str(value)
    return len(text) <= _SHORT_TEXT and "\n" not in text


def is_before_after(value: object) -> TypeGuard[Mapping[str, Any]]:
    return (
        isinstance(value, Mapping)
        and set(value) == {"before", "after"}
        and all(is_number(v) and math.isfinite(v) for v in value.values())
        and value["before"] > 0
    )


def is_inline(value: object) -> bool:
    """Fits into a cell."""
    if isinstance(value, list | tuple):
        return len(value) <= _SHORT_LIST and all(is_scalar(v) and is_short(v) for v in value)
    return is_before_after(value) or (is_scalar(value) and "\n" not in str(value))


def inline(value: Any, unit: str | None, missing: str = "not measured") -> str:
    if isinstance(value, list | tuple):
        return ", ".join(scalar(v, unit) for v in value) or '<span class="none">none</span>'
    if is_before_after(value):
        return f"{scalar(value['before'], unit)} → {scalar(value['after'], unit)}"
    return scalar(value, unit, missing)


def scalar(value: Any, unit: str | None, missing: str = "not measured") -> str:
    if value is None:
        return f'<span class="none" title="not measured">{missing}</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not is_number(value):
        return escape(str(value))
    text, exact = _number(value, unit), str(value)
    return text if text == exact else f'<span title="{escape(exact)}">{text}</span>'


def _number(value: Real, unit: str | None) -> str:
    try:
        x = float(value)
    except OverflowError:  # an integer beyond every float
        return str(value)
    if math.isnan(x):
        return "not a number"
    if math.isinf(x):
        text = "∞" if x > 0 else "−∞"
        return text if unit is None else f"{text} {unit}"
    if unit == "bytes":
        return _size(x)
    if unit == "seconds":
        return _time(x)
    if unit == "dB":
        return f"{x:.2f} dB"
    text = f"{int(value):,}" if isinstance(value, Integral) and abs(x) >= 10_000 else _decimal(x)
    return text if unit is None else f"{text} {unit}"


def _decimal(x: float) -> str:
    if x == int(x) and abs(x) < 10_000:
        return str(int(x))
    if len(repr(x)) <= 4:
        return repr(x)
    if abs(x) < 1e-3:
        return f"{x:.2e}"
    if 0.9 <= abs(x) < 1:  # similarities live here: never round one to 1
        return f"{x:.5f}" if abs(x) < 0.99999 else repr(x)
    return f"{x:.4f}" if abs(x) < 10 else f"{x:.2f}" if abs(x) < 1000 else f"{x:,.0f}"


def _size(x: float) -> str:
    if abs(x) < 1000:
        return f"{x:.0f} bytes"
    for name in ("kB", "MB", "GB", "TB"):
        x /= 1000
        if abs(x) < 999.5 or name == "TB":
            break
    return f"{x:.2f} {name}" if abs(x) < 9.995 else f"{x:.1f} {name}" if abs(x) < 99.95 else f"{x:.0f} {name}"


def _time(x: float) -> str:
    if abs(x) < 1:
        return "0 s" if x == 0 else f"{x * 1e6:.0f} µs" if abs(x) < 1e-3 else f"{x * 1e3:.3g} ms"
    if abs(x) < 59.95:
        return f"{x:.2f} s" if abs(x) < 9.995 else f"{x:.1f} s"
    minutes, seconds = divmod(round(x), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    hours, minutes = divmod(round(x / 60), 60)
    return f"{hours} h {minutes:02} min"
