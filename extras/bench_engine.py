"""A decoding step of the CPU engine: how fast in each dtype and form of W0, and where its time goes.

  python -m extras.bench_engine --json out/engine.json               tiny_starcoder_py's shape, 5 minutes
  python -m extras.bench_engine --weights base --rows base:float32 base:bfloat16 base:float32:compile
  python -m extras.bench_engine --slots 1 --rows base:bfloat16 base:int8 base:int8-dynamic

A row is ADAPTERS:FORM, or ADAPTERS:FORM:compile. ADAPTERS: base, or a kind and rank as in flora8, a
different adapter for each request. FORM: float32, bfloat16, int8 (weight-only, the rest in bfloat16)
or int8-dynamic (the rest in float32). --slots requests of 64 + 64 tokens, greedy, all at once.
Weights are random, but for --weights. After an untimed run the rows take turns step by step, every
other round in reverse order. Printed: generated tokens/s, median of the rounds; how fast a row's
steps are beside the first row's, with its 95 % interval (bench.ratio); milliseconds of the prefill
and of a decoding step, medians; from one profiled run, which part of a step's operators' time each
group takes (the table leaves out Python between them); and seconds of the untimed run, which packs
or compiles.
"""
import argparse
import re
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from bench import install, make_adapter_sets, ratio
from extras.int8 import quantize_int8
from extras.results import engine as table_of
from generate import new_engine
from model import GPT, model_from_config, preset
from plumbing.files import BadInput
from plumbing.flags import Help, check_numbers, run_main
from plumbing.outputs import JSON, check_writable, write_json
from plumbing.provenance import provenance

ROWS = ["base:float32", "flora1:float32", "flora8:float32", "lora1:float32", "lora8:float32",
        "base:bfloat16", "flora1:bfloat16", "flora8:bfloat16", "base:int8", "base:int8-dynamic"]
TOKENS = 64   # of a prompt, and new ones
FORMS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16,
         "int8-dynamic": torch.float32}   # and the dtype of all but the projections
GROUPS = {   # of a step's operators, by their names
    "matmul": r"linear|addmm|::mm|int8pack", "attention": r"attention|bmm|softmax",
    "GELU": r"gelu", "norms": r"layer_norm", "cache": r"index_put"}


def parse_row(text):
    """"flora8:bfloat16:compile" -> ("flora", 8, "bfloat16", True)"""
    found = re.fullmatch(r"(base|[a-z]+)(\d*):([a-z0-9-]+)(:compile)?", text)
    if not found or found[3] not in FORMS or (found[1] == "base") == bool(found[2]):
        raise BadInput(f"--rows {text}: write base:FORM or KIND and RANK:FORM, as in flora8:float32, "
                       f"with FORM one of {', '.join(FORMS)}, and :compile behind it if wanted")
    rank = int(found[2]) if found[2] else None
    return None if found[1] == "base" else found[1], rank, found[3], bool(found[4])


def load(args, form):
    """A model in one of FORMS, of the same weights in each."""
    torch.manual_seed(args.seed)
    if args.weights:
        model = GPT.from_pretrained(args.weights, "cpu", FORMS[form])
    else:
        model = model_from_config(preset(args.model)).to(FORMS[form])
    if form.startswith("int8"):
        quantize_int8(model, dynamic=form == "int8-dynamic")
    return model.requires_grad_(False)


def make_runs(args):
    """{row: a function that runs it once -> seconds of each of its steps}"""
    rows = {text: parse_row(text) for text in args.rows}
    runs = {}
    for form in dict.fromkeys(form for _, _, form, _ in rows.values()):
        model = load(args, form)
        mine = {text: row for text, row in rows.items() if row[2] == form}
        wanted = dict.fromkeys(row[:2] for row in mine.values() if row[0])
        with torch.no_grad():
            sets = make_adapter_sets(model, wanted, args.slots)
        for text, (kind, rank, _, compiled) in mine.items():
            engine = new_engine(model, args.slots, compile=compiled, length=2 * TOKENS)
            runs[text] = make_run(engine, sets.get((kind, rank)), args)
    return {text: runs[text] for text in args.rows}


