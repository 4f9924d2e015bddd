"""Empty stand-ins for torchvision and torchaudio, only where the real ones do not import.

ComfyUI imports both when it starts. There is no CPU build of either, and the ordinary ones do not import beside a CPU
build of torch; no path that this pack uses needs them. Whatever is asked of a stand-in is a `Missing`, which says what
is missing once it is called.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types

PACKAGES = ("torchvision", "torchaudio")


class Missing:
    """Any name of a package that is not there; fails when called."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> "Missing":
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self._name}.{name}")

    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"{self._name} is only a stand-in here: install the real package to use it.")

    def __mro_entries__(self, bases):
        return (object,)


class StandIn(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")


class Loader(importlib.abc.Loader):
    """Hands out a module that exists already: the real package, or an empty stand-in."""

    def __init__(self, module: types.ModuleType):
        self.module = module

    def create_module(self, spec):
        return self.module

    def exec_module(self, module):
        pass


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        package, _, below = fullname.partition(".")
        if package not in PACKAGES:
            return None
        if below and not isinstance(sys.modules.get(package), StandIn):
            return None
        module = StandIn(fullname) if below else self._real(package) or StandIn(fullname)
        return importlib.machinery.ModuleSpec(fullname, Loader(module), is_package=True)

    def _real(self, package: str):
        sys.meta_path.remove(self)
        try:
            module = importlib.import_module(package)
            # Else the import system would take the module's own spec, and run it a second time.
            del sys.modules[package]
            return module
        except Exception:  # a broken torchvision raises RuntimeError or OSError, not only ImportError
            for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
                del sys.modules[name]
            return None
        finally:
            sys.meta_path.insert(0, self)


def install() -> None:
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
