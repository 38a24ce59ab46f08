"""All that was not run for want of a GPU, in one command.

  python -m extras.gpu                 on a GPU, 10 minutes
  python -m extras.gpu --rehearse      the same in tiny sizes on a CPU, 2 minutes

Each part is a process, so that one that fails costs no other; after each one OUT/gpu.json is written anew, with all
that is known so far. In this order: the tests on CUDA; whether all engines give the same tokens, and the CPU's; CUDA
graphs on and off; Figure 2 at 1B and 15B with random weights, with Eq. 7 and the shares of the device's limits; how
many ranks are free at 8 to 128 requests; training; the memory that a 15B training takes. --minutes leaves parts out,
from the end. Last comes a line for each claim, with what came of it. Copy OUT/gpu.json to extras/results/, and
python -m extras.results puts it into RESULTS.md.

What the code does otherwise on CUDA, as a reading line by line found it, and what watches over it:
- Reads: in decoding Engine.sync alone waits for the GPU, once in sync_every steps; tests/test_fake_cuda.py counts.
- Copies: none is pinned or non_blocking, so none can be overtaken by a write to its source.
- Draws: new adapters, batches and each request's noise are drawn on the CPU, so seeds mean the same everywhere. But
  top-p's cumsum and an embedding's backward add in no fixed order: equal runs may differ in the last bits.
- model.to(device) leaves a frozen bank behind: freeze_bank again.
- An id outside of the vocabulary or the bank is an IndexError on a CPU and ends the process on a GPU, where a model is
  called directly; Engine.submit refuses it on both.
- TF32: cuDNN may use it in Whisper's two convolutions, matmuls in float32 do not (PyTorch's defaults).
"""
import argparse
import os
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import NamedTuple

import torch

from bench import FREE
from extras.gpu_parts import TINY
from plumbing.files import BadInput, read_json
from plumbing.flags import Help, check_numbers, run_main
from plumbing.outputs import JSON, check_writable, write_json
from plumbing.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
RANKS = (1, 2, 4, 8, 16)
PAPER = {("fig2-15b", 1): 3.0, ("fig2-15b", 2): 2.5}   # §4.1: FLoRA's tokens/s beside bmm-LoRA's, at least


class Part(NamedTuple):
    name: str
    seconds: int      # that it takes at most, a guess for an H100
    command: list     # what follows "python"; it writes OUT/NAME.json, or the tests OUT/tests.xml


def parts_of(args):
    """The parts in their order; in a rehearsal with tiny sizes."""
    out, tiny = Path(args.out), args.rehearse

    def own(name, seconds):
        return Part(name, seconds, ["-m", "extras.gpu_parts", name, "--device", args.device,
                                    "--json", out / f"{name}.json", *(["--rehearse"] if tiny else [])])

    def bench(name, seconds, model, *flags):
        sizes = ["--model", model, "--random-weights", "--dtype", "float16", "--ranks", *RANKS]
        if tiny:
            sizes = ["--weights", TINY, "--device", "cpu", "--ranks", 1, 2]
        return Part(name, seconds, ["bench.py", *sizes, *flags, "--mode", "throughput", "--repeats", 1,
                                    "--json", out / f"{name}.json", "--png", out / f"{name}.png"])

    def free(n):
        return bench(f"free-{n}", 45, "starcoder", "--rows", "flora", "--slots", n, "--num-requests", n,
                     "--num-adapters", 2 if tiny else 8, "--scale", 0.01 if tiny else 0.05)

    n, scale, counts = (3, 0.01, (2, 4)) if tiny else (32, 0.1, (8, 32, 64, 128))
    figure2 = ["--rows", "flora", "lora-example", "lora-token", "lora-masked", "--attention", "math",
               "--slots", n, "--num-requests", n, "--num-adapters", n, "--scale", scale]
    tests = ["-k", "flora_equals_dense and cpu"] if tiny else ["extras/tests", "-k", "cuda and not fake_cuda"]
    return [
        Part("tests", 60, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_flora.py", *tests,
                           "--junit-xml", out / "tests.xml"]),
        own("tokens", 50), own("graphs", 40),
        bench("fig2-1b", 60, "starcoderbase-1b", *figure2), bench("fig2-15b", 150, "starcoder", *figure2),
        *map(free, counts), own("training", 50), own("memory", 60)]


# ------------------------------------------------------------------------------------ the verdicts


def verdicts(found):
    """{part: what it found} -> [(True, False or None, where nothing was claimed; a sentence)]"""
    lines = []
    for name, data in found.items():
        kind = name.split("-")[0]
        lines += VERDICTS[kind](name, data)
    return lines


def of_tests(name, data):
    passed, failed, skipped = data["passed"], data["failed"], data["skipped"]
    return [(passed > 0 and not failed, f"tests on CUDA: {passed} passed, {failed} failed, {skipped} skipped")]


def of_tokens(name, data):
    n = data["requests"]
    return [(same == n, f"{engine}: " + (f"the plain engine's tokens in {same} of {n} requests, float32"
                                         if type(same) is int else same)) for engine, same in data["same"].items()]


def of_graphs(name, data):
    return [(ms["graphs"] < ms["plain"], f"CUDA graphs, {data['model']}, {data['slots']} requests, {row}: a step of "
             f"{ms['plain']:.2f} ms takes {ms['graphs']:.2f}") for row, ms in data["milliseconds"].items()]


