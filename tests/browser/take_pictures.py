"""Take the pictures of the example workflows anew: `PYTHONPATH=.:tests .venv/bin/python -m browser.take_pictures`.

Both workflows run on the demo checkpoint first. Writes docs/images/<name>.jpg and example_workflows/<name>.jpg.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from browser import front_end
from demo import checkpoint
from demo.adapt import for_demo
from demo.run import CALIBRATION, PROMPTS
from devkit import workflow
from devkit.host import Server
from devkit.paths import ROOT, WORKFLOWS

SCALE, MARGIN = 0.75, 30  # pixels per unit of the graph; units around it
THUMBNAIL = 512


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        base = Path(folder)
        front_end.prepare(base)
        with Server(base, {"checkpoints": [checkpoint.ensure()]}) as server:
            browser = front_end.launch(playwright)
            page = front_end.FrontEnd(browser.new_page(viewport={"width": 1600, "height": 900}), server)
            for name in ("quantize_sd15", "load_sd15"):
                take(page, name)
            browser.close()


def take(page: front_end.FrontEnd, name: str) -> None:
    """Run one workflow and photograph its graph."""
    info = page.server.client.object_info()
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    shipped = workflow.load(WORKFLOWS / f"{name}.json")
    file = checkpoint.ensure().name
    page.refresh()  # the second example wants the file that the first one saved
    page.drop(name, for_demo(shipped, info, file, prompts[0], prompts[-CALIBRATION:]))
    page.run(timeout=500)
    page.pictures("SaveImage")
    picture = photograph(page)
    picture.save(ROOT / "docs" / "images" / f"{name}.jpg", quality=82, optimize=True)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(WORKFLOWS / f"{name}.jpg", quality=85, optimize=True)


def photograph(page: front_end.FrontEnd) -> Image.Image:
    """The whole graph, without the front end around it."""
    tab = page.page
    left, top, right, bottom = tab.evaluate(
        """() => {
            const boxes = [...app.graph.nodes.map(n => n.getBounding()), ...app.graph.groups.map(g => g._bounding)];
            return [Math.min(...boxes.map(b => b[0])), Math.min(...boxes.map(b => b[1])),
                    Math.max(...boxes.map(b => b[0] + b[2])), Math.max(...boxes.map(b => b[1] + b[3]))];
        }"""
    )
    width, height = (round((span + 2 * MARGIN) * SCALE) for span in (right - left, bottom - top))
    bar = 150  # room for the front end's own bars, which are cut away
    tab.set_viewport_size({"width": width + 2 * bar, "height": height + 2 * bar})
    tab.wait_for_timeout(1000)
    tab.evaluate(
        """([left, top, scale, bar]) => {
            app.canvas.deselectAll();
            const place = app.canvasEl.getBoundingClientRect();
            app.canvas.ds.scale = scale;
            app.canvas.ds.offset = [-left + (bar - place.left) / scale, -top + (bar - place.top) / scale];
            app.canvas.setDirty(true, true);
        }""",
        [left - MARGIN, top - MARGIN, SCALE, bar],
    )
    tab.wait_for_timeout(2500)
    return Image.open(io.BytesIO(tab.screenshot(clip={"x": bar, "y": bar, "width": width, "height": height}))).convert(
        "RGB"
    )


if __name__ == "__main__":
    main()
