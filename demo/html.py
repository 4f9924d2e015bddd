"""One HTML file with pictures and tables that needs nothing beside it: no script, no network, no other file."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from demo import wording
from demo.gallery import gallery
from tfmq.atomic import write_bytes

_FIGURES = 6  # headline figures in a row at most
_MANY_ROWS = 12
_HINTS = {
    "psnr_db": "peak signal-to-noise ratio; higher is closer to the reference",
    "ssim": "structural similarity; 1 is identical",
    "lpips": "learned perceptual distance; 0 is identical",
}
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
    labels = wording.labels(report)
    for key, value in report.items():
        label, unit = labels[key], wording.unit(key)
        if wording.is_before_after(value):
            figures.append(_change(label, value, unit))
        elif value is None or wording.is_number(value):
            figures.append(_figure(label, wording.scalar(value, unit), _HINTS.get(str(key), "")))
        elif wording.is_scalar(value) and wording.is_short(value):
            facts.append(f"<div><dt>{escape(label)}</dt><dd>{wording.scalar(value, unit)}</dd></div>")
        else:
            sections.append(_section(label, value, unit, level=2))
    body = [
        f"<header><h1>{escape(title)}</h1>",
        f'<dl class="facts">{"".join(facts)}</dl>' if facts else "",
        "</header><main>",
        _figures(figures),
        gallery(images),
        *sections,
        "</main>",
    ]
    page = _PAGE.format(
        title=escape(title), style=_STYLE.read_text(encoding="utf-8"), body="\n".join(part for part in body if part)
    )
    # A lone surrogate (from a file name that is not UTF-8) must not cost the report.
    write_bytes(path, page.encode("utf-8", "backslashreplace"))


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
    below = f"<small>{share * 100:.0f} % of {wording.scalar(value['before'], unit)} before</small>"
    return _figure(label, wording.scalar(value["after"], unit), "", bar + below)


def _section(label: str, value: Any, unit: str | None, level: int) -> str:
    small = isinstance(value, Mapping) and all(wording.is_inline(v) and wording.is_short(v) for v in value.values())
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
        return f'<p class="text">{wording.scalar(value, unit)}</p>'
    if value and all(isinstance(v, Mapping) for v in value):
        return _table([(None, row) for row in value], unit, level)
    if all(wording.is_scalar(v) for v in value):
        return _values(value, unit)
    return "".join(_section(str(index), v, unit, level + 1) for index, v in enumerate(value, 1))


def _mapping(value: Mapping[Any, Any], unit: str | None, level: int) -> str:
    if not value:
        return '<p class="none">nothing</p>'
    rows = list(value.items())
    if len(rows) > 1 and all(isinstance(row, Mapping) and not wording.is_before_after(row) for _, row in rows):
        filled = sum(wording.is_inline(cell) for _, row in rows for cell in row.values())
        if filled and 2 * filled >= len(rows) * len(_columns(rows)):  # alike enough
            return _table(rows, unit, level)
    labels = wording.labels(value)
    out, pairs = [], []
    for key, item in rows:
        if wording.is_inline(item):
            cell = wording.inline(item, wording.unit(key, unit))
            kind = ' class="number"' if wording.is_number(item) or item is None or wording.is_before_after(item) else ""
            pairs.append(f'<tr><th scope="row" title="{escape(str(key))}">{escape(labels[key])}</th>')
            pairs.append(f"<td{kind}>{cell}</td></tr>")
        else:
            out.append(_section(labels[key], item, wording.unit(key, unit), level + 1))
    if pairs:
        out.insert(0, f'<table class="pairs"><tbody>{"".join(pairs)}</tbody></table>')
    return "".join(out)


def _columns(rows: Sequence[tuple[Any, Mapping[Any, Any]]]) -> dict[Any, None]:
    """Keys that fit into a cell in some row, in order of appearance."""
    return {key: None for _, row in rows for key, cell in row.items() if wording.is_inline(cell)}


def _table(rows: Sequence[tuple[Any, Mapping[Any, Any]]], unit: str | None, level: int) -> str:
    """A column per key; what does not fit into a cell follows in sections of its own. A row's name None: unnamed."""
    columns = _columns(rows)
    labels = wording.labels(columns)
    named = any(name is not None for name, _ in rows)
    numeric = {
        key for key in columns if all(wording.is_number(row.get(key)) or row.get(key) is None for _, row in rows)
    }

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
            fits = key in row and wording.is_inline(row[key])
            cell = wording.inline(row[key], wording.unit(key, unit), "–") if fits else '<span class="none">–</span>'
            line += f"<td{kind(key)}>{cell}</td>"
        lines.append(f"<tr>{line}</tr>")
        for key, item in row.items():
            if not wording.is_inline(item):
                label = f"{index if name is None else name}: {wording.label(key, drop_unit=True)}"
                rest.append(_section(label, item, wording.unit(key, unit), level + 1))
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
    if not all(wording.is_number(v) for v in values):
        items = f"<ul>{''.join(f'<li>{wording.scalar(v, unit)}</li>' for v in values)}</ul>"
        if len(values) <= _MANY_ROWS:
            return items
        return f"<details><summary>{len(values)} entries</summary>{items}</details>"
    text = f"<p>{', '.join(wording.scalar(v, unit) for v in values)}</p>"
    if len(values) <= _MANY_ROWS:
        return text
    low, high = wording.scalar(min(values), unit), wording.scalar(max(values), unit)
    return f"<details><summary>{len(values)} values from {low} to {high}</summary>{text}</details>"


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
