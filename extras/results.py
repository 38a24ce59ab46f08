"""The tables of README.md, extras/RESULTS.md and its appendix, from the data in extras/results/.

  python -m extras.results           write the tables anew, each in its place
  python -m extras.results --check   say which differ from their data, exit with 2
  python -m extras.figures           draw the figures anew

A place is a pair of lines, `<!-- table NAME -->` and `<!-- end -->`, and what stands between them
is made by the function of TABLES from its files, which the command named in each wrote with --json.
So no number in a table is typed, and extras/tests/test_results.py fails where one was. Below a
table stands its command, once in a section; every command stands in the appendix.
"""
import argparse
import re
from functools import partial
from pathlib import Path

from plumbing.figures import tell_rank
from plumbing.files import BadInput, read_json
from plumbing.flags import Help, run_main
from plumbing.names import full_name, model_name
from plumbing.outputs import open_output

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "extras" / "results"
TEXTS = [ROOT / name for name in ("README.md", "extras/RESULTS.md", "extras/RESULTS_APPENDIX.md")]
PLACE = re.compile(r"<!-- table (?P<name>\S+) -->\n.*?<!-- end -->", re.DOTALL)


def markdown(head, rows):
    """Cells -> the lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


MOST = 2   # commands below a table; more of them differ in little


def caption(*files):
    """By which commands, on what and when; commands that share the rest stand in one sentence."""
    commands = {}
    for data in files:
        commands.setdefault(provenance(data), []).append(f"`{data['run']['command']}`")
    lines = []
    for about, mine in commands.items():
        if len(mine) > MOST:
            mine = [f"{mine[0]} and {len(mine) - 1} more "
                    "[like it](RESULTS_APPENDIX.md#every-command)"]
        lines.append(f"{', '.join(mine)}: {about}")
    return "\n\n".join(lines)


def provenance(data):
    run, machine = data["run"], data["machine"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (f"{threads} of {machine['gpu'] or machine['cpu']}, torch {machine['torch']}, "
            f"{run['date']}, commit {run['commit']}.")


def commands(names, *files):
    """Every file of data, with what wrote it."""
    return markdown(["file", "command", "on, when"], [
        [f"`{name}`", f"`{data['run']['command']}`", provenance(data)]
        for name, data in zip(names, files)])


def line_each(*columns):
    """-> what makes a table with a line for each of the rows of its files; a file without rows is
    one. columns: (title, the form in which str.format puts the row's and its file's values, and
    `name`, what a reader calls the row's file)."""
    def table(*files):
        rows = [data | row | dict(name=full_name(row.get("file", "")))
                for data in files for row in data.get("rows", [data])]
        lines = [[form.format(**row) for _, form in columns] for row in rows]
        return markdown([title for title, _ in columns], lines)
    return table


# --------------------------------------------------------------------------- results of bench.py


def by_rank(rows, cell):
    """Rows of one mode -> a table with a column for each rank and cell(row) in it; the base and IA3,
    which have no rank, stand in the first column."""
    ranks = sorted({row["rank"] for row in rows if row["method"] not in ("base", "ia3")})
    lines = []
    for name in dict.fromkeys(row["baseline"] for row in rows):
        mine = [row for row in rows if row["baseline"] == name]
        cells = [cell(row) for row in sorted(mine, key=lambda row: row["rank"] or 0)]
        lines.append([full_name(name), *cells, *[""] * (len(ranks) - len(cells))])
    return markdown(["", *(f"rank {rank}" for rank in ranks)], lines)


def speed(row):
    low, high = row["tokens_per_second_min"], row["tokens_per_second_max"]
    digits = 0 if row["tokens_per_second"] >= 500 else 1
    if low == high:   # one run, in turns
        return f"{row['tokens_per_second']:.{digits}f}"
    return f"{row['tokens_per_second']:.{digits}f} [{low:.{digits}f}–{high:.{digits}f}]"


def share(row):
    """Of the base's speed, with the interval where the data has one."""
    if "ratio_to_base_low" not in row:
        return f"{row['ratio_to_base']:.2f}"
    low, high = row["ratio_to_base_low"], row["ratio_to_base_high"]
    return f"{row['ratio_to_base']:.3f} [{low:.3f}–{high:.3f}]"


def throughput(data):
    """The base's generated tokens/s and the others' shares of it, with their intervals; of older
    data tokens/s too, median [lowest–highest] of the rounds, since its shares have no interval."""
    def cell(row):
        if "ratio_to_base_low" not in row:
            return speed(row) if row["method"] == "base" else f"{share(row)}; {speed(row)}"
        return f"{row['tokens_per_second']:.4g} tokens/s" if row["method"] == "base" else share(row)

    return by_rank([row for row in data["rows"] if row["mode"] == "throughput"], cell)


def latency(data):
    """Milliseconds per output token, mean / 99th percentile over the requests, for each rate."""
    rows = [row for row in data["rows"] if row["mode"] == "latency"]
    rates = sorted({row["request_rate"] for row in rows})
    cells = {}
    for row in rows:
        mean, p99 = (1e3 * row[f"seconds_per_output_token_{what}"] for what in ("mean", "p99"))
        cells[row["baseline"], row["rank"], row["request_rate"]] = f"{mean:.1f} / {p99:.1f}"
    lines = [[f"{full_name(name)}{f' r{rank}' if isinstance(rank, int) else ''}",
              *(cells[name, rank, rate] for rate in rates)]
             for name, rank in dict.fromkeys(key[:2] for key in cells)]
    return markdown(["", *(f"{rate:.3g} requests/s" for rate in rates)], lines)


def layer(data, first=0, last=None):
    """Shares of the base's rows/s of one projection: a table for each number of tokens, from the
    first to the last of these."""
    rows = [row for row in data["rows"] if row["mode"] == "layer"]
    tables = []
    for tokens in sorted({row["tokens"] for row in rows})[first:last]:
        mine = [row for row in rows if row["tokens"] == tokens]
        base = next(row for row in mine if row["baseline"] == "base")
        tables.append(f"{base['batch']} examples of {tokens} token{'s' * (tokens > 1)}, the base {speed(base)} rows/s:\n\n"
                      + by_rank([row for row in mine if row is not base], share))
    return "\n\n".join(tables)


def inflection(*files):
    """Eq. 7's inflection rank, predicted from the measured c1 and c2, beside the measured ones."""
    names = list(files[0]["eq7"]["measured"])
    lines = []
    for data in files:
        p, measured = data["eq7"]["predicted"], data["eq7"]["measured"]
        ranks = [p["inflection_rank"], *(measured[name] for name in names)]
        cells = [tell_rank(float("inf") if rank is None else rank, data) for rank in ranks]
        lines.append([model_name(data["model"]["name"]), f"{p['d']}, {p['k']}", f"{p['c1']:.2e}",
                      f"{p['c2']:.2e}", *cells])
    return markdown(["", "d, k", "c1, s", "c2, s", "Eq. 7",
                     *(f"measured against {full_name(name)}" for name in names)], lines)


def one_request(data):
    """Mode token: one request alone, a line for each row."""
    lines = [[row["what"], row["rank"] or "", f"{row['parameters']:,}" if row["rank"] else "",
              f"{1e3 * row['seconds_per_output_token_mean']:.2f}", share(row), speed(row)]
             for row in data["rows"]]
    head = ["", "rank", "parameters", "ms per token", "of the base's tokens/s", "tokens/s"]
    return markdown(head, lines)


# -------------------------------------------------------- results of train.py, table1, toys, passk


def accuracy(data, methods=None):
    """Mean ± standard deviation over the seeds, a line for each language and a column for each
    method, or each of those named, with its number of parameters."""
    first = next(iter(data["table"].values()))
    methods = methods or [method for method in first if method != "base"]
    head = [f"{full_name(method)}: {first[method]['parameters']:,}" for method in methods]
    lines = [[full_name(language), f"{row['base']['mean']:.4f}",
              *(f"{row[method]['mean']:.4f} ± {row[method]['spread']:.4f}" for method in methods)]
             for language, row in data["table"].items()]
    return markdown(["parameters", "base", *head], lines)


def trainings(*reports):
    """Runs of train.py, a line each."""
    lines = []
    for r in reports:
        precision = f"{r['dtype']}, base in {r['quantize']}" if r["quantize"] else r["dtype"]
        rank = "" if r["adapter"] == "ia3" else f" r{r['rank']}"
        lines.append([f"`{Path(r['adapter_file']).parent}`", full_name(r["adapter"]) + rank,
                      f"`{' '.join(r['targets'])}`",
                      f"{r['trainable_parameters']:,}", f"{r['lr']:g}", precision,
                      f"{r['heldout_bpb_before']:.4f} → {r['heldout_bpb_after']:.4f}",
                      f"{r['heldout_loss_after']:.4f}", f"{r['seconds']:.0f}",
                      f"{r['tokens_per_second'] or 0:.0f}",
                      f"{r['peak_memory_bytes'] / 2**20:.0f} MiB"])
    return markdown(["run", "kind", "on", "parameters", "rate", "in", "held-out bits per byte",
                     "nats per token", "seconds", "tokens/s", "peak memory"], lines)


bases = line_each(   # trainings of a base model, or of 0 steps
    ("steps", "{steps:,}"), ("tokens seen", "{tokens_seen:,}"), ("rate", "{lr:g}"),
    ("in", "{dtype}"), ("seconds", "{seconds:,.0f}"), ("held-out tokens", "{heldout_tokens:,}"),
    ("held-out bytes", "{heldout_bytes:,}"), ("nats per token", "{heldout_loss_after:.4f}"),
    ("bits per byte", "{heldout_bpb_after:.4f}"))
copies = line_each(   # of LoRAs, by train.py --from-lora
    ("FLoRA rank", "{rank}"), ("fitted in", "{fit_seconds:.1f} s"),
    ("relative error of the weights", "{fit_error:.3f}"), ("steps after it", "{steps}"),
    ("seconds", "{seconds:.0f}"), ("nats per token", "{heldout_loss_after:.4f}"),
    ("the LoRA's", "{heldout_loss_teacher:.4f}"), ("of the LoRA's gain", "{share_of_gain:.1%}"))
passed = line_each(   # pass@1, by passk
    ("problems", "{name}"), ("adapter", "{settings[adapter]}"), ("number", "{problems}"),
    ("programs", "{samples}"), ("pass@1 ± standard error", "{pass@1:.4f} ± {±1:.4f}"))
judged = line_each(   # completions that were given to passk
    ("problems", "{name}"), ("completions", "{samples}"), ("passed", "{passed}"),
    ("failed", "{failed}"), ("out of time", "{timeout}"))


def shares(data):
    """How much of what adapters write is C++, beside the loss: a line for each setting."""
    lines = [["the base", "", "", "", f"{data['base_bpb']:.4f}", with_spread(data["base"], 3)]]
    for row in data["rows"]:
        rank = "" if row["adapter"] == "ia3" else f" r{row['rank']}"
        lines.append([full_name(row["adapter"]) + rank, f"`{' '.join(row['targets'])}`",
                      f"{row['trainable_parameters']:,}", f"{row['lr']:g}", with_spread(row["bpb"], 4),
                      with_spread(row["share"], 3)])
    lines.append(["real C++", "", "", "", "", f"{data['real_cpp']:.3f}"])
    lines.append(["real Python", "", "", "", "", f"{data['real_python']:.3f}"])
    return markdown(["text of", "on", "parameters", "rate", "held-out bits per byte",
                     "share that passes for C++"], lines)


def rates(data):
    """The search for the learning rates: what was held out, at each rate."""
    lines = []
    for method, tried in data["sweep"].items():
        tried = {float(rate): value for rate, value in tried.items()}
        best = min(tried, key=tried.get)
        cells = [f"{rate:g}: {tried[rate]:.4f}" for rate in sorted(tried)]
        lines.append([full_name(method), f"{best:g}", ", ".join(cells)])
    return markdown(["", "best", "held-out bits per byte at each rate"], lines)


# ------------------------------------------------------------------------------ results of whisper


def with_spread(found, digits=1):
    """Mean ± standard deviation; the mean alone of one seed."""
    spread = f" ± {found['spread']:.{digits}f}" if len(found["seeds"]) > 1 else ""
    return f"{found['mean']:.{digits}f}{spread}"


def error_cells(scores):
    return [f"{scores[key]:.1f}" for key in ("wer", "wer_normalised", "cer")]


def speech(data):
    """Error rates in percent and the loss on dev.tsv, mean ± standard deviation over the seeds, and
    each seed's endless clips; a table for each language."""
    tables = []
    for language, methods in data["table"].items():
        base = data["base"][language]
        lines = [["base model", "", "", *error_cells(base), base["endless"], "", ""]]
        for method, row in methods.items():
            cells = [with_spread(row[key]) for key in ("wer", "wer_normalised", "cer")]
            lines.append([full_name(method), f"{data['rates'][method]:g}",
                          f"{row['parameters']:,}", *cells,
                          ", ".join(map(str, row["endless"]["seeds"])),
                          with_spread(row["heldout_loss"], 3), f"{row['seconds']['mean']:.0f}"])
        seeds = len(next(iter(methods.values()))["wer"]["seeds"])
        tables.append(f"{full_name(language)}: {base['clips']} clips, {base['words']} words; "
                      f"{data['steps']} steps of {data['batch_size']} clips, {data['dtype']}, seeds: {seeds}\n\n" +
                      markdown(["", "rate", "parameters", "raw WER", "normalised WER", "CER",
                                "endless clips", "loss on `dev`", "training, s"], lines))
    return "\n\n".join(tables)


heard = line_each(   # by whisper score
    ("window", "{window} s"), ("adapter", "{adapter}"), ("clips", "{clips}"),
    ("raw WER", "{wer:.1f}"), ("normalised WER", "{wer_normalised:.1f}"), ("CER", "{cer:.1f}"),
    ("endless clips", "{endless}"), ("seconds", "{seconds:.0f}"))


def one_training(data):
    """Of whisper train: the error rates before and after, and the loss on dev.tsv."""
    trained = (f"{full_name(data['adapter'])} r{data['rank']}, {data['steps']} steps of "
               f"{data['seconds_per_step']:.1f} s in {data['dtype']}")
    lines = [[name, *error_cells(data[when]), data[when]["endless"],
              f"{data[f'heldout_loss_{when}']:.3f}"]
             for name, when in [("base model", "before"), (trained, "after")]]
    return markdown(["", "raw WER", "normalised WER", "CER", "endless clips",
                     "loss on `dev`, nats per token"], lines)


# ----------------------------------------------------------------- results of the peers' programs


def beside_peft(data, which=""):
    """Training beside PEFT: tokens/s, median [lowest–highest] of the runs, and peak memory, of the
    rows in whose name `which` is found."""
    lines = [[f"{row['name']}, {row['dtype']}", speed(row), f"{row['ratio']:.2f}",
              f"{row['peak_memory_bytes'] / 2**20:.0f} MiB"]
             for row in data["rows"] if re.search(which, row["name"])]
    return markdown(["", "tokens/s", "of PEFT's LoRA", "peak memory"], lines)


def engine(data, parts=True):
    """extras/bench_engine.py: tokens/s, the prefill and a step in milliseconds and, with parts, the
    shares of its operators, and seconds of the untimed first run, in which weights are packed or
    code compiled."""
    names = list(data["rows"][0]["parts"]) if parts else []
    lines = [[full_name(row["name"]), speed(row), of_the_first(row), f"{row['prefill_ms']:.0f}",
              f"{row['step_ms']:.2f}", *(f"{100 * row['parts'][part]:.0f} %" for part in names),
              *([f"{row['first_run_s']:.1f}"] if parts else [])] for row in data["rows"]]
    head = ["", "tokens/s", "of the first", "prefill ms", "step ms", *names]
    return markdown(head + (["first run s"] if parts else []), lines)


def of_the_first(row):
    """The ratio to the first row's speed, with the 95 % interval where it was measured in turns."""
    if "ratio_low" not in row:
        return f"{row['ratio']:.2f}"
    return f"{row['ratio']:.3f} [{row['ratio_low']:.3f}–{row['ratio_high']:.3f}]"


def peers(data):
    """Tokens/s of each engine's rows, beside our base in float32 and their rivals in their dtype."""
    beside = {"of this base in float32": "ratio_to_base",
              "of transformers (+ PEFT) in its dtype": "ratio_to_peft"}
    if any(row.get("ratio_to_vllm") for row in data["rows"]):
        beside["of vLLM in its dtype"] = "ratio_to_vllm"
    lines = [[row["engine"], row["what"], row["dtype"], speed(row),
              *(times(row, key) for key in beside.values()),
              f"{row['same_tokens']:.4g} of {data['new']}"]
             for row in data["rows"]]
    head = ["engine", "adapters", "dtype", "tokens/s", *beside,
            "first tokens as in transformers, float32"]
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    return "\n\n".join([
        f"{model_name(data['model'])}, random weights, {data['requests']} requests of "
        f"{data['prompt']} + {data['new']} tokens, greedy, {data['repeats']} rounds; {versions}:",
        markdown(head, lines), *data["notes"]])


def times(row, key):
    """A ratio with its interval, if it has one; "" where there was nothing to compare with."""
    if row.get(key) is None:
        return ""
    low, high = (row.get(f"{key}_{end}", row[key]) for end in ("low", "high"))
    interval = "" if low == high else f" [{low:.2f}–{high:.2f}]"
    return f"{row[key]:.2f}{interval}"


def many(data):
    """train_many --speed: n adapters in one batch beside one after another."""
    lines = [[row["rows_per_adapter"], row["adapters"], speed(row), f"{row['ratio_to_alone']:.2f}",
              f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB"] for row in data["rows"]]
    return markdown(["rows per adapter", "adapters", "tokens/s", "beside one after another",
                     "peak memory"], lines)


def hira_peers(data):
    """extras/peers_hira.py: tokens/s here and by PEFT, and how often PEFT's tokens are ours."""
    lines = [[row["name"], speed(row), f"{row['same']} of {data['adapters']}"]
             for row in data["rows"]]
    return markdown(["", "tokens/s", "requests with our tokens"], lines)


def blends(data):
    """blend_losses.py: held-out bits per byte of both languages, by the weights of both adapters."""
    cells = {(row["perl"], row["cpp"]): f"{row['perl_bpb']:.4f} / {row['cpp_bpb']:.4f}" for row in data["rows"]}
    perls, cpps = (sorted({weights[i] for weights in cells}) for i in (0, 1))
    return markdown(["Perl / C++", *(f"C++ at {cpp:g}" for cpp in cpps)],
                    [[f"Perl at {perl:g}", *(cells[perl, cpp] for cpp in cpps)] for perl in perls])


def load(data):
    """serve_load.py: milliseconds per output token and to the first, as the client, the server's /metrics and the
    engine alone have them; the share of the client's that the server did not see; processor time per token."""
    lines = []
    for rate in sorted({row["request_rate"] for row in data["rows"]}):
        http, engine = (next(row for row in data["rows"] if (row["request_rate"], row["what"]) == (rate, what))
                        for what in ("http", "engine"))
        client, server = http["seconds_per_output_token_mean"], http["server_seconds_per_output_token_mean"]
        cells = [f"{1e3 * row[f'{name}_mean']:.1f} / {1e3 * row[f'{name}_p99']:.1f}"
                 for name in ("seconds_per_output_token", "time_to_first_token") for row in (http, engine)]
        lines.append([f"{rate:g}", cells[0], f"{1e3 * server:.1f}", *cells[1:],
                      f"{100 * (client - server) / client:.1f} %",
                      *(f"{1e3 * row['processor_seconds_per_token']:.2f}" for row in (http, engine))])
    return (f"{data['requests']} requests of {data['new_tokens'] / data['requests']:.0f} new tokens on average, "
            f"{data['adapters']} adapters, {data['slots']} slots, {data['tool']}; mean / 99th percentile, medians of "
            f"{data['rounds']} rounds:\n\n" + markdown(
                ["requests/s", "ms per output token, by HTTP", "in the server", "the engine alone",
                 "ms to the first token, by HTTP", "the engine alone", "HTTP's share",
                 "processor ms per token, the server", "the engine alone"], lines))


def engines(*files):
    """peers_engines: of how many prompts an engine's tokens are ours, a line for each form in which
    it opens the exports; what it said of those that it does not open stands below."""
    rows = [row for data in files for row in data["rows"]]
    exports, forms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("export", "form"))
    errors = list(dict.fromkeys(row["error"] for row in rows if "error" in row))

    def cell(row):
        if "error" in row:
            return f"({1 + errors.index(row['error'])})"
        return f"{row['same']} of {row['prompts']}"

    lines = []
    for data in files:
        found = {(row["form"], row["export"]): row for row in data["rows"]}
        # the longest name has PEFT's version in it
        engine = max((row.get("engine", "") for row in data["rows"]), key=len)
        lines += [[engine, form, *(cell(found[form, export]) for export in exports)]
                  for form in forms]
    notes = [f"({number}) {error}" for number, error in enumerate(errors, start=1)]
    heads = [f"{kind} on {base}" for kind, base in map(export_name, exports)]
    return "\n\n".join([markdown(["engine", "folder", *heads], lines), *notes])


def export_name(export):
    """"base-hira" -> ("HiRA", "the embedded model")."""
    base, _, kind = export.rpartition("-")
    return full_name(kind), model_name("tiny_starcoder_py" if base == "starcoder" else base)


def gpu(data):
    """extras/gpu.py: a line for each claim, and Figure 2's shares of the base for each model that was run."""
    lines = [[line["verdict"], line["what"]] for line in data["verdicts"]]
    tables = [f"{name}, shares of the base's tokens/s:\n\n{throughput(part)}"
              for name, part in data["parts"].items() if name.startswith("fig2") and "rows" in part]
    return "\n\n".join([markdown(["", "on a GPU"], lines), *tables])


# ------------------------------------------------------------------------------------- the places


NOT_YET = {   # tables whose data may be missing, and what then stands in their place
    "gpu": "Not run: there was no GPU. `python -m extras.gpu` is the command."}
TABLES = {   # name in the text: (files in extras/results/, what makes the table of them)
    "gpu": ("gpu.json", gpu),
    "fig2-throughput": ("fig2_1b.json", throughput),
    "fig2-768": ("fig2_768.json", throughput),
    "fig2-rounds": ("fig2_1b_rounds.json", throughput),
    "fig2-latency": ("fig2_1b_rounds.json", latency),
    "layer-15b": ("layer_15b.json", partial(layer, last=1)),
    "layer-15b-more": ("layer_15b.json", partial(layer, first=1)),
    "layer-15b-one": ("layer_15b_one.json", layer),
    "layer-15b-long": ("layer_15b_long.json", layer),
    "peers": ("peers.json", peers),
    "peers-llama": ("peers_llama.json", peers),
    "peers-rounds": ("peers_rounds.json", peers),
    "training": ("training.json", partial(beside_peft, which="PEFT|--fast")),
    "training-all": ("training.json", beside_peft),
    "training-768": ("training_768.json", beside_peft),
    "engines": ("engines_transformers.json engines_vllm.json engines_ctranslate2.json "
                "engines_llama_cpp.json", engines),
    "many": ("train_many.json", many),
    "many-smollm2": ("train_many_smollm2.json", many),
    "engine": ("engine.json", partial(engine, parts=False)),
    "engine-parts": ("engine.json", engine),
    "engine-one": ("engine_one.json", engine),
    "engine-embedded": ("engine_embedded.json", engine),
    "whisper-training": ("whisper_training.json", one_training),
    "whisper-window": ("whisper_window_6.json whisper_window_30.json", heard),
    "whisper": ("whisper.json", speech),
    "whisper-synthetic": ("whisper_synthetic.json", speech),
    "losses": ("table1.json", accuracy),
    "rates": ("table1.json", rates),
    "defaults": ("default_flora.json default_lora.json default_ia3.json default_lora_1e-4.json",
                 trainings),
    "shares": ("shares.json", shares),
    "judged": ("judged.json", judged),
    "toys": ("toys.json", accuracy),
    "smollm2": ("smollm2.json", accuracy),
    "smollm2-rates": ("smollm2.json", rates),
    "smollm2-speed": ("smollm2_speed.json", throughput),
    "humaneval": ("smollm2_humaneval.json", passed),
    "int8": ("plain_flora.json plain_lora.json int8_flora.json int8_lora.json", trainings),
    "cost": ("fig2.json", throughput),
    "throughput": ("fig2.json", throughput),
    "eq7": ("fig2.json", inflection),
    "latency": ("fig2.json", latency),
    "projection": ("layer.json", layer),
    "starcoder-cpu": ("starcoder_cpu.json", throughput),
    "llama-cpu": ("llama_cpu.json", throughput),
    "families": ("starcoder_cpu.json llama_cpu.json", inflection),
    "copies": ("copy_r1_0.json copy_r2_0.json copy_r4_0.json copy_r8_0.json copy_r1_100.json "
               "copy_r2_100.json copy_r4_100.json copy_r8_100.json", copies),
    "no-copies": ("copied_lora.json scratch_r1.json scratch_r4.json", trainings),
    "one-request": ("token.json", one_request),
    "one-request-768": ("token_768.json", one_request),
    "hira-peers": ("peers_hira.json", hira_peers),
    "blend": ("blend.json", blends),
    "load": ("serve_load.json", load),
    "places": ("place_qk.json place_c_attn.json place_mlp.json place_all.json place_qk_low.json "
               "place_c_attn_low.json place_mlp_low.json place_all_low.json", trainings),
    "base": ("base_first.json base_second.json base_python.json base_stdlib.json", bases),
    "adapters": ("adapter_perl.json adapter_javascript.json adapter_bash.json adapter_cpp.json",
                 trainings),
    "programs": ("programs_py.json programs_pl.json programs_js.json programs_sh.json", passed),
}
EVERY = sorted({file for name, (files, _) in TABLES.items() if name not in NOT_YET
                for file in files.split()})
TABLES["commands"] = " ".join(EVERY), partial(commands, EVERY)


def render(place, told=()):
    """A match of PLACE -> (it with its table, as it must stand in the text, the caption). One of
    the captions already told does not stand there again."""
    name = place["name"]
    if name not in TABLES:
        raise BadInput(f"<!-- table {name} -->: there is no such table; use one of "
                       f"{', '.join(TABLES)}")
    names, table = TABLES[name]
    below, parts = "", [NOT_YET.get(name)]
    if name not in NOT_YET or (DATA / names).exists():
        data = [read_json(DATA / file) for file in names.split()]
        below = caption(*data) if name != "commands" else ""
        parts = [table(*data), "The same run." if below in told else below]
    lines = "\n\n".join(part for part in parts if part)
    return f"<!-- table {name} -->\n{lines}\n<!-- end -->", below


def rendered(text):
    """A text with all its tables; each command stands once in a section."""
    parts, told, end = [], set(), 0
    for place in PLACE.finditer(text):
        between = text[end:place.start()]
        if re.search("^##", between, re.MULTILINE):
            told.clear()
        table, below = render(place, told)
        told |= {below} - {""}
        parts += [between, table]
        end = place.end()
    return "".join([*parts, text[end:]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--check", action="store_true",
                        help="write nothing; exit with 2 where a text differs")
    check = parser.parse_args().check
    for file in TEXTS:
        text = file.read_text()
        new = rendered(text)
        if new != text and check:
            raise BadInput(f"{file}: a table differs from its data; run python -m extras.results")
        if new != text:
            with open_output(file) as f:
                f.write(new.encode())
            print(f"wrote {file}")


if __name__ == "__main__":
    run_main(main)
