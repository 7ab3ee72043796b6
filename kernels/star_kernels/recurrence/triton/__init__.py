"""The recurrences in Triton."""
