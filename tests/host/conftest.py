"""A real ComfyUI for the tests of this folder."""

import gc
from collections.abc import Iterator
from pathlib import Path

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
