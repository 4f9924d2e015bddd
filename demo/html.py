"""One HTML file with pictures and tables that needs nothing beside it: no script, no network, no other file."""

import base64
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

from tfmq.atomic import write_bytes

_FIGURES = 6  # headline figures in a row at most
_MANY_ROWS = 12
_SHORT_LIST = 8
_SHORT_TEXT = 80
_WIDE = 1.8  # width over height from which a picture takes two columns
_LARGE = 700  # pixels of width from which it takes the whole row, ...
_FEW_LARGE = 4  # ... as long as there are no more than this
_ENLARGED = 400  # pixels of width under which the page shows the pixels, not a blur

_NAMES = {"bytes": "Size", "seconds": "Time"}
_CAPITALS = frozenset("psnr ssim lpips tib tiar fsc tdq cpu gpu ram vram cfg lora id url vae".split())  # noqa: SIM905
_UNITS = {"db": "dB", "bytes": "bytes", "seconds": "seconds", "s": "seconds", "ms": "ms", "percent": "%"}
_HINTS = {
    "psnr_db": "peak signal-to-noise ratio; higher is closer to the reference",
    "ssim": "structural similarity; 1 is identical",
    "lpips": "learned perceptual distance; 0 is identical",
}
_MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
_STYLE = Path(__file__).with_name("page.css")


def write(
    path: str | os.PathLike[str],
    report: Mapping[str, Any],
    images: Sequence[tuple[str, Path]] = (),
    title: str = "TFMQ report",
) -> None:
    """Write `report` (nested dicts and lists, as in report.json) and `images` (caption, picture file) as one page.

    Top-level numbers, and dicts of just `before` and `after`, become headline figures; top-level texts a line under the
    title; other dicts become sections, a dict of like dicts or a list of dicts becomes a table with a column per key.
    Units come from the keys: `bytes`, `seconds` and the endings `_db`, `_bytes`, `_seconds`, `_s`, `_ms`, `_percent`;
    keys without one take that of the dict's own key. None reads "not measured". Pictures (PNG, JPEG, WebP, GIF) are
    embedded. All text is escaped. The same input gives the same bytes; the file is written whole or not at all.
    Raises ValueError for a picture that cannot be read, OSError where the page cannot be written.
    """
    facts, figures, sections = [], [], []
    labels = _labels(report)
    for key, value in report.items():
        label, unit = labels[key], _unit(key)
        if _is_before_after(value):
            figures.append(_change(label, value, unit))
        elif value is None or _is_number(value):
            figures.append(_figure(label, _scalar(value, unit), _HINTS.get(str(key), "")))
        elif _is_scalar(value) and _is_short(value):
            facts.append(f"<div><dt>{escape(label)}</dt><dd>{_scalar(value, unit)}</dd></div>")
        else:
            sections.append(_section(label, value, unit, level=2))
    body = [
        f"<header><h1>{escape(title)}</h1>",
        f'<dl class="facts">{"".join(facts)}</dl>' if facts else "",
        "</header><main>",
        _figures(figures),
        _gallery(images),
        *sections,
        "</main>",
    ]
    page = _PAGE.format(
        title=escape(title), style=_STYLE.read_text(encoding="utf-8"), body="\n".join(part for part in body if part)
    )
    # A lone surrogate (from a file name that is not UTF-8) must not cost the report.
    write_bytes(path, page.encode("utf-8", "backslashreplace"))


# Keys


def _words(key: object) -> list[str]:
    """The words of a snake_case key; none for anything else (a layer path, a model name, a prompt)."""
    text = str(key)
    return text.split("_") if re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", text) else []


def _unit(key: object, inherited: str | None = None) -> str | None:
    words = _words(key)
    if not words or words == ["s"] or words[-1] not in _UNITS or "per" in words:
        return inherited
    return _UNITS[words[-1]]


def _labels(mapping: Mapping[Any, Any]) -> dict[Any, str]:
    """A readable label per key, without the unit where that leaves no two alike."""
    short = {key: _label(key, drop_unit=True) for key in mapping}
    texts = list(short.values())
    return {key: text if texts.count(text) == 1 else _label(key, drop_unit=False) for key, text in short.items()}


def _label(key: object, drop_unit: bool) -> str:
    words = _words(key)
    if not words:
        return str(key)
    if drop_unit and len(words) == 1:
        return _NAMES.get(words[0], _word(words[0], first=True))
    if drop_unit and _unit(key):
        words = words[:-1]
    return " ".join(_word(word, first=index == 0) for index, word in enumerate(words))


