"""Plan + calibration + float weights -> integers."""
