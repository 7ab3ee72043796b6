"""The definitions of the linear recurrences in plain torch, one file an operator family."""
