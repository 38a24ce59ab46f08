"""`pytest` on two cores: a second process runs the same command, and each takes the test files that
the other has not taken. The first shows the reports of both.

extras/tests/conftest.py turns it on. With --pdb, -s, --lf, --ff, --basetemp or a single file
one process runs alone.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path

import pytest

SHARED = "TESTS_SHARED_FOLDER"   # in the environment of the second process


def pytest_runtestloop(session):
    """pytest's own loop, over the files that this process takes."""
    files = [list(items) for _, items in groupby(session.items, key=lambda item: item.path)]
    if SHARED in os.environ:
        run_second(session, files, Path(os.environ.pop(SHARED)))   # tests may start pytest too
        return True
    if must_be_alone(session) or len(files) < 2 or os.cpu_count() < 2:
        return None   # pytest's own loop goes on
    os.environ["OMP_NUM_THREADS"] = "1"   # of the second process, and of those that tests start
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run_first(session, files, Path(folder))
    return True


def must_be_alone(session):
    """Whether a second process would be in the way: of a reader at the terminal, of an order or a
    folder that was asked for, of pytest-xdist; or whether there is nothing to run."""
    option = session.config.option
    seen = option.usepdb or option.capture == "no"
    asked = getattr(option, "lf", False) or getattr(option, "failedfirst", False) or option.basetemp
    return (seen or asked or hasattr(session.config, "workerinput")
            or option.collectonly or session.testsfailed)


def run_first(session, files, folder):
    """Take files from the first on, and show the reports of the second process between the tests.
    A test of which neither process reports the end fails the session."""
    reported = Reported()
    session.config.pluginmanager.register(reported)
    (folder / "reports").touch()
    with open(folder / "output", "w") as output, open(folder / "reports") as reports:
        second = subprocess.Popen(
            [sys.executable, "-m", "pytest", *session.config.invocation_params.args,
             "-p", "no:cacheprovider"],
            stdout=output, stderr=output, env=os.environ | {SHARED: str(folder)})
        try:
            lines = complete_lines(reports)
            for _ in run_tests(session, files, folder):
                show(session, next(lines))
            while second.poll() is None:
                time.sleep(0.1)
                show(session, next(lines))
            show(session, next(lines))
        finally:
            second.terminate()
            second.wait()
    lost = {item.nodeid for item in session.items} - reported.ended
    if lost:
        said = (folder / "output").read_text()[-4000:]
        pytest.exit(f"the second process lost {len(lost)} tests, as {min(lost)}:\n{said}", returncode=1)


def run_second(session, files, folder):
    """Take files from the last on, and write the reports for the first process."""
    with open(folder / "reports", "a") as file:
        session.config.pluginmanager.register(Writer(session.config, file))
        for _ in run_tests(session, files[::-1], folder):
            pass


def run_tests(session, files, folder):
    """Run the tests of each file that the other process has not taken; yield after each test."""
    tests = take(files, folder)
    item = next(tests, None)
    while item is not None:
        following = next(tests, None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        yield
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following


def take(files, folder):
    """The tests of one file after another, if its folder, which both processes make, is new."""
    for items in files:
        try:
            (folder / str(items[0].path).replace(os.sep, "+")).mkdir()
        except FileExistsError:
            continue
        yield from items


def complete_lines(file):
    """The lines that another process has written to a file since the last time, again and again."""
    rest = ""
    while True:
        *lines, rest = (rest + file.read()).split("\n")
        yield lines


def show(session, lines):
    """Report, as if they had run here, the tests that the second process has written."""
    hook = session.config.hook
    for line in lines:
        report = hook.pytest_report_from_serializable(config=session.config, data=json.loads(line))
        hook.pytest_runtest_logreport(report=report)
    if session.shouldfail:
        raise session.Failed(session.shouldfail)


class Writer:
    """Writes each report as a line of JSON."""

    def __init__(self, config, file):
        self.config, self.file = config, file

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps(data), file=self.file, flush=True)


class Reported:
    """The tests that have ended, in either process."""

    def __init__(self):
        self.ended = set()

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":
            self.ended.add(report.nodeid)