def _word(word: str, first: bool) -> str:
    if word in _CAPITALS or re.fullmatch(r"w\d+(a\d+)?|a\d+", word):
        return word.upper()
    return word.capitalize() if first else word


# Values


def _is_number(value: object) -> TypeGuard[Real]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_scalar(value: object) -> bool:
    return not isinstance(value, Mapping | list | tuple | set | frozenset)


def _is_short(value: object) -> bool:
    text = str(value)
    return len(text) <= _SHORT_TEXT and "\n" not in text


def _is_before_after(value: object) -> TypeGuard[Mapping[str, Any]]:
    return (
        isinstance(value, Mapping)
        and set(value) == {"before", "after"}
        and all(_is_number(v) and math.isfinite(v) for v in value.values())
        and value["before"] > 0
    )


def _is_inline(value: object) -> bool:
    """Fits into a cell."""
    if isinstance(value, list | tuple):
        return len(value) <= _SHORT_LIST and all(_is_scalar(v) and _is_short(v) for v in value)
    return _is_before_after(value) or (_is_scalar(value) and "\n" not in str(value))


def _inline(value: Any, unit: str | None, missing: str = "not measured") -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_scalar(v, unit) for v in value) or '<span class="none">none</span>'
    if _is_before_after(value):
        return f"{_scalar(value['before'], unit)} → {_scalar(value['after'], unit)}"
    return _scalar(value, unit, missing)


def _scalar(value: Any, unit: str | None, missing: str = "not measured") -> str:
    if value is None:
        return f'<span class="none" title="not measured">{missing}</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not _is_number(value):
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


# Blocks


