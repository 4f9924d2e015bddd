"""ComfyUI's front end in a real Chromium."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from devkit.host import Server

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # without it a first visit opens the template gallery over the graph
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
# Console errors that the front end makes by itself, before anything of ours is loaded.
NOISE = {
    # The front end's own start-up graph names models; it asks their server for sizes, which its own policy forbids.
    "huggingface.co/Comfy-Org/z_image_turbo": "sizes of the start-up graph's models",
    # Front end 1.47 asks for a style sheet of the person's own at a place where its server never has one.
    "/user.css": "no style sheet of the person's own",
    # Front end 1.47 logs this while it starts.
    "ComfyApp graph accessed before initialization": "start-up order of the front end",
}


STARTS = 3
CURTAIN = ".p-blockui-mask"


def find_chromium() -> str | None:
    """Path of a Chromium: the environment's CHROMIUM, else one on the PATH."""
    given = os.environ.get("CHROMIUM")
    return given or next((path for path in map(shutil.which, CHROMIUMS) if path), None)


def prepare(base: Path) -> None:
    """Settings of a person who is not here for the first time, and the files whose absence is logged as an error."""
    user = base / "user" / "default"
    for folder in ("workflows", "subgraphs"):
        (user / folder).mkdir(parents=True, exist_ok=True)
    (user / "user.css").touch()
    (user / "comfy.templates.json").write_text("[]", encoding="utf-8")
    (user / "comfy.settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")


def launch(playwright: Playwright) -> Browser:
    path = find_chromium()
    assert path is not None
    return playwright.chromium.launch(executable_path=path, args=list(FLAGS), headless=True)


class FrontEnd:
    """One page with the front end in it. `errors`: what the console and the page complained about."""

    def __init__(self, page: Page, server: Server) -> None:
        self.page, self.server = page, server
        self.errors: list[str] = []
        page.on("console", self._listen)
        page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        for _ in range(STARTS):
            self.errors.clear()
            if self._start():
                break

    def _start(self) -> bool:
        """Load the page. False where the front end lost its start-up curtain: on a slow machine its own removal of that
        fails now and then, and the page stays blocked; a person would reload it."""
        self.page.goto(self.server.address)
        self.page.wait_for_function(
            "() => window.app?.graph && app.extensionManager && 'TFMQ_Compare' in LiteGraph.registered_node_types",
            timeout=90_000,
        )
        self.page.wait_for_function("() => app.graph.nodes.length > 0", timeout=30_000)  # the start-up graph is there
        try:
            self.page.wait_for_function(f"() => !document.querySelector('{CURTAIN}')", timeout=20_000)
        except PlaywrightTimeout:
            return False
        self.page.wait_for_timeout(1000)
        return not any("removeMask" in error for error in self.errors)

    def _listen(self, message: ConsoleMessage) -> None:
        text = f"{message.text} ({message.location.get('url')})"
        if message.type == "error" and not any(known in text for known in NOISE):
            self.errors.append(text)

    def complaints(self) -> list[str]:
        """`errors`, less those of Vue itself: of the front end's own page, on a busy machine. We have no scripts."""
        return [error for error in self.errors if "vendor-vue-core" not in error]

    def drop(self, name: str, workflow: dict[str, Any]) -> None:
        """Drop a workflow file on the canvas, and wait until its nodes stand there."""
        self.page.evaluate(
            """([name, text]) => {
                const data = new DataTransfer();
                data.items.add(new File([text], name, {type: "application/json"}));
                for (const kind of ["dragenter", "dragover", "drop"])
                    app.canvasEl.dispatchEvent(new DragEvent(kind, {
                        bubbles: true, cancelable: true, dataTransfer: data, clientX: 800, clientY: 450}));
            }""",
            [f"{name}.json", json.dumps(workflow)],
        )
        wanted = sorted((node["id"], node["type"]) for node in workflow["nodes"])
        self.page.wait_for_function(
            """wanted => wanted === JSON.stringify(
                app.graph.nodes.map(n => [Number(n.id), n.type]).sort((a, b) => a[0] - b[0]))""",
            arg=json.dumps(wanted, separators=(",", ":")),
            timeout=30_000,
        )

    def missing(self) -> list[str]:
        """Types of nodes in the graph that the front end does not know."""
        return self.page.evaluate(
            "() => app.graph.nodes.map(n => n.type).filter(t => !(t in LiteGraph.registered_node_types))"
        )

    def widgets(self, node_type: str) -> list[dict[str, Any]]:
        """Names and values of the widgets of every node of a type."""
        return self.page.evaluate(
            """type => app.graph.nodes.filter(n => n.type === type)
                .map(n => Object.fromEntries((n.widgets ?? []).map(w => [w.name, w.value])))""",
            node_type,
        )

    def set(self, node_type: str, **values: Any) -> None:
        """Set widgets on every node of a type; an unknown widget is an error."""
        self.page.evaluate(
            """([type, values]) => {
                for (const node of app.graph.nodes.filter(n => n.type === type))
                    for (const [name, value] of Object.entries(values)) {
                        const widget = node.widgets.find(w => w.name === name);
                        if (!widget) throw new Error(`${type} has no widget ${name}`);
                        widget.value = value;
                        widget.callback?.(value);
                    }
            }""",
            [node_type, values],
        )

    def run(self, timeout: float = 240.0) -> None:
        """Press Run and wait for the end. AssertionError with the host's reason if the graph fails."""
        self.page.evaluate(
            """() => {
                window.ended = null;
                for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
                    app.api.addEventListener(kind, e => { window.ended ??= [kind, e.detail]; }, {once: true});
            }"""
        )
        before = len(self.errors)
        self.page.get_by_role("button", name="Run", exact=True).first.click()
        try:
            self.page.wait_for_function("() => window.ended !== null", timeout=timeout * 1000)
        except Exception as error:
            raise AssertionError(f"the run did not end: {error}; {self.errors[before:]}; {self.dialogs()}") from error
        kind, detail = self.page.evaluate("() => window.ended")
        assert kind == "execution_success", f"{kind}: {detail.get('node_type')}: {detail.get('exception_message')}"

    def refresh(self) -> None:
        """What the key R does: fetch the lists of files again."""
        self.page.evaluate("() => app.refreshComboInNodes()")

    def pictures(self, node_type: str) -> list[list[int]]:
        """Width and height of every picture that nodes of a type show; waits until one is there."""
        self.page.wait_for_function(
            """type => app.graph.nodes.filter(n => n.type === type)
                .every(n => n.imgs?.length && n.imgs.every(i => i.complete && i.naturalWidth > 0))""",
            arg=node_type,
            timeout=30_000,
        )
        return self.page.evaluate(
            """type => app.graph.nodes.filter(n => n.type === type)
                .flatMap(n => n.imgs.map(i => [i.naturalWidth, i.naturalHeight]))""",
            node_type,
        )

    def dialogs(self) -> list[str]:
        return self.page.evaluate("() => [...document.querySelectorAll('[role=dialog]')].map(d => d.innerText)")
