"""Tables in the texts are made from data, and a text that says otherwise is found."""
import json
import re

import pytest

from extras import passk, results, toy_problems
from plumbing.files import BadInput, read_json
from plumbing.outputs import write_json
from test_flora import run_script, run_train

ABOUT = dict(run=dict(command="python bench.py", commit="abc", date="2026-11-25"),
             machine=dict(cpu="a CPU", gpu=None, threads=2, torch="2.13.0"))


def bench_row(name, rank, mode, speed, **more):
    method = name if name in ("base", "ia3") else name.split("-")[0]
    return dict(method=method, baseline=name, rank=rank, mode=mode, tokens_per_second=speed,
                tokens_per_second_min=speed - 1, tokens_per_second_max=speed + 1,
                ratio_to_base=speed / 1000, seconds_per_output_token_mean=1 / speed,
                seconds_per_output_token_p99=2 / speed, **more)


EQ7 = dict(eq7=dict(predicted=dict(d=256, k=384, c1=2.85e-9, c2=3.65e-11, inflection_rank=2.0),
                    measured={"lora-token": 1.8, "lora-example": None}),
           model=dict(name="base"), workload=dict(ranks=[1, 8]))
BENCH = ABOUT | EQ7 | dict(rows=[
    bench_row(name, rank, mode, speed, **more)
    for mode, more in [("throughput", {}), ("latency", {"request_rate": 8.0}),
                       ("layer", {"tokens": 1, "batch": 8})]
    for name, rank, speed in [("base", None, 1000.0), ("ia3", 0.5, 900.0), ("flora", 1, 980.0),
                              ("flora", 8, 400.0), ("lora-token", 1, 800.0), ("lora-token", 8, 700.0)]])
PAIRED = BENCH | dict(rows=[   # with the intervals of rows that ran in turns
    row | dict(ratio_to_base_low=row["ratio_to_base"] - 0.002, ratio_to_base_high=row["ratio_to_base"] + 0.002)
    for row in BENCH["rows"]])
ALONE = ABOUT | dict(rows=[   # --mode token
    bench_row(name, rank, "token", speed, what=f"row {name}", parameters=parameters)
    for name, rank, speed, parameters in [("base", None, 400.0, 0), ("ffba", 5, 320.0, 12288)]])
ACCURACY = ABOUT | dict(
    table={"cpp": {"base": dict(mean=3.0, spread=0.0),
                   "flora-r1": dict(mean=2.5, spread=0.1, parameters=3840),
                   "ia3-c_attn": dict(mean=2.6, spread=0.2, parameters=2304)}},
    sweep={"flora-r1": {"0.02": 2.6, "0.04": 2.5}})
HIRA = ABOUT | dict(adapters=32, rows=[dict(name="ours", same=32, tokens_per_second=3187.0,
                                            tokens_per_second_min=1119.0, tokens_per_second_max=3622.0)])
WHISPER = ABOUT | dict(
    steps=80, batch_size=6, dtype="bfloat16", rates={"flora-r1": 0.01},
    base={"cs": dict(clips=188, words=1200, wer=75.0, wer_normalised=71.0, cer=28.0, endless=5)},
    table={"cs": {"flora-r1": dict(parameters=135168, endless=dict(mean=1.5, spread=0.7, seeds=[1, 2]), **{
        key: dict(mean=mean, spread=0.5, seeds=[mean - 0.5, mean + 0.5]) for key, mean in
        dict(wer=60.0, wer_normalised=55.0, cer=19.0, heldout_loss=0.9, seconds=300.0).items()})}})

ENGINES = ABOUT | dict(rows=[
    dict(export="base-lora", form="merged", prompts=4, engine="vllm 9", same=3),
    dict(export="base-hira", form="merged", prompts=4, error="no HiRA"),
    dict(export="base-lora", form="peft", prompts=4, error="no LoRA"),
    dict(export="base-hira", form="peft", prompts=4, error="no HiRA")])
BLEND = ABOUT | dict(rows=[dict(perl=p, cpp=c, perl_bpb=2 - p - c / 10, cpp_bpb=3 - c)
                           for p in (0.0, 0.5) for c in (0.0, 1.0)])