def _figures(figures: Sequence[str]) -> str:
    if not figures:
        return ""
    rows = -(-len(figures) // _FIGURES)
    columns = -(-len(figures) // rows)  # rows as even as can be: seven are four and three
    return f'<div class="figures" style="--n:{columns}">{"".join(figures)}</div>'


def _figure(label: str, value: str, hint: str, below: str = "") -> str:
    hint = f"<small>{escape(hint)}</small>" if hint else ""
    return f'<div class="figure"><span>{escape(label)}</span><b>{value}</b>{below}{hint}</div>'


def _change(label: str, value: Mapping[str, Any], unit: str | None) -> str:
    share = value["after"] / value["before"]
    bar = f'<i class="bar"><i style="width:{min(max(share, 0), 1):.1%}"></i></i>'
    below = f"<small>{share * 100:.0f} % of {_scalar(value['before'], unit)} before</small>"
    return _figure(label, _scalar(value["after"], unit), "", bar + below)


def _section(label: str, value: Any, unit: str | None, level: int) -> str:
    small = isinstance(value, Mapping) and all(_is_inline(v) and _is_short(v) for v in value.values())
    heading = f"h{min(level, 6)}"
    content = _block(value, unit, level)
    opening = '<section class="small">' if small else "<section>"
    return f"{opening}<{heading}>{escape(label)}</{heading}>{content}</section>"


def _block(value: Any, unit: str | None, level: int) -> str:
    if isinstance(value, Mapping):
        return _mapping(value, unit, level)
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if not isinstance(value, list | tuple):
        return f'<p class="text">{_scalar(value, unit)}</p>'
    if value and all(isinstance(v, Mapping) for v in value):
        return _table([(None, row) for row in value], unit, level)
    if all(_is_scalar(v) for v in value):
        return _values(value, unit)
    return "".join(_section(str(index), v, unit, level + 1) for index, v in enumerate(value, 1))


def _mapping(value: Mapping[Any, Any], unit: str | None, level: int) -> str:
    if not value:
        return '<p class="none">nothing</p>'
    rows = list(value.items())
    if len(rows) > 1 and all(isinstance(row, Mapping) and not _is_before_after(row) for _, row in rows):
        filled = sum(_is_inline(cell) for _, row in rows for cell in row.values())
        if filled and 2 * filled >= len(rows) * len(_columns(rows)):  # alike enough
            return _table(rows, unit, level)
    labels = _labels(value)
    out, pairs = [], []
    for key, item in rows:
        if _is_inline(item):
            cell = _inline(item, _unit(key, unit))
            kind = ' class="number"' if _is_number(item) or item is None or _is_before_after(item) else ""
            pairs.append(f'<tr><th scope="row" title="{escape(str(key))}">{escape(labels[key])}</th>')
            pairs.append(f"<td{kind}>{cell}</td></tr>")
        else:
            out.append(_section(labels[key], item, _unit(key, unit), level + 1))
    if pairs:
        out.insert(0, f'<table class="pairs"><tbody>{"".join(pairs)}</tbody></table>')
    return "".join(out)


def _columns(rows: Sequence[tuple[Any, Mapping[Any, Any]]]) -> dict[Any, None]:
    """Keys that fit into a cell in some row, in order of appearance."""
    return {key: None for _, row in rows for key, cell in row.items() if _is_inline(cell)}


def _table(rows: Sequence[tuple[Any, Mapping[Any, Any]]], unit: str | None, level: int) -> str:
    """A column per key; what does not fit into a cell follows in sections of its own. A row's name None: unnamed."""
    columns = _columns(rows)
    labels = _labels(columns)
    named = any(name is not None for name, _ in rows)
    numeric = {key for key in columns if all(_is_number(row.get(key)) or row.get(key) is None for _, row in rows)}

    def kind(key: Any) -> str:
        return ' class="number"' if key in numeric else ""

    head = "<td></td>" if named else ""
    for key in columns:
        hint = escape(_HINTS.get(str(key), str(key)))
        head += f'<th scope="col"{kind(key)} title="{hint}">{escape(labels[key])}</th>'
    lines, rest = [], []
    for index, (name, row) in enumerate(rows, 1):
        line = f'<th scope="row">{escape(str(name))}</th>' if named else ""
        for key in columns:
            fits = key in row and _is_inline(row[key])
            cell = _inline(row[key], _unit(key, unit), "–") if fits else '<span class="none">–</span>'
            line += f"<td{kind(key)}>{cell}</td>"
        lines.append(f"<tr>{line}</tr>")
        for key, item in row.items():
            if not _is_inline(item):
                label = f"{index if name is None else name}: {_label(key, drop_unit=True)}"
                rest.append(_section(label, item, _unit(key, unit), level + 1))
    table = (
        f'<div class="scroll" tabindex="0"><table class="columns"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    if len(rows) > _MANY_ROWS:
        table = f"<details><summary>{len(rows)} rows</summary>{table}</details>"
    return table + "".join(rest)


def _values(values: Sequence[Any], unit: str | None) -> str:
    if not values:
        return '<p class="none">nothing</p>'
    if not all(_is_number(v) for v in values):
        items = f"<ul>{''.join(f'<li>{_scalar(v, unit)}</li>' for v in values)}</ul>"
        if len(values) <= _MANY_ROWS:
            return items
        return f"<details><summary>{len(values)} entries</summary>{items}</details>"
    text = f"<p>{', '.join(_scalar(v, unit) for v in values)}</p>"
    if len(values) <= _MANY_ROWS:
        return text
    low, high = _scalar(min(values), unit), _scalar(max(values), unit)
    return f"<details><summary>{len(values)} values from {low} to {high}</summary>{text}</details>"


# Pictures


def _gallery(images: Sequence[tuple[str, Path]]) -> str:
    if not images:
        return ""
    pictures = [(caption, *_read(Path(path))) for caption, path in images]
    few_large = sum(width >= _LARGE for _, _, width, _ in pictures) <= _FEW_LARGE
    figures = []
    for caption, source, width, height in pictures:
        classes = ["pixels"] if width < _ENLARGED else []
        if width >= _LARGE and few_large:
            classes.append("full")
        elif width >= _WIDE * height:
            classes.append("wide")
        text = escape(caption)
        # The check box is the whole of the enlarging: no script.
        figures.append(
            f'<figure class="{" ".join(classes)}" style="--w:{width}px;--a:{width / height:.4f}">'
            f'<label><input type="checkbox" aria-label="Enlarge {text}"><span>'
            f'<img src="{source}" width="{width}" height="{height}" alt="{text}"></span></label>'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return f'<section><h2>Pictures</h2><div class="gallery">{"".join(figures)}</div></section>'


def _read(path: Path) -> tuple[str, int, int]:
    """Data URI, width, height."""
    from PIL import Image

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=list(_MIME)) as image:
            image.load()  # a truncated file fails here, not in the reader's browser
            kind, (width, height) = _MIME[str(image.format)], image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"The picture {path} cannot be put into the report ({error}): give a whole PNG, JPEG, WebP or GIF file."
        ) from error
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}", width, height


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
