"""Quantization of diffusion models with integer arithmetic, on torch alone; ComfyUI only in `nodes` and `host`."""
