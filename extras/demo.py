"""The paper's Figure 1, running: one model, four requests, four languages, one batch.

  python -m extras.demo                        a task that the adapters were not trained on
  python -m extras.demo --task 20 --png figure1.png

The embedded model, which knows Python, is asked for the same small program in Python, without an
adapter, and in Perl, JavaScript and Bash, each with an adapter of base/adapters/. Then the programs
are run against their tests where this machine has the language, contained as the top of
extras/sandbox.py says, and the batch is timed against the four requests one after another.
"""
import argparse
import statistics
import time
from pathlib import Path

import torch

import flora
from extras.languages import LANGUAGES, interpreter_of, run_program
from extras.passk import Problem, submit
from extras.toy_problems import make_tasks, render
from generate import Engine
from model import GPT
from plumbing.files import BadInput
from plumbing.flags import EMBEDDED, Help, run_main
from plumbing.outputs import PNG, check_writable, save_figure
from plumbing.prompts import cut_at_stop, new_text
from plumbing.report import side_by_side
from plumbing.tokenizer import Tokenizer

ROWS = {   # language: (its name, its adapter)
    "py": ("Python", None), "pl": ("Perl", "perl"), "js": ("JavaScript", "javascript"),
    "sh": ("Bash", "bash")}
NEW = 96       # tokens of a program at most
ROUNDS = 2     # of the timing
PASSES = "passes its tests"
TRAINING = (   # how such adapters are made
    "python -m extras.toy_problems out/problems --more 180000; python train.py --adapter flora "
    "--rank 3 --targets all --data out/problems/more/{language} --keep-duplicates "
    "--block-size 128 --batch-size 4 --steps 1500 --lr 3.2e-2 --dtype bfloat16 --fast "
    "--out out/{adapter}")


def load():
    """-> (model, tokenizer, {language: adapter id}), the adapters stacked for serving."""
    model, tokenizer = GPT.from_pretrained(EMBEDDED).requires_grad_(False), Tokenizer(EMBEDDED)
    ids = {}
    for language, (_, adapter) in ROWS.items():
        ids[language] = flora.BASE
        if adapter:
            ids[language] = flora.load_adapter(model, find(language, adapter))
    flora.freeze_bank(model)
    return model, tokenizer, ids


def find(language, adapter):
    """An adapter's file. BadInput, with the commands that make it, where there is none."""
    file = Path(EMBEDDED, "adapters", f"{adapter}.safetensors")
    if not file.exists():
        raise BadInput(f"{file}: no such adapter; copy out/{adapter}/adapter.safetensors there "
                       "after: " + TRAINING.format(language=language, adapter=adapter))
    return str(file)


def problem_of(language, kind, task):
    """A task of toy_problems as a problem of one language."""
    made = render(language, kind, task, "demo")
    return Problem("demo", "demo", language, made["prompt"], made["tests"], made["stop_tokens"])


def write_programs(engine, tokenizer, problems, ids):
    """Serve one request for each of {language: problem} -> ({language: what the model adds to the
    prompt}, new tokens)."""
    requests = {language: submit(engine, tokenizer, problem, adapter_id=ids[language],
                                 max_new_tokens=NEW)
                for language, problem in problems.items()}
    engine.run()
    texts = {language: new_text(tokenizer, r.ids) for language, r in requests.items()}
    return texts, sum(len(r.ids) for r in requests.values())


def shown(task, problem, text):
    """A program without the line that tells the task, and with the brace that ended it."""
    prompt = "\n".join(line for line in problem.prompt.split("\n") if task not in line)
    body = cut_at_stop(text, problem.stops)
    return prompt.rstrip() + body + ("\n}" if text[len(body):].startswith("\n}") else "")


def verdict(problem, text):
    """How a program fares in its tests."""
    try:
        interpreter_of(problem.language)
    except BadInput:
        return f"not run: no {LANGUAGES[problem.language].command[0]} here"
    program = f"{problem.prompt}{cut_at_stop(text, problem.stops)}\n{problem.tests}"
    outcome = run_program(problem.language, program).outcome
    return PASSES if outcome == "passed" else f"does not pass its tests ({outcome})"


def time_batch(engine, tokenizer, problems, ids):
    """-> (tokens/s of the four as one batch, one after another), means of rounds in turns."""
    def speed(groups):
        begin, tokens = time.perf_counter(), 0
        for group in groups:
            tokens += write_programs(engine, tokenizer, group, ids)[1]
        return tokens / (time.perf_counter() - begin)

    alone = [{language: problem} for language, problem in problems.items()]
    rounds = [(speed([problems]), speed(alone)) for _ in range(ROUNDS)]
    return [statistics.mean(found) for found in zip(*rounds)]