LOAD = ABOUT | dict(tool="a tool", adapters=32, slots=8, requests=4, new_tokens=40, rounds=3, rows=[
    dict(what=what, request_rate=2.0, seconds_per_output_token_mean=spot, seconds_per_output_token_p99=2 * spot,
         time_to_first_token_mean=0.03, time_to_first_token_p99=0.05, server_seconds_per_output_token_mean=0.0095,
         processor_seconds_per_token=spot / 4)
    for what, spot in [("http", 0.01), ("engine", 0.009)]])
RATES = dict(wer=96.2, wer_normalised=92.7, cer=50.2, clips=188, endless=6, seconds=61.4)
HEARD = ABOUT | dict(window=6, rows=[dict(adapter="none") | RATES])
SPEECH = ABOUT | dict(adapter="flora", rank=1, steps=180, seconds_per_step=2.04, dtype="float32", before=RATES,
                      after=RATES | dict(wer=66.2), heldout_loss_before=2.042, heldout_loss_after=0.949)


@pytest.fixture(scope="module")
def measured(tiny_folder, tmp_path_factory):
    """What train.py and passk write: {name: data}."""
    folder, tasks = tmp_path_factory.mktemp("measured"), toy_problems.make_tasks()[0][:2]
    problems = [toy_problems.render("py", *task, str(i)) for i, task in enumerate(tasks)]
    (folder / "py.jsonl").write_text("\n".join(map(json.dumps, problems)))
    lora = run_train(tiny_folder, folder / "lora", "--adapter", "lora", "--steps", 2)
    copy = run_train(tiny_folder, folder / "copy", "--from-lora", lora["adapter_file"], "--steps", 1)
    passk.run(passk.parse_args([
        str(folder / "py.jsonl"), "--weights", str(tiny_folder), "--samples", "1", "--max-new-tokens", "4",
        "--results", str(folder / "r.jsonl"), "--json", str(folder / "passk.json"), "--i-trust-the-code"]))
    return dict(lora=lora, copy=copy, passk=read_json(folder / "passk.json"))


@pytest.fixture
def project(measured, tmp_path, monkeypatch):
    """A text with one place for each kind of table, filled by main()."""
    lora, copy = measured["lora"], measured["copy"]
    kinds = [(results.throughput, BENCH), (results.throughput, PAIRED), (results.latency, BENCH),
             (results.layer, BENCH), (results.accuracy, ACCURACY), (results.rates, ACCURACY),
             (results.speech, WHISPER), (results.inflection, BENCH), (results.one_request, ALONE),
             (results.trainings, lora, copy), (results.copies, copy), (results.bases, lora),
             (results.passed, measured["passk"]), (results.judged, measured["passk"]),
             (results.hira_peers, HIRA), (results.heard, HEARD), (results.one_training, SPEECH),
             (results.engines, ENGINES), (results.blends, BLEND), (results.load, LOAD)]
    tables = {}
    for i, (make, *files) in enumerate(kinds):
        names = [f"{i}-{j}.json" for j in range(len(files))]
        tables[f"t{i}"] = " ".join(names), make
        for name, data in zip(names, files):
            write_json(tmp_path / name, data)
    text = tmp_path / "TEXT.md"
    text.write_text("Before.\n" + "\n".join(f"<!-- table {name} -->\n<!-- end -->" for name in tables))
    for name, value in dict(DATA=tmp_path, TEXTS=[text], TABLES=tables).items():
        monkeypatch.setattr(results, name, value)
    run_script(results.main, ["results"], monkeypatch)
    return text


def test_every_table_in_the_texts_is_that_of_its_data():
    for file in results.TEXTS:
        text = file.read_text()
        assert results.rendered(text) == text, f"{file.name}: run python -m extras.results"


def test_no_data_names_a_home_folder_of_the_machine_that_measured_it():
    found = [file.name for file in results.DATA.glob("*.json")
             if re.search(r"/(root|home|Users)/", file.read_text())]
    assert not found


