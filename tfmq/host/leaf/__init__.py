"""The leaves as ComfyUI's patcher wants them: layout of a weight, LoRA, NF4."""
