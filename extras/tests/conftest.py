"""The fixtures of test_flora.py, for the tests of extras/ too."""
import pytest

pytest.register_assert_rewrite("test_flora")

from test_flora import (  # noqa: E402, F401
    embedded_adapters, expected, family, model, served, tiny_folder)