def of_figure2(name, data):
    """A result of bench.py: FLoRA beside the paper's LoRA, Eq. 7, and the base's share of the device's limits."""
    lines, rows = [], {(row["baseline"], row["rank"]): row for row in data["rows"]}
    for (row, rank), mine in rows.items():
        other = rows.get(("lora-token", rank))
        if row == "flora" and other:
            times, said = mine["tokens_per_second"] / other["tokens_per_second"], PAPER.get((name, rank))
            paper = f", in the paper {said} at least" if said else ""
            lines.append((times >= said if said else None, f"{name}, rank {rank}: FLoRA has {times:.2f} times the "
                          f"tokens/s of LoRA by bmm per token{paper}; {mine['ratio_to_base']:.2f} of the base's"))
    eq7, limits, step = data["eq7"], data["limits"], rows["base", None].get("decoding_step_seconds")
    measured = ", ".join(f"{told(rank)} against {lora}" for lora, rank in eq7["measured"].items())
    lines.append((None, f"{name}, Eq. 7: FLoRA is ahead up to rank {told(eq7['predicted']['inflection_rank'])}, "
                  f"measured: {measured}"))
    share = limits["decode_share_of_bandwidth"]   # without graphs; the engine's steps have them
    share *= limits["decode_ms"] / (1e3 * step) if step else 1
    lines.append((None, f"{name}: decoding reads at {share:.0%} of {limits['bandwidth_gb_s']:,.0f} GB/s, prefill "
                  f"computes at {limits['prefill_share_of_matmul']:.0%} of "
                  f"{limits['matmul_gflop_s'] / 1e3:,.1f} TFLOP/s"))
    return lines


def told(rank):
    return "infinity" if rank is None else f"{rank:.1f}"   # JSON has no infinity


def of_free_rank(name, data):
    """Ranks up to half of the predicted one should be free, those from twice it on should not."""
    free, tried = data["free_rank"], {row["rank"] for row in data["rows"] if row["rank"]}
    found, limit = free["measured"]["flora"], free["predicted"]
    holds = all(r in found for r in tried if r <= limit / 2) and not any(r in found for r in tried if r >= 2 * limit)
    return [(holds, f"free rank, {free['requests']} requests: {limit:.1f} predicted, FLoRA keeps {FREE} of the base at "
             f"{', '.join(map(str, found)) or 'no rank'}")]


def of_training(name, data):
    speeds = ", ".join(f"{row} {speed:,.0f}" for row, speed in data["tokens_per_second"].items())
    return [(None, f"training, {data['model']}, tokens/s: {speeds}")]


def of_memory(name, data):
    loading, training = data["loading_gb"], data["training_gb"]
    return [(max(loading, training) < 40, f"15B on int8: {loading:.1f} GB at most while it loads, {training:.1f} GB in "
             "training; computed: 31 and 26, so 40 suffice")]


VERDICTS = {"tests": of_tests, "tokens": of_tokens, "graphs": of_graphs, "fig2": of_figure2, "free": of_free_rank,
            "training": of_training, "memory": of_memory}
WORDS = {True: "holds", False: "DOES NOT HOLD", None: "measured"}


# ------------------------------------------------------------------------------------- the command


def run_part(part, out, seconds):
    """Run a part for at most `seconds` -> what it found, or dict(not_run=why)."""
    for kind in ("json", "xml"):
        (out / f"{part.name}.{kind}").unlink(missing_ok=True)
    try:
        status = subprocess.run([sys.executable, *map(str, part.command)], cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return dict(not_run=f"stopped after {seconds:.0f} s")
    if (out / "tests.xml").exists() and part.name == "tests":
        suite = next(xml.etree.ElementTree.parse(out / "tests.xml").iter("testsuite")).attrib
        failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
        return dict(passed=int(suite["tests"]) - failed - skipped, failed=failed, skipped=skipped)
    if status or not (out / f"{part.name}.json").exists():
        return dict(not_run=f"ended with status {status}" if status else "wrote nothing")
    return read_json(out / f"{part.name}.json")


def run_all(args):
    """Run the parts that --minutes has room for, and write what is known after each -> whether all ran."""
    out, end = Path(args.out), time.monotonic() + 60 * args.minutes
    file, found, full = out / "gpu.json", {}, False
    check_writable(file, "--out", JSON, make_folder=True)
    data = provenance(torch.device(args.device)) | dict(rehearsal=args.rehearse, minutes=args.minutes)
    for part in parts_of(args):
        left = end - time.monotonic()
        full = full or left < part.seconds
        if full:
            found[part.name] = dict(not_run=f"--minutes {args.minutes:g} leaves no room for it")
        else:
            print(f"\n--- {part.name}: python {shlex.join(map(str, part.command))}", flush=True)
            found[part.name] = run_part(part, out, left) | dict(seconds=left - (end - time.monotonic()))
        ran = {name: value for name, value in found.items() if "not_run" not in value}
        data |= dict(parts=found, verdicts=[dict(verdict=WORDS[holds], what=what) for holds, what in verdicts(ran)] + [
            dict(verdict="not run", what=f"{name}: {found[name]['not_run']}") for name in found if name not in ran])
        write_json(file, data)
    print(f"\nwrote {file}\n")
    for line in data["verdicts"]:
        print(f"{line['verdict']:>13}  {line['what']}")
    return len(ran) == len(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--minutes", type=float, default=10, help="parts for which they leave no room are left out, from the end")
    add("--rehearse", action="store_true", help="tiny sizes on the CPU; what comes out says nothing")
    add("--out", metavar="FOLDER", default=os.path.join("out", "gpu"), help="of gpu.json and what each part wrote")
    args = parser.parse_args()
    check_numbers(args, above_0=["minutes"])
    args.out, args.device = os.path.relpath(args.out, ROOT), "cpu" if args.rehearse else "cuda"
    os.chdir(ROOT)   # commands are kept in the data, and name no folder of this machine but those in --out
    if not args.rehearse and not torch.cuda.is_available():
        raise BadInput("there is no GPU that torch can use here; --rehearse runs all of it with tiny sizes on the CPU")
    if not run_all(args):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
