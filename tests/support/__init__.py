"""What several tests need; imported as `support` (tests/ is on the path)."""
