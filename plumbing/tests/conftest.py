"""The tests of plumbing/ share the fixtures of test_flora.py."""
import pytest

pytest.register_assert_rewrite("test_flora")

from test_flora import (adapter, embedded_adapters, family, golden, kind, mixed,  # noqa: E402, F401
                        name, served, served_folder, tiny, tiny_folder)
