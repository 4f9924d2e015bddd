"""At most 60 lines on what bench/gpu_check.py found. Standard library only; whatever is missing is left out."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

from bench.gpu.case import BAD, OK, SKIPPED

Record = dict[str, Any]
LINES, WIDTH = 60, 160


def failed(records: list[Record]) -> list[Record]:
    """Cases that went wrong and stages that did not begin."""
    return [r for r in records if r.get("event") in BAD or (r.get("event"), r.get("status")) == ("stage", "broken")]


def summary(records: list[Record], seconds: float) -> list[str]:
    """records: the lines of results.jsonl in their order. seconds: that it took."""
    bad = failed(records)
    figures: list[str] = []
    for part in PARTS:
        try:
            figures += part(records)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            figures.append(f"{part.__name__.strip('_')}: cannot be summed up ({type(error).__name__}: {error})")
    stages = _stages(records)
    head = [f"TFMQ GPU check: {seconds:.0f} s, {len(bad)} failed"]
    room = LINES - len(head) - len(stages) - 1
    faults = _faults(bad, max(room // 2, room - len(figures)))
    lines = [*head, *stages, *faults, *figures]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"... {len(lines) - LINES + 1} more lines of figures are in results.jsonl"]
    return [line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in lines]


def _stages(records: list[Record]) -> list[str]:
    asked: list[str] = next((r.get("stages", []) for r in records if r.get("event") == "run"), [])
    lines = []
    for name in asked:
        own = [r for r in records if r.get("stage") == name]
        last = next((r for r in reversed(own) if r.get("event") == "stage"), None)
        counts = [(event, sum(r.get("event") == event for r in own)) for event in (OK, SKIPPED, *BAD)]
        said = ", ".join(f"{count} {event}" for event, count in counts if count)
        if last is None:
            status, seconds = "did not end", 0.0
        else:
            status, seconds = last["status"], last["seconds"]
            not_run = last.get("not_run", [])
            if last.get("reason"):
                status = f"{status.upper() if status in ('cut', 'broken') else status}: {last['reason']}"
            if not_run:
                status += f"; {len(not_run)} not run: {', '.join(not_run)}"
        lines.append(f"{name:9s}{seconds:6.1f} s  {said}{'; ' if said and status != 'ran' else ''}"
                     f"{'' if status == 'ran' else status}")  # fmt: skip
    return lines


def _faults(bad: list[Record], room: int) -> list[str]:
    """Every case by name; with its error while there is room."""
    cases = [r for r in bad if r["event"] in BAD]
    whole = len(cases)
    if 2 * whole > room:
        whole = max(0, (room - len(_packed([_named(r) for r in cases]))) // 2)
    lines = []
    for r in cases[:whole]:
        text = f"{r['event'].upper()} {r['stage']}/{r['case']}: {r.get('error', '')}"
        lines += textwrap.wrap(text, WIDTH, max_lines=2, placeholder="...", subsequent_indent="    ")
    return lines + _packed([_named(r) for r in cases[whole:]])


def _named(record: Record) -> str:
    return f"{record['stage']}/{record['case']} {record['event']}"


def _packed(names: list[str]) -> list[str]:
    """As few lines as hold all names; none is broken."""
    lines: list[str] = []
    for name in names:
        if lines and len(lines[-1]) + len(name) + 2 <= WIDTH:
            lines[-1] += f", {name}"
        else:
            lines.append(f"also: {name}")
    return lines


# --- figures, stage by stage ----------------------------------------------------------------------------------------


def _data(records: list[Record], stage: str) -> dict[str, Record]:
    """Case -> what it found."""
    return {
        r["case"]: r.get("data", {}) for r in records if r.get("stage") == stage and r.get("event") in (OK, *BAD)
        and r.get("data")
    }  # fmt: skip


def _env(records: list[Record]) -> list[str]:
    found = _data(records, "env")
    lines = []
    if "versions" in found:
        lines.append(", ".join(f"{name} {value}" for name, value in found["versions"].items()))
    units = {"copy": ("gb_per_s", "GB/s"), "fp16": ("tops", "TFLOPS"), "int_mm": ("tops", "TOPS")}
    reached = [f"{name} {found[name][key]:.0f} {unit}" for name, (key, unit) in units.items() if name in found]
    if "compiler" in found:
        reached.append("compiler {compiler}, Python.h {python_h}".format(**found["compiler"]))
    return [*lines, *([", ".join(reached)] if reached else [])]


def _compile(records: list[Record]) -> list[str]:
    found = _data(records, "compile")
    if not found:
        return []
    seconds = sorted(d["compile_s"] for d in found.values())
    spilled = {name: d["spills"] for name, d in found.items() if d.get("spills")}
    worst = sorted(spilled, key=lambda name: -spilled[name])[:3]
    line = f"compile: {len(found)} variants, median {seconds[len(seconds) // 2]:.1f} s, most {seconds[-1]:.1f} s, "
    line += f"{len(spilled)} spill" + (f" ({', '.join(f'{name} {spilled[name]}' for name in worst)})" if worst else "")
    instructions: dict[str, int] = {}
    for data in found.values():
        if data.get("instruction"):
            instructions[data["instruction"]] = instructions.get(data["instruction"], 0) + 1
    return [line + "".join(f", {count} {name}" for name, count in instructions.items())]


OPS = {"fp16": "fp16", "int_mm": "int_mm", "product_w8a8": "product", "quantize": "quantize", "ours_w8a8": "ours",
       "ours_w4a8": "W4A8"}  # fmt: skip


def _ops(records: list[Record]) -> list[str]:
    """A table: a line must hold the ratio and the tiles."""
    lines = []
    for name, data in _data(records, "ops").items():
        us = data.get("median_us", {})
        line = f"{name:30s}" + "".join(f"{us[key]:9.1f}" if key in us else f"{'-':>9s}" for key in OPS)
        both = "ours_w8a8" in us and "fp16" in us
        line += f"{us['fp16'] / us['ours_w8a8']:13.2f}" if both else f"{'-':>13s}"
        best, chosen = data.get("best"), data.get("chosen")
        if best:
            before = f"{_tile(chosen['tile'])} {chosen['us']:.1f}" if chosen else "-"
            line += f"  {before}; {_tile(best['tile'])} {best['us']:.1f}"
        lines.append(line)
    head = f"{'ops, us by graph':30s}" + "".join(f"{title:>9s}" for title in OPS.values())
    return [f"{head}{'fp16 / ours':>13s}  tile chosen; best", *lines] if lines else []


def _tile(tile: list[int]) -> str:
    return "x".join(map(str, tile))


def _host(records: list[Record]) -> list[str]:
    found = _data(records, "host")
    each = [
        f"{name} {data['us']:.0f} us" + (f" {data['launches']:g} launches" if "launches" in data else "")
        for name, data in found.items() if "us" in data
    ]  # fmt: skip
    return [f"host time per call: {', '.join(each)}"] if each else []


def _networks(records: list[Record]) -> list[str]:
    lines = []
    for stage in ("sd15", "sdxl"):
        found = _data(records, stage)
        ms = {name: data["ms"] for name, data in found.items() if "ms" in data}
        if ms:
            lines.append(f"{stage} ms a step: " + ", ".join(f"{name} {value:.1f}" for name, value in ms.items()))
        ratios = [
            f"{how} {ms[f'fp16 {how}'] / ms[f'ours {how}']:.2f}"
            for how in ("eager", "graph", "NCHW") if f"fp16 {how}" in ms and f"ours {how}" in ms
        ]  # fmt: skip
        if ratios:
            lines.append(f"{stage} fp16 / ours: " + ", ".join(ratios))
        errors = [f"{name} {data['error']:.4f}" for name, data in found.items() if "error" in data]
        peaks = [f"{name} {data['peak_mb']:.0f} MB" for name, data in found.items() if "peak_mb" in data]
        if errors or peaks:
            lines.append(f"{stage} error against float32: {', '.join(errors)}; peak: {', '.join(peaks)}")
        for name in ("ours profile", "fp16 profile"):
            top = found.get(name, {}).get("top", [])[:4]
            if top:
                launches = found[name].get("launches")
                each = ", ".join(f"{row['name'][:24]} {row['ms']:.1f}" for row in top)
                lines.append(f"{stage} {name}: {launches} launches; ms: {each}")
    return lines


def _compiled(records: list[Record]) -> list[str]:
    found = {name: d["ms"] for name, d in _data(records, "compiled").items() if "ms" in d}
    return [f"compiled ms: {', '.join(f'{name} {ms:.1f}' for name, ms in found.items())}"] if found else []


def _comfy(records: list[Record]) -> list[str]:
    lines = []
    for name, data in _data(records, "comfy").items():
        lines.append(
            f"comfy {name}: "
            + ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in data.items())
        )
    return lines


PARTS: tuple[Callable[[list[Record]], list[str]], ...] = (
    _env, _compile, _networks, _ops, _host, _compiled, _comfy
)  # fmt: skip
