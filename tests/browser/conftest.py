"""One server and one Chromium per test module.

Not per session: as long as it lives, playwright keeps an event loop running in this thread, where other tests could not
start one.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ViewportSize, sync_playwright

from browser import front_end
from demo import checkpoint
from devkit.host import Server

VIEWPORT: ViewportSize = {"width": 1600, "height": 900}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if front_end.find_chromium() is None:
        pytest.skip("no Chromium here: install chromium, or set CHROMIUM to the path of one")
    with sync_playwright() as playwright:
        browser = front_end.launch(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    front_end.prepare(base)
    with Server(base, {"checkpoints": [checkpoint.ensure()]}) as running:
        yield running


@pytest.fixture(scope="module")
def tab(chromium: Browser, server: Server) -> front_end.FrontEnd:
    return front_end.FrontEnd(chromium.new_page(viewport=VIEWPORT), server)


@pytest.fixture
def page(tab: front_end.FrontEnd) -> Iterator[front_end.FrontEnd]:
    """The one page of the module (it takes seconds to start); the first test also sees the errors of its start."""
    yield tab
    tab.errors.clear()


@pytest.fixture
def own_page(chromium: Browser, server: Server) -> Iterator[front_end.FrontEnd]:
    """A page of its own, for a test whose errors must not reach the others."""
    page = chromium.new_page(viewport=VIEWPORT)
    yield front_end.FrontEnd(page, server)
    page.close()
