"""What bench.py prints and writes."""
from test_flora import script


def test_bench_prints_and_draws_what_it_measured_when_the_results_cannot_be_written(
        served_folder, tmp_path):
    figure = tmp_path / "new" / "b.png"
    common = ["--weights", served_folder, "--ranks", 1, "--num-requests", 2, "--scale", 0.02,
              "--repeats", 1, "--slots", 2, "--num-adapters", 1, "--mode", "throughput",
              "--rows", "flora"]
    run = script("bench.py", *common, "--json", "/dev/full", "--png", figure)
    assert run.returncode == 2 and "/dev/full: cannot be written (No space left" in run.stderr
    assert "tokens/s" in run.stdout and figure.read_bytes().startswith(b"\x89PNG")
    for flag in ("--json", "--png"):
        run = script("bench.py", *common, flag, tmp_path, cwd=tmp_path)
        assert run.returncode == 2 and not run.stdout
        assert f"{flag} {tmp_path}: is a folder" in run.stderr
