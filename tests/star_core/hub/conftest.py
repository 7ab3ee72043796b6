"""Marks that transformers' own tests carry."""

import pytest

THEIR_MARKS = (
    "accelerate_tests",
    "flash_attn_2_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "flash_attn_varlen_test",
    "generate",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for mark in THEIR_MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers' own tests")
