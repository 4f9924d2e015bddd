"""What a developer needs around the node pack: set-up, a headless ComfyUI, workflow conversion."""
