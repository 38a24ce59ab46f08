"""What the tests of plumbing/ share: the fixtures of test_flora.py, and commands run apart."""
import json
import os
import subprocess
import sys

import pytest

pytest.register_assert_rewrite("test_flora")

from test_flora import (HERE, adapter, embedded_adapters, family, golden, kind,  # noqa: E402, F401
                        mixed, model, name, served, served_model, tiny, tiny_folder)


def script(name, *args, cwd=None):
    command = [sys.executable, os.path.join(HERE, name), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def write_jsonl(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def served_folder(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    served_model([], family).save_pretrained(folder)
    return folder