def test_every_file_of_data_has_a_table_and_every_table_a_place():
    files = {file for name, (names, _) in results.TABLES.items() if name != "commands" for file in names.split()}
    missing = files - {file.name for file in results.DATA.glob("*.json")}
    assert missing <= {results.TABLES[name][0] for name in results.NOT_YET}
    assert files - missing == {file.name for file in results.DATA.glob("*.json")}
    places = [place["name"] for file in results.TEXTS
              for place in results.PLACE.finditer(file.read_text())]
    assert len(places) == len(set(places)), "a table stands in two places"
    assert set(places) == set(results.TABLES)


def test_a_table_whose_data_is_missing_is_refused_naming_the_file(project):
    (results.DATA / "9-1.json").unlink()
    with pytest.raises(BadInput, match="9-1.json: no such file"):
        results.rendered("<!-- table t9 -->\n<!-- end -->")


def test_tables_hold_the_data_and_name_command_and_machine(project, measured):
    text, lora, copy = project.read_text(), measured["lora"], measured["copy"]
    for part in ["Before.", "| base model | 1000 [999–1001] |  |", "| FLoRA | 0.98; 980 [979–981] | 0.40; 400.0 [399.0–401.0] |",
                 "| base model | 1000 tokens/s |  |", "| FLoRA | 0.980 [0.978–0.982] | 0.400 [0.398–0.402] |",
                 "| LoRA, bmm per token (the paper's) | 0.800 [0.798–0.802] |", "| FLoRA | 0.98 | 0.40 |", "1.0 / 2.0",
                 "8 examples of 1 token, the base 1000 [999–1001] rows/s", "2.5000 ± 0.1000",
                 "0.02: 2.6000, 0.04: 2.5000", "`python bench.py`: 2 threads of a CPU", "commit abc",
                 "| parameters | base | FLoRA r1: 3,840 | IA3 on c_attn: 2,304 |", "| C++ headers | 3.0000 |",
                 "| the embedded model | 256, 384 | 2.85e-09 | 3.65e-11 | 2.0 | 1.8 | none up to rank 8 |",
                 "| row ffba | 5 | 12,288 | 3.12 | 0.32 | 320.0 [319.0–321.0] |",
                 f"| LoRA r1 | `c_attn` | {lora['trainable_parameters']} | 0.001 | float32 | "
                 f"{lora['heldout_bpb_before']:.4f} → {lora['heldout_bpb_after']:.4f} |",
                 f"| {100 * copy['share_of_gain']:.1f}% |", f"{copy['run']['command']}`, `",
                 "| Python | none | 2 | 2 | 0.0000 ± 0.0000 |",
                 "| Python | 2 | 0 | 2 | 0 |", "| ours | 3187 [1119–3622] | 32 of 32 |",
                 "| 6 s | none | 188 | 96.2 | 92.7 | 50.2 | 6 | 61 |",
                 "| engine | folder | LoRA on the embedded model | HiRA on the embedded model |", "| vllm 9 | merged | 3 of 4 | (1) |",
                 "| vllm 9 | peft | (2) | (1) |", "(1) no HiRA\n\n(2) no LoRA\n",
                 "| Perl at 0.5 | 1.5000 / 3.0000 | 1.4000 / 2.0000 |",
                 "| 2 | 10.0 / 20.0 | 9.5 | 9.0 / 18.0 | 30.0 / 50.0 | 30.0 / 50.0 | 5.0 % | 2.50 | 2.25 |", "4 requests of 10 new tokens",
                 "| base model | 96.2 | 92.7 | 50.2 | 6 | 2.042 |",
                 "| FLoRA r1, 180 steps of 2.0 s in float32 | 66.2 | 92.7 | 50.2 | 6 | 0.949 |",
                 "Czech: 188 clips", "| base model |  |  | 75.0 | 71.0 | 28.0 | 5 |  |  |",
                 "| FLoRA r1 | 0.01 | 135,168 | 60.0 ± 0.5 | 55.0 ± 0.5 | 19.0 ± 0.5 | 1, 2 | 0.900 ± 0.500 | 300 |"]:
        assert part in text, part


