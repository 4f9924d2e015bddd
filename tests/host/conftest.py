"""A real ComfyUI for the tests of this folder."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo import checkpoint
from devkit.client import Client
from devkit.host import Server
from support import tiny

NODES_PACK = Path(tiny.__file__).parent / "nodes_pack"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.host)


@pytest.fixture(scope="module", autouse=True)
def _dead_models_go_at_once() -> Iterator[None]:
    """Models of one module die at its end, and not while the host walks over its list of models in the next."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this process keeps calibrations and saved models meanwhile."""
    from support import patchers  # not at the top: tests of the server need no host in this process

    place = tmp_path_factory.mktemp("host")
    with patchers.files_in(place):
        yield place


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    """The MODEL of the tiny SD1.5 checkpoint, in this process."""
    from support import patchers

    return patchers.load()


@pytest.fixture(scope="module")
def calibration(base: Any) -> Any:
    from support import patchers

    return patchers.calibrate(base)


@pytest.fixture(scope="module")
def quantized(base: Any, calibration: Any) -> Any:
    from support import patchers

    return patchers.quantize(base, calibration)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One headless server for the whole session, with the pack, the demo checkpoint and the tiny models."""
    models: dict[str, list[Path]] = {"checkpoints": [checkpoint.ensure()], "diffusion_models": []}
    for model in tiny.ALL:
        models[model.kind].append(model.path)
    with Server(tmp_path_factory.mktemp("comfyui"), models, node_packs=[NODES_PACK]) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Client:
    return server.client
