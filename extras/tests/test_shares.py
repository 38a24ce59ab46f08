"""extras/shares.py: what counts as C++."""
import pytest

from extras import shares

CPP = "#include <ATen/ATen.h>\n// a comment\nnamespace at {\nint f(int x) {\n  return x;\n}\ncut"
PYTHON = "import torch\n\n# a comment\ndef f(x):\n    return {x: 1}\n\nclass A:\n    pass\ncut"


@pytest.mark.parametrize("text, counts", [
    (CPP, True), (PYTHON, False), ("", False), ("x = f(a,\n      b)\nint y;\nz\ncut", False),
    ("x = f(a,\n      b);\nint y;\nz\ncut", True)])
def test_a_text_counts_as_cpp_where_more_than_a_third_of_its_whole_lines_look_like_it(text, counts):
    assert shares.is_cpp(text) == counts


def test_a_share_is_of_the_texts():
    assert shares.share([CPP, PYTHON, PYTHON, CPP, PYTHON]) == 0.4
