"""What stands in the network and runs: leaves, and what they share in one call. Never calibrates or solves."""
