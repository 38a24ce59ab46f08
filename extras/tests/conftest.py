"""The fixtures of test_flora.py, for the tests of extras/ too."""
import pytest

pytest.register_assert_rewrite("test_flora")

from test_flora import embedded_adapters, expected, family, model, tiny_folder  # noqa: E402, F401
