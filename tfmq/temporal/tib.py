"""Find the Temporal Information Block (TIB) and the boundary layers of a model by the table of architectures."""

import re
from dataclasses import dataclass

import torch

from .architectures import ARCHITECTURES, Architecture

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Tib:
    """The Temporal Information Block of one model.

    architecture: name of the row of the table, or "unknown".
    layers: path of each Linear- or Conv-like layer, relative to the diffusion model -> what its output depends on
        (`architectures` explains the values).
    parameters: full names of all temporal parameters, those that are no layer's included (tables added to a
        projection of t, norms inside a time network).
    """

    architecture: str
    layers: dict[str, str]
    parameters: tuple[str, ...]


def is_layer(module: torch.nn.Module) -> bool:
    """True for a Linear- or Conv-like layer that has a weight, whatever class (float, quantized, a host's own)."""
    name = type(module).__name__
    return ("Linear" in name or "Conv" in name) and getattr(module, "weight", None) is not None


def find_tib(diffusion_model: torch.nn.Module) -> Tib:
    """The TIB by the table; `Tib("unknown", {}, ())` where no row fits.

    Works on any device, the meta device included, and runs nothing. Raises TypeError if it is not given a module.
    """
    architecture = _row_of(diffusion_model)
    if architecture is None or any(_exists(diffusion_model, path) for path in architecture.excludes):
        return Tib(UNKNOWN, {}, ())
    layer_paths = [path for path, module in diffusion_model.named_modules() if is_layer(module)]
    names = [name for name, _ in diffusion_model.named_parameters()]
    has_vector = any(re.match(pattern, name) for pattern in architecture.vector for name in names)
    per_token = _is_per_token(diffusion_model, architecture)

    def dependency(name: str) -> str | None:
        for pattern, rule in architecture.rules:
            if re.match(pattern, name):
                found = "t" if rule == "t+vector" and not has_vector else rule
                return "per-token t" if per_token and found == "t" else found
        return None

    layers = {path: found for path in layer_paths if (found := dependency(path + ".")) is not None}
    parameters = tuple(name for name in names if dependency(name) is not None)
    return Tib(architecture.name, layers, parameters)


def boundary_layers(diffusion_model: torch.nn.Module) -> dict[str, str]:
    """Path -> "first" (the layer that reads the latents) or "last" (the one that writes the prediction).

    Empty for an unknown architecture. Raises TypeError if it is not given a module.
    """
    architecture = _row_of(diffusion_model)
    if architecture is None:
        return {}
    return {architecture.first: "first", architecture.last: "last"}


def _row_of(diffusion_model: torch.nn.Module) -> Architecture | None:
    if not isinstance(diffusion_model, torch.nn.Module):
        raise TypeError(
            f"The TIB can only be found in a torch.nn.Module, not in {type(diffusion_model).__name__}: "
            "pass the diffusion model of a MODEL."
        )
    kind = type(diffusion_model).__name__
    for architecture in ARCHITECTURES:
        if kind in architecture.classes and all(_exists(diffusion_model, path) for path in architecture.requires):
            return architecture
    return None


def _exists(model: torch.nn.Module, path: str) -> bool:
    found: object = model
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return False
    return True


def _is_per_token(model: torch.nn.Module, architecture: Architecture) -> bool:
    if architecture.per_token is None:
        return False
    path, channels = architecture.per_token
    weight = getattr(model.get_submodule(path), "weight", None)
    return weight is not None and weight.ndim > 1 and weight.shape[1] == channels