def make_run(engine, adapters, args):
    generator = torch.Generator().manual_seed(args.seed)
    vocab = engine.model.config.vocab_size
    prompts = torch.randint(vocab, (args.slots, TOKENS), generator=generator).tolist()

    def run(profiler=None):
        """Serve all prompts, step by step -> seconds of each step."""
        install(engine.model, adapters)
        requests = [engine.submit(prompt, adapter_id=i + 1 if adapters else 0,
                                  max_new_tokens=TOKENS) for i, prompt in enumerate(prompts)]
        steps = 0
        while engine.busy:
            install(engine.model, adapters)
            if profiler and steps == 10:
                profiler.start()
            start = time.perf_counter()
            engine.step()
            yield time.perf_counter() - start
            steps += 1
            if profiler and steps == 20:
                profiler.stop()
        for request in requests:
            if request.error:
                raise RuntimeError(request.error)
    return run


def parts_of_a_step(run):
    """{group of operators: its share of the time of all operators of a decoding step}"""
    profiler = profile(activities=[ProfilerActivity.CPU])
    list(run(profiler))
    times = dict.fromkeys([*GROUPS, "other operators"], 0.0)
    for event in profiler.key_averages():
        group = next((g for g, names in GROUPS.items() if re.search(names, event.key)),
                     "other operators")
        times[group] += event.self_cpu_time_total
    return {group: t / sum(times.values()) for group, t in times.items()}


def measure(args):
    runs, first = make_runs(args), {}
    for text, run in tqdm(runs.items(), desc="warm-up", unit="row"):
        start = time.perf_counter()
        list(run())
        first[text] = time.perf_counter() - start
    found = {text: [] for text in runs}
    for r in tqdm(range(args.repeats), unit="round"):
        order = list(runs) if r % 2 == 0 else list(reversed(runs))
        steps = list(zip(*(runs[text]() for text in order), strict=True))   # all rows' first, ...
        for text, mine in zip(order, zip(*steps)):
            found[text].append(mine)
    parts = {text: parts_of_a_step(run) for text, run in runs.items()}
    return [summary(args, text, found, first[text], parts[text]) for text in runs]


def summary(args, text, found, first, parts):
    rates = [args.slots * TOKENS / sum(steps) for steps in found[text]]
    base, mine = ([(s, i == 0) for steps in found[t] for i, s in enumerate(steps)]
                  for t in (args.rows[0], text))
    times, low, high = ratio(base, mine)
    decoding = [s for steps in found[text] for s in steps[1:-1]]   # the last one decodes nothing
    return dict(name=text, tokens_per_second=statistics.median(rates), parts=parts,
                tokens_per_second_min=min(rates), tokens_per_second_max=max(rates),
                ratio=times, ratio_low=low, ratio_high=high, first_run_s=first,
                prefill_ms=1e3 * statistics.median(steps[0] for steps in found[text]),
                step_ms=1e3 * statistics.median(decoding))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=Help)
    add = parser.add_argument
    add("--model", default="tiny_starcoder_py", help="a size, with random weights")
    add("--weights", metavar="FOLDER", help="a model in the place of --model")
    add("--rows", nargs="+", default=ROWS, metavar="ROW", help="KIND:DTYPE, as flora8:float32")
    add("--slots", type=int, default=8, help="requests at once")
    add("--repeats", type=int, default=5, help="rounds, each row once in each")
    add("--seed", type=int, default=0, help="of all that is drawn at random")
    add("--json", metavar="FILE", help="write the results there as JSON")
    args = parser.parse_args()
    check_numbers(args, ["slots", "repeats"], at_least_0=["seed"])
    check_writable(args.json, "--json", JSON)
    data = provenance() | dict(model=args.weights or args.model, slots=args.slots, tokens=TOKENS,
                               repeats=args.repeats, rows=measure(args))
    print(table_of(data))
    if args.json:
        write_json(args.json, data)


if __name__ == "__main__":
    run_main(main)
