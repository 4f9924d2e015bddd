"""Quantization of diffusion models with integer arithmetic; runs with torch alone. `tfmq.host` is the ComfyUI side."""
