"""The ComfyUI side: everything that imports `comfy`."""
