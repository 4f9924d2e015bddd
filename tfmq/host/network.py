"""The network of a MODEL in float: its layers, its temporal path, what stays in float and why, its weights with their
patches.

Made once and handed on: while a clone is loaded, other modules or merged weights stand in the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import comfy.lora
from comfy.model_patcher import ModelPatcher
from torch import Tensor, float32, nn

from ..geometry import Geometry, geometry_of
from ..temporal.tib import Tib, boundary_layers, find_tib
from .model import PREFIX, require_float_model

SMALL_BYTES = 16 * 1024  # of a module, up to which the host's dynamic loading loads it whole
Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Network:
    """patcher: the MODEL; module: its network. layers: path -> every Linear and Conv2d. kinds: path -> "linear" or
    "conv2d". geometries: path -> geometry, where the kernels know it. tib: the temporal path. ends: path -> "first" or
    "last". keep: path -> why this layer stays in float, whatever the recipe."""

    patcher: ModelPatcher
    module: nn.Module
    layers: dict[str, Layer]
    kinds: dict[str, str]
    geometries: dict[str, Geometry]
    tib: Tib
    ends: dict[str, str]
    keep: dict[str, str]

    @classmethod
    def of(cls, patcher: ModelPatcher) -> Network:
        """Raises TfmqError for what is no diffusion MODEL in float. It is taken off the device, as are its clones."""
        require_float_model(patcher)
        module = patcher.model.diffusion_model
        layers = {
            path: layer
            for path, layer in module.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and getattr(layer, "weight", None) is not None
        }
        kinds = {path: "conv2d" if isinstance(layer, nn.Conv2d) else "linear" for path, layer in layers.items()}
        found = {path: geometry_of(layer) for path, layer in layers.items()}
        geometries = {path: geometry for path, geometry in found.items() if isinstance(geometry, Geometry)}
        tib, ends = find_tib(module), boundary_layers(module)
        # In 4 bits. Dynamic loading takes the weights of a small module out and puts them back by their path, when a
        # module of another MODEL may stand there.
        small = [p for p, m in layers.items() if patcher.is_dynamic() and m.weight.numel() <= 2 * SMALL_BYTES]
        keep = {
            **{path: f"temporal path (depends on {on} alone)" for path, on in tib.layers.items()},
            **{path: f"{which} layer" for path, which in ends.items()},
            **{path: "too small for dynamic loading" for path in small},
            **{path: why for path, why in found.items() if isinstance(why, str)},
        }
        return cls(patcher, module, layers, kinds, geometries, tib, ends, keep)

    def weight(self, path: str) -> Tensor:
        """Of a layer, patches merged, on the load device. No clone may be loaded meanwhile (`weights`)."""
        return self._merged(path, "weight")

    def bias(self, path: str) -> Tensor | None:
        """As `weight`."""
        return None if self.module.get_submodule(path).bias is None else self._merged(path, "bias")

    def weights(self, paths: Iterable[str]) -> Callable[[str], Tensor]:
        """`weight`, to be called while a clone is loaded too."""
        # The model's own weights hold the patches by then.
        merged = {path: self.weight(path).cpu() for path in paths if f"{PREFIX}{path}.weight" in self.patcher.patches}

        def weight(path: str) -> Tensor:
            found = merged[path] if path in merged else self.layers[path].weight.detach()
            return found.to(self.patcher.load_device)

        return weight

    def _merged(self, path: str, name: str) -> Tensor:
        key, device = f"{PREFIX}{path}.{name}", self.patcher.load_device
        own: Tensor = getattr(self.module.get_submodule(path), name)
        patches = self.patcher.patches.get(key, [])
        if not patches:
            return own.detach().to(device)
        # The model's own weight keeps its precision; a merge in float32 is rounded once, by the quantizer.
        return comfy.lora.calculate_weight(patches, own.detach().to(device, float32, copy=True), key)