def draw(file, task, texts, verdicts):
    """The paper's Figure 1 with what this run wrote: requests, one batch, outputs."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(12, 7))
    axis.set(xlim=(0, 12), ylim=(0, 7))
    axis.axis("off")
    box = dict(boxstyle="round,pad=0.4", facecolor="white")
    passed = list(verdicts.values()).count(PASSES)
    adapters = sum(ROWS[language][1] is not None for language in texts)
    title = (f"{len(texts)} requests, {adapters} adapters, one batch: {passed} of {len(texts)} "
             "programs pass their tests")
    axis.text(6, 6.75, f"{title}\n{task}", ha="center", va="center", fontsize=11)
    model = axis.text(4.3, 3.3, "one model\n\n$Y = A \\circ ((B \\circ X)\\, W_0)$\n\none batch",
                      ha="center", va="center", fontsize=13, bbox=box | dict(edgecolor="black"))
    boxes = []
    for i, (language, text) in enumerate(texts.items()):
        y, color = 5.8 - 1.65 * i, f"C{i}"
        name, adapter = ROWS[language]
        asked = f"in {name}\n" + (f"adapter $A_{i}$, $B_{i}$" if adapter else "no adapter")
        boxes.append((axis.text(1.2, y, asked, ha="center", va="center", fontsize=10,
                                bbox=box | dict(edgecolor=color)),
                      axis.text(6.9, y, text, va="center", fontsize=9, family="monospace",
                                parse_math=False, bbox=box | dict(edgecolor=color))))
        axis.text(11.9, y, verdicts[language], va="center", ha="right", fontsize=9, color=color)
    figure.tight_layout()   # before boxes are measured
    for i, (asked, written) in enumerate(boxes):
        beside = 3.3 + 0.33 * (1.5 - i)   # where its arrows touch the model
        connect(axis, asked, model, beside, f"C{i}", into=True)
        connect(axis, written, model, beside, f"C{i}", into=False)
    save_figure(figure, file)
    print(f"wrote {file}")


def connect(axis, text, model, height, color, into):
    """An arrow between the facing sides of two boxed texts, into the model's or out of it, which
    it touches at a height of its own."""
    axis.figure.canvas.draw()
    own, hub = (t.get_bbox_patch().get_window_extent().transformed(axis.transData.inverted())
                for t in (text, model))
    middle = (own.y0 + own.y1) / 2
    ends = [(own.x1, middle), (hub.x0, height)] if into else [(hub.x1, height), (own.x0, middle)]
    axis.annotate("", ends[1], ends[0], arrowprops=dict(
        arrowstyle="->", color=color, shrinkA=0, shrinkB=0))


def demo(args):
    check_writable(args.png, "--png", PNG)
    tasks = make_tasks()[0]
    if not 0 <= args.task < len(tasks):
        raise BadInput(f"--task {args.task}: there are tasks 0 to {len(tasks) - 1}")
    problems = {language: problem_of(language, *tasks[args.task]) for language in ROWS}
    model, tokenizer, ids = load()
    engine = Engine(model, slots=len(ROWS))
    texts, _ = write_programs(engine, tokenizer, problems, ids)
    verdicts = {language: verdict(problems[language], texts[language]) for language in ROWS}
    task = problems["py"].prompt.split('"""')[1]
    programs = {language: shown(task, problems[language], texts[language]) for language in ROWS}
    print(f"{task} Four requests in one batch, three with an adapter each:\n")
    print(side_by_side([f"{ROWS[language][0]}: {verdicts[language]}\n\n{programs[language]}"
                        for language in ROWS]))
    batch, alone = time_batch(engine, tokenizer, problems, ids)
    print(f"\n{batch:.0f} tokens/s as one batch, {alone:.0f} one after another "
          f"({torch.get_num_threads()} threads, means of {ROUNDS} rounds)")
    if args.png:
        draw(args.png, task, programs, verdicts)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=Help)
    parser.add_argument("--task", type=int, default=17,
                        help="which of the tasks that no adapter was trained on (default: 17)")
    parser.add_argument("--png", metavar="FILE", help="draw it there")
    demo(parser.parse_args())


if __name__ == "__main__":
    run_main(main)
