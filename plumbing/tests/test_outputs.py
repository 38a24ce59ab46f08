"""Outputs: found out before the work, written in one piece, by one process."""
import json
import os
import resource
import subprocess
import sys

import pytest
import torch

from plumbing.files import BadInput
from plumbing.outputs import (JSON, PNG, check_writable, locked, open_output, save_tensors,
                              write_each, write_json)
from test_flora import HERE


def test_an_output_is_written_in_one_piece_or_as_it_stands(tmp_path, capfd):
    file, link, pipe = tmp_path / "a.json", tmp_path / "link.json", tmp_path / "pipe"
    write_json(file, {"a": 1})
    file.chmod(0o604)
    link.symlink_to(file)
    write_json(link, {"b": 2})
    assert link.is_symlink() and json.loads(file.read_text()) == {"b": 2}
    assert file.stat().st_mode & 0o777 == 0o604
    for device in ("/dev/null", "/dev/stdout"):
        before = os.stat(device).st_ino, os.stat(device).st_mode
        write_json(device, {"c": 3})
        save_tensors({"a": torch.ones(3)}, "/dev/null", {})
        assert (os.stat(device).st_ino, os.stat(device).st_mode) == before
    assert json.loads(capfd.readouterr().out) == {"c": 3}
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    write_json(pipe, {"d": 4})
    assert json.loads(reader.communicate()[0]) == {"d": 4} and pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "link.json", "pipe"]


def test_what_cannot_be_written_in_full_leaves_what_was_there(tmp_path):
    """A limit on the size of files stands for a full disk."""
    tensors = {"a": torch.ones(10_000)}
    file, hard = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    writes = [lambda: save_tensors(tensors, file, {}),
              lambda: write_json(file, ["a" * 10_000])]

    def save():
        with open_output(file) as f:
            torch.save(tensors, f)

    for write in [*writes, save]:
        file.write_text("{} before")
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        try:
            with pytest.raises(BadInput, match="file: cannot be written .*File too large"):
                write()
            check_writable(str(file), "--json", JSON)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert file.read_text() == "{} before" and os.listdir(tmp_path) == ["file"]
        write()
    with pytest.raises(BadInput, match="/dev/full: cannot be written .No space left"):
        write_json("/dev/full", {})


def test_outputs_are_checked_before_the_work(tmp_path):
    (tmp_path / "text").write_text("mine")
    (tmp_path / "old.json").write_text("[1]")
    for name, kind, sentence in [
            ("", None, "is a folder"),
            ("no/x.json", None, "No such file"),
            ("no/", None, "is a folder"),
            ("text/x.json", None, "Not a directory"),
            ("a" * 300, None, "File name too long"),
            ("text", JSON, "holds something else"),
            ("old.json", PNG, "holds something else")]:
        with pytest.raises(BadInput, match=f"--json .*{sentence}"):
            check_writable(os.path.join(tmp_path, name), "--json", kind)
    for name in ("x.json", "x.png.txt"):
        with pytest.raises(BadInput, match=f"--out .*{name}: this writes a PNG; choose"):
            check_writable(str(tmp_path / name), "--out", PNG)
    check_writable(str(tmp_path / "x.PNG"), "--out", PNG)
    check_writable(str(tmp_path / "old.json"), "--json", JSON)
    check_writable(str(tmp_path / "new" / "x.png"), "--png", PNG, make_folder=True)
    assert sorted(os.listdir(tmp_path)) == ["new", "old.json", "text"]
    assert not os.listdir(tmp_path / "new")
    calls = []

    def broken():
        calls.append(1)
        raise BadInput("one cannot be written")

    with pytest.raises(BadInput, match="one cannot be written; one cannot be written"):
        write_each(broken, lambda: calls.append(2), broken)
    assert calls == [1, 2, 1]


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    holder = ("import sys, time\n"
              "from plumbing.outputs import locked\n"
              "with locked(sys.argv[1], '--out'):\n"
              "    print(1, flush=True)\n"
              "    time.sleep(99)\n")
    for path in (tmp_path, tmp_path / "file"):
        command = [sys.executable, "-c", holder, path]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=HERE)
        process.stdout.readline()
        with pytest.raises(BadInput, match="another process is writing there"):
            with locked(path, "--out"):
                pass
        process.kill()
        process.wait()
        with locked(path, "--out"):
            pass
    assert os.listdir(tmp_path) == []


def test_where_files_cannot_be_locked_the_work_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)   # as on Windows: importing it fails
    with locked(tmp_path, "--out"), locked(tmp_path, "--out"):
        pass
    assert f"--out {tmp_path}: without POSIX's fcntl nothing keeps a second" in capsys.readouterr().err
