"""ComfyUI's modules and this pack inside the running Python: for benchmarks and unit tests that need no server."""

import importlib.util
import sys
from types import ModuleType

from .paths import ROOT, STANDINS, host_dir

PACK_MODULE = "comfyui_tfmq"


def use_host(device: str = "cpu") -> None:
    """Make `import comfy...` work. `device` is "cpu" or "cuda"; it counts only before the first import of comfy.

    Raises FileNotFoundError where there is no ComfyUI.
    """
    host = host_dir()
    if not (host / "main.py").is_file():
        raise FileNotFoundError(f"There is no ComfyUI in {host}: run `python dev.py test` once or set COMFYUI_PATH.")
    # In front: the host has top-level modules (nodes, utils, tests) whose names this repository has too.
    _first_on_path(str(host))
    _standins()
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = device == "cpu"


def load_pack() -> ModuleType:
    """This pack, imported as ComfyUI does it: one package (here `comfyui_tfmq`) with relative imports inside."""
    if PACK_MODULE in sys.modules:
        return sys.modules[PACK_MODULE]
    if "comfy" not in sys.modules:
        use_host()
    spec = importlib.util.spec_from_file_location(
        PACK_MODULE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK_MODULE] = module
    spec.loader.exec_module(module)
    return module


def _first_on_path(folder: str) -> None:
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)


def _standins() -> None:
    if str(STANDINS) not in sys.path:
        sys.path.append(str(STANDINS))
    import tfmq_standins

    tfmq_standins.install()
