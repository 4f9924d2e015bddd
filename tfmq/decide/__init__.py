"""Recipe + calibration -> plan: how each layer is represented, and why."""
