"""ComfyUI-TFMQ: quantization-aware-of-time for diffusion models, as nodes."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
