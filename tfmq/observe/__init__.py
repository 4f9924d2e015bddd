"""What a calibration learns about the inputs of a network's layers, and the samples that it keeps."""
