"""Tests that drive the front end as a person does."""
