"""Numbers as integers: affine grids, packed 4-bit codes, Hadamard rotation. Pure functions on tensors."""