def test_a_command_stands_once_in_a_section_and_of_many_alike_the_first(project, measured):
    place = "<!-- table t0 -->\n<!-- end -->\n"
    text = results.rendered(f"## One\n{place}{place}### Two\n{place}")
    one, two = text.split("### Two")
    assert one.count("`python bench.py`: 2 threads") == one.count("The same run.") == two.count("`python bench.py`") == 1
    assert "The same run." not in two
    runs = [BENCH | dict(run=BENCH["run"] | dict(command=f"python {i}")) for i in range(4)]
    assert results.caption(*runs).startswith("`python 0` and 3 more [like it](RESULTS_APPENDIX.md#every-command): 2 thr")
    told = results.caption(*runs[:2], BENCH | dict(machine=BENCH["machine"] | dict(threads=1)))
    assert told.startswith("`python 0`, `python 1`: 2 threads") and "\n\n`python bench.py`: 1 thread of" in told
    table = results.commands(["a.json", "b.json"], *runs[:2])
    assert "| `b.json` | `python 1` | 2 threads of a CPU, torch 2.13.0, 2026-11-25, commit abc. |" in table


def slug(heading):
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_between_the_texts_lead_to_a_file_and_a_heading():
    texts = [*results.ROOT.glob("*.md"), *results.ROOT.glob("*/*.md")]
    text = {file: re.sub("```.*?```", "", file.read_text(), flags=re.DOTALL) for file in texts}
    headings = {file: set(map(slug, re.findall("^#+ (.*)$", text[file], re.MULTILINE))) for file in texts}
    links = [(file, link) for file in texts for link in re.findall(r"\]\(([^)\s]+)\)", text[file])]
    assert len(links) > 40
    for file, link in links:
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = (file.parent / name).resolve() if name else file
            assert target.exists(), f"{file.name}: {link}"
            assert not anchor or anchor in headings[target], f"{file.name}: {link}"


def test_what_a_gpu_measured_is_shown_as_far_as_it_went(project):
    data = ABOUT | dict(verdicts=[dict(verdict="holds", what="tests on CUDA: 3 passed"),
                                  dict(verdict="not run", what="fig2-15b: ended with status 1")],
                        parts={"tests": dict(passed=3), "fig2-1b": BENCH, "fig2-15b": dict(not_run="ended")})
    place, results.TABLES["gpu"] = "<!-- table gpu -->\n<!-- end -->", ("gpu.json", results.gpu)
    assert "Not run: there was no GPU. `python -m extras.gpu`" in results.rendered(place)
    write_json(results.DATA / "gpu.json", data)
    text = results.rendered(place)
    for part in ["| holds | tests on CUDA: 3 passed |", "| not run | fig2-15b: ended with status 1 |",
                 "fig2-1b, shares of the base's tokens/s:\n\n|", "| FLoRA | 0.98; 980 [979–981] | 0.40;", "2 threads of a CPU"]:
        assert part in text, part
    assert text.count("shares of the base") == 1


@pytest.mark.parametrize("damage", ["text", "data"])
def test_a_number_changed_in_a_text_or_in_its_data_is_found(damage, project, monkeypatch, capsys):
    run_script(results.main, ["results", "--check"], monkeypatch)
    if damage == "text":
        project.write_text(project.read_text().replace("980 [979–981]", "990 [979–981]"))
    else:
        write_json(results.DATA / "0-0.json", BENCH | dict(rows=BENCH["rows"][:5]))
    with pytest.raises(SystemExit) as stop:
        run_script(results.main, ["results", "--check"], monkeypatch)
    assert stop.value.code == 2
    assert "TEXT.md: a table differs from its data; run" in capsys.readouterr().err


def test_wrong_flags_and_unknown_tables_are_refused(project, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_script(results.main, ["results", "--chek"], monkeypatch)
    assert "unrecognized arguments: --chek" in capsys.readouterr().err
    with pytest.raises(BadInput, match="<!-- table t99 -->: there is no such table; use one of t0, t1"):
        results.rendered("<!-- table t99 -->\n<!-- end -->")
