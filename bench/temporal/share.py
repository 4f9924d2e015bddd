"""How much of each real model is temporal: exact parameter counts, nothing is computed."""

from bench.temporal.models import MODELS, build
from tfmq.temporal.tib import find_tib


def share() -> dict[str, dict[str, int]]:
    """Model name -> {"total": parameters, "temporal": parameters of the Temporal Information Block}."""
    return {name: _count(architecture, config) for name, (architecture, config) in MODELS.items()}


def _count(architecture: str, config: dict) -> dict[str, int]:
    model = build(architecture, **config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {"total": sum(sizes.values()), "temporal": sum(sizes[name] for name in find_tib(model).parameters)}
