"""Weight rounding of 4-bit layers against calibration samples: error feedback, block reconstruction, and the driver."""
