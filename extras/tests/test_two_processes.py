"""Do two processes run every test once, and is one that is lost told?"""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WAIT = """import os, time
def test_1(ran):
    begin = time.monotonic()
    while time.monotonic() < begin + 120 and "test_c.py" not in ran.read_text():
        time.sleep(0.1)
"""
SKIPPED = """import pytest
@pytest.mark.skip(reason="lacks x")
def test_2():
    pass
"""
SLOW = """
import time
def test_5():
    time.sleep(2)
"""
FAILING = """def test_3():
    print("seen in b")
    assert 1 == 2
"""
MANY = """import pytest
@pytest.mark.parametrize("i", range(5))
def test_4(i):
    pass
"""
DYING = """import os
def test_9():
    os._exit(0)
"""
CONFTEST = """import os, pathlib, pytest
from extras.tests.two_processes import pytest_runtestloop

@pytest.fixture
def ran():
    return pathlib.Path(__file__).with_name("ran")

@pytest.fixture(scope="module", autouse=True)
def note(request):
    with open(pathlib.Path(__file__).with_name("ran"), "a") as file:
        print(request.path.name, os.getpid(), file=file)
"""


def run(folder, texts, *flags):
    """pytest on test_a.py, test_b.py, ... of these texts -> (its status, what it printed,
    [(a file, the process that ran it)])."""
    for name, text in zip("abcdef", texts):
        (folder / f"test_{name}.py").write_text(text)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "ran").touch()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *flags, str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=300)
    ran = [line.split() for line in (folder / "ran").read_text().splitlines()]
    return done.returncode, done.stdout + done.stderr, ran


def test_every_file_runs_once_and_the_reports_of_both_processes_are_shown(tmp_path):
    code, said, ran = run(tmp_path, [WAIT + SKIPPED, FAILING, MANY])   # test_1 waits for the second
    assert code == 1 and "1 failed, 6 passed, 1 skipped" in said and "seen in b" in said
    assert sorted(file for file, _ in ran) == ["test_a.py", "test_b.py", "test_c.py"]
    assert len({process for _, process in ran}) == 2


def test_where_the_second_process_dies_the_session_fails_and_names_a_lost_test(tmp_path):
    code, said, _ = run(tmp_path, [WAIT, MANY, DYING])
    assert code and re.search("lost 1 tests, as .*test_c.py::test_9", said), said


@pytest.mark.parametrize("flags,files", [("-s", 3), ("--basetemp {}", 3), ("-k test_4", 1)])
def test_one_process_runs_alone_where_it_must(tmp_path, flags, files):
    """The first file takes so long that a second process would take another."""
    (tmp_path / "tests").mkdir()
    texts = [SKIPPED + SLOW, FAILING, MANY]
    code, _, ran = run(tmp_path / "tests", texts, *flags.format(tmp_path / "base").split())
    assert code == (files == 3) and len(ran) == files
    assert len({process for _, process in ran}) == 1
