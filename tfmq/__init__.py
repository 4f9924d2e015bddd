"""Quantization of diffusion models with integer arithmetic; runs with torch alone. `nodes` and `host` are the ComfyUI side."""
