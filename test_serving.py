"""What the engine and the benchmark promise. Tiny random models; every equality is against a plain run."""
import copy
import json
import os
import subprocess
import sys

import pytest
import torch

import bench
import flora
import generate
from flora import BASE, BadInput
from generate import Engine
from model import EMBEDDED, GPT, GPTConfig, Tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
KINDS = [("flora", 1, None), ("lora", 2, None), ("ia3", 1, None), ("flora", 3, ["c_attn.qk"]),
         ("lora", 1, ["all"]), ("flora", 2, ["all"])]


def trained(model, adapter_id, seed=0):
    """Move an adapter away from the identity."""
    g = torch.Generator().manual_seed(seed + adapter_id)
    for p in flora.adapter_parameters(model, adapter_id).values():
        p.data += 0.5 * torch.randn(p.shape, generator=g)
    return adapter_id


def tiny_model(kinds=KINDS):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, n_positions=64, n_embd=64, n_layer=2, n_head=4, n_inner=128))
    for kind, rank, targets in kinds:
        trained(model, flora.add_adapter(model, kind, rank, targets))
    return model


def tiny_copy(model):
    """A model of the same weights that has never generated, one FLoRA adapter of rank 2 included."""
    fresh = tiny_model([("flora", 2, None)])
    fresh.load_state_dict(model.state_dict())
    return fresh


def tiny_requests(n, adapters, seed=0):
    """[(prompt, settings)] of several lengths, adapters and limits."""
    g = torch.Generator().manual_seed(seed)
    def number(lo, hi):
        return int(torch.randint(lo, hi, (1,), generator=g))
    return [(torch.randint(0, 97, (number(1, 20),), generator=g).tolist(),
             dict(adapter_id=number(0, adapters + 1), max_new_tokens=number(1, 12),
                  temperature=(0.0, 0.8)[i % 3 == 2], top_k=20 * (i % 2), top_p=0.9, seed=i))
            for i in range(n)]


def plain(model, prompt, adapter_id=BASE, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0, seed=0):
    """The reference: one request, no cache, no batch, the whole text again for every token."""
    ids, g = list(prompt), torch.Generator().manual_seed(seed)
    u = torch.rand(max_new_tokens, generator=g)
    for i in range(max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), torch.tensor([adapter_id]))[:, -1]
        settings = torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p])
        ids.append(int(generate.sample(logits, *settings, u[i:i + 1])))
    return ids[len(prompt):]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def expected(model):
    """40 requests and what each returns alone; every second one ends before its limit, at an eos_id."""
    requests, alone = tiny_requests(40, len(KINDS)), []
    for i, (prompt, settings) in enumerate(requests):
        ids = plain(model, prompt, **settings)
        if i % 2:
            settings["eos_id"] = ids[len(ids) // 2]
            ids = ids[:ids.index(settings["eos_id"]) + 1]
        alone.append(ids)
    return requests, alone


@pytest.mark.parametrize("setting", [
    dict(slots=5), dict(slots=1), dict(slots=64), dict(slots=5, continuous=False),
    dict(slots=5, max_batched_tokens=30), dict(slots=5, sync_every=4, every=3), dict(slots=5, all_slots=True)],
    ids=str)
def test_each_request_returns_what_it_returns_alone(model, expected, setting):
    """Whatever the slots, the budget, the arrivals (two before every step, or two every third), and
    the steps between two reads of the tokens; in continuous and in static batching."""
    requests, alone = expected
    engine = Engine(model, **{k: v for k, v in setting.items() if k not in ("all_slots", "every")})
    engine.fixed_shapes |= setting.get("all_slots", False)  # as for CUDA graphs
    submitted, arrivals, steps = [], iter(requests), 0
    while engine.busy or len(submitted) < len(requests):
        if steps % setting.get("every", 1) == 0:
            submitted += [engine.submit(prompt, **settings) for _, (prompt, settings) in zip(range(2), arrivals)]
        steps += 1
        engine.step()
        assert len(engine.running) <= engine.slots
    assert [r.ids for r in submitted] == alone
    assert all(r.state == "done" for r in submitted)


def test_thousand_requests_in_thousand_results_out_each_reported_once_in_order_of_arrival():
    model = tiny_model([("flora", 1, None)])
    engine = Engine(model, slots=32)
    requests = [engine.submit([i % 97], adapter_id=i % 2, max_new_tokens=1 + i % 3) for i in range(1000)]
    ended, tokens = [], 0
    while engine.busy:
        for request, ids in engine.step():
            tokens += len(ids)
            ended += [request] if request.state == "done" else []
    assert len(ended) == 1000 and set(ended) == set(requests)
    assert tokens == sum(len(r.ids) for r in requests) == sum(r.max_new_tokens for r in requests)
    first = [r.first_token for r in requests]
    assert first == sorted(first) and all(r.arrived <= r.first_token <= r.ended for r in requests)


def test_a_cancelled_a_failing_and_a_too_long_request_disturb_no_other(model, expected):
    requests, alone = expected
    requests, alone = requests[:8], alone[:8]
    def broken(ids):
        raise KeyError("mine")
    engine = Engine(model, slots=4)
    submitted = [engine.submit(prompt, **settings) for prompt, settings in requests[:4]]
    too_long = engine.submit([1] * 65, max_new_tokens=5)
    unknown = engine.submit([1], adapter_id=77)
    nonsense = engine.submit([97])
    failing = engine.submit([1, 2, 3], max_new_tokens=9, stopped=broken)
    running = engine.submit([4, 5], adapter_id=1, max_new_tokens=50)
    waiting = engine.submit([6], max_new_tokens=5)
    submitted += [engine.submit(prompt, **settings) for prompt, settings in requests[4:]]
    engine.cancel(waiting)
    while engine.busy:
        engine.step()
        if len(running.ids) == 3:
            engine.cancel(running)
    assert [r.ids for r in submitted] == alone
    assert [r.state for r in (running, waiting, failing, too_long)] == ["cancelled"] * 2 + ["failed"] * 2
    assert len(running.ids) == 3 and waiting.ids == []
    assert "65 tokens, more than the model's context of 64 (n_positions); shorten it" in too_long.error
    assert unknown.error == "the model has no adapter 77; load it first"
    assert "outside 0 to 96" in nonsense.error and "stopped() raised KeyError" in failing.error


def test_a_request_ends_at_the_end_of_the_context(model):
    engine = Engine(model, slots=2)
    full, almost = engine.submit([1] * 64), engine.submit([1] * 62, adapter_id=1, max_new_tokens=9)
    engine.run()
    assert (full.state, full.ids, almost.state, len(almost.ids)) == ("done", [], "done", 2)


def test_adapters_come_and_go_between_steps(tmp_path):
    """Loaded and evicted while others run, in place where they fit, and ids are used again."""
    model, donor = tiny_model(), tiny_model()
    files = {}
    for kind, rank, targets in [("flora", 2, None), ("lora", 1, ["all"]), ("flora", 9, None)]:
        i = trained(donor, flora.add_adapter(donor, kind, rank, targets), seed=5)
        files[kind, rank] = str(tmp_path / f"{kind}{rank}.safetensors")
        flora.save_adapter(donor, i, files[kind, rank])
    engine = Engine(model, slots=4)
    long = engine.submit([1, 2, 3], adapter_id=2, max_new_tokens=30)
    alone = plain(model, [1, 2, 3], 2, 30)
    engine.step()
    with pytest.raises(BadInput, match="adapter 2 is in use by a request"):
        engine.remove_adapter(2)
    layer = model.transformer.h[0].attn.c_attn
    for evicted, file, in_place in [(3, ("flora", 2), True), (1, ("lora", 1), True), (4, ("flora", 9), False)]:
        engine.remove_adapter(evicted)
        before = layer.frozen_bank.scale_A.data_ptr()
        assert engine.submit([5], adapter_id=evicted).error
        adapter_id = engine.load_adapter(files[file])
        assert adapter_id == evicted
        assert (layer.frozen_bank.scale_A.data_ptr() == before) == in_place
        request = engine.submit([7, 8], adapter_id=adapter_id, max_new_tokens=4)
        while request.state != "done":
            engine.step()
        reference = tiny_model([])
        flora.load_adapter(reference, files[file])
        assert request.ids == plain(reference, [7, 8], 1, 4)
    engine.run()
    assert long.ids == alone


def test_generate_equals_the_plain_loop(model, expected):
    requests, _ = expected
    prompts, adapter_ids = [p for p, _ in requests[:9]], [s["adapter_id"] for _, s in requests[:9]]
    settings = dict(max_new_tokens=7, temperature=0.7, top_k=30, top_p=0.9)
    got = generate.generate(model, prompts, adapter_ids, seed=3, **settings)
    assert got == [plain(model, p, a, seed=3 + row, **settings)
                   for row, (p, a) in enumerate(zip(prompts, adapter_ids))]


def test_a_model_may_be_trained_changed_and_copied_between_generations():
    """Packed copies of the weights follow them, and never stand where a gradient is wanted."""
    model, prompt = tiny_model([("flora", 2, None)]), [3, 1, 4]
    for _ in range(2):
        expected = plain(tiny_copy(model), prompt, 1, max_new_tokens=8)
        assert generate.generate(model, [prompt], [1], max_new_tokens=8) == [expected]
        assert generate.generate(copy.deepcopy(model), [prompt], [1], max_new_tokens=8) == [expected]
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight.mul_(-1)
            model.transformer.wte.weight.add_(torch.randn(97, 64))
    model(torch.tensor([prompt]), torch.tensor([1])).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in flora.adapter_parameters(model, 1).values())


@pytest.mark.parametrize("path", ["example", "token", "masked"])
@pytest.mark.parametrize("T", [1, 7])
def test_lora_variants_equal_the_dense_definition(path, T):
    """y_i = x_i (W0 + (alpha / r) B_i A_i), mixed ranks, the base among them, with and without gather."""
    torch.manual_seed(0)
    layer = flora.AdapterLinear(16, 24)
    layer.num_adapters, layer.lora_path = 3, path
    for i, rank in [(1, 1), (3, 4)]:
        layer.adapters[str(i)] = flora.Adapter("lora", rank, "c_fc", 16, 24)
        torch.nn.init.normal_(layer.adapters[str(i)].A)
    x, ids = torch.randn(5, T, 16), torch.tensor([3, 0, 1, 2, 3])
    with torch.no_grad():
        W = [layer.weight.T + (8 / a.rank * a.B @ a.A if a else 0)
             for a in (layer.adapters[str(i)] if str(i) in layer.adapters else None for i in range(4))]
        dense = torch.stack([x[row] @ W[i] for row, i in enumerate(ids.tolist())]) + layer.bias
        torch.testing.assert_close(layer(x, ids), dense)
        torch.testing.assert_close(layer(x, ids[:, None].expand(5, T)), dense)
        if T == 1:
            torch.testing.assert_close(layer(x, {layer: layer.gather(ids)}), dense)


# ------------------------------------------------------------------------------------ command lines


def script(name, *args, cwd=None):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, os.path.join(HERE, name), *map(str, args)], cwd=cwd, env=env,
                          capture_output=True, text=True)


def write_jsonl(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_requests_in_results_out_and_an_interrupted_run_is_completed(tmp_path):
    """The embedded model: results equal generate()'s, a too long one fails alone, done work is kept."""
    model, tokenizer = GPT.from_pretrained(EMBEDDED), Tokenizer(EMBEDDED)
    adapter = str(tmp_path / "a.safetensors")
    flora.save_adapter(model, trained(model, flora.add_adapter(model, "flora", 2)), adapter)
    lines = [dict(prompt="def f(x):", max_new_tokens=5), dict(prompt="import ", adapter=adapter),
             dict(prompt="x " * 600), dict(prompt="class A", adapter=adapter, stop=["e"], temperature=0.5, seed=7)]
    requests, results = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = ["--requests", requests, "--results", results, "--max-new-tokens", 9, "--slots", 2]
    run = script("generate.py", *command)
    assert run.returncode == 0 and "4 requests, 1 failed" in run.stderr, run.stderr
    got = {r["line"]: r for r in map(json.loads, results.read_text().splitlines())}
    assert sorted(got) == [1, 2, 3, 4] and "shorten it" in got[3]["error"] and got[3]["tokens"] == []
    for line, i, settings in [(1, BASE, dict(max_new_tokens=5)), (2, 1, dict(max_new_tokens=9))]:
        ids = generate.generate(model, [tokenizer.encode(lines[line - 1]["prompt"])], [i],
                                eos_id=tokenizer.eos_id, **settings)[0]
        assert got[line]["tokens"] == ids and got[line]["error"] is None
        assert got[line]["text"] == tokenizer.decode(ids)
    assert "e" not in got[4]["text"] and got[4]["seed"] == 7

    whole = results.read_text().splitlines(keepends=True)
    results.write_text("".join(whole[:2]) + whole[2][:20])  # killed in the middle of a line
    run = script("generate.py", *command)
    assert run.returncode == 0 and "2 requests, " in run.stderr, run.stderr
    again = results.read_text().splitlines(keepends=True)
    assert again[:2] == whole[:2] and sorted(again) == sorted(whole)
    write_jsonl(requests, [dict(prompt="another")] + lines[1:])
    run = script("generate.py", *command)
    assert run.returncode == 2 and "line 1 of the requests was another one then; move the file" in run.stderr


def test_requests_that_make_no_sense_are_refused_in_a_sentence(tmp_path):
    file = tmp_path / "in.jsonl"
    for text, sentence in [
            ("{", "not readable as JSONL .line 1: "), ("", "holds no request"), ("[1]", 'line 1: needs a JSON object'),
            ('{"prompt": "a"}\n{"prompt": "b", "top": 1}', "line 2: unknown key 'top'; use prompt, adapter"),
            ('{"prompt": "a", "max_new_tokens": "9"}', "max_new_tokens is '9', which is no whole number"),
            ('{"prompt": "a", "temperature": true}', "temperature is True, which is no number"),
            ('{"prompt": "a", "stop": "x"}', "stop is 'x', which is no list of texts"),
            ('{"prompt": "a", "stop": [""]}', "which is no list of texts")]:
        file.write_text(text)
        with pytest.raises(BadInput, match=sentence):
            generate.read_requests(str(file), {})
    with pytest.raises(BadInput, match="nothing.jsonl: not readable"):
        generate.read_requests(str(tmp_path / "nothing.jsonl"), {})
    for flags in (["--requests", file], ["--requests", file, "--results", file, "--prompt", "x"],
                  ["--requests", file, "--results", file, "--slots", "0"]):
        with pytest.raises(SystemExit) as exit:
            generate.parse_args(list(map(str, flags)))
        assert exit.value.code == 2


ROW_KEYS = {"method", "baseline", "rank", "mode", "request_rate", "tokens_per_second", "ratio_to_base",
            "seconds_per_output_token_mean", "seconds_per_output_token_p50", "seconds_per_output_token_p99",
            "time_to_first_token_mean", "time_to_first_token_p99"}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model([]).save_pretrained(folder)
    return folder


def test_bench_writes_table_json_and_figure(tiny_folder, tmp_path):
    run = script("bench.py", "--weights", tiny_folder, "--ranks", 1, 2, "--num-requests", 5, "--scale", 0.02,
                 "--mode", "throughput", "latency", "layer", "--layer-tokens", 1, 3, "--repeats", 1, "--slots", 2,
                 "--num-adapters", 3, "--request-rate", 500, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "out" / "bench_cpu.json").read_text())
    assert result.keys() >= {"machine", "model", "dtype", "workload", "limits", "rows", "eq7"}
    methods = 2 + 2 * 4  # base and ia3; flora and three LoRAs at two ranks
    served = [row for row in result["rows"] if row["mode"] != "layer"]
    assert len(served) == 2 * methods and len(result["rows"]) == 4 * methods
    assert all(row.keys() >= ROW_KEYS for row in served)
    assert {row["baseline"] for row in served} == {"base", "ia3", "flora", "lora-token", "lora-example", "lora-masked"}
    assert {row["request_rate"] for row in served if row["mode"] == "latency"} == {500}
    assert all(row["ratio_to_base"] == 1 for row in served if row["method"] == "base")
    assert result["eq7"]["predicted"]["c1"] > 0 and "predicted inflection rank" in run.stdout
    assert (tmp_path / "figures" / "fig2_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.tmp"))
    for row in served:
        assert f"{row['tokens_per_second']:.1f}" in run.stdout


def test_bench_refuses_what_it_cannot_run_in_a_sentence(tiny_folder, tmp_path, monkeypatch):
    bad, few = tmp_path / "bad.json", tmp_path / "few.json"
    bad.write_text('[{"text": 1}]')
    few.write_text(json.dumps([{"conversations": [{"value": "word " * 50}, {"value": "answer " * 50}]}]))
    for flags, sentence in [
            (["--ranks", "0"], "--ranks is .0.; use whole numbers"), (["--num-adapters", "0"], "--num-adapters is 0"),
            (["--request-rate", "-1"], "--request-rate and --scale must be above 0"),
            (["--model", "starcoder"], "--model needs --random-weights"), (["--random-weights"], "--model needs"),
            (["--scale", "1"], "--scale 1.0: the longest request has .* more than the model's context of 64; use"),
            (["--weights", tmp_path / "nowhere"], "nowhere: no such model folder")]:
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, ["--weights", tiny_folder, *flags])])
        with pytest.raises(BadInput, match=sentence):
            bench.main()
    with pytest.raises(BadInput, match="no.json: cannot be read"):
        bench.dataset_prompts(tmp_path / "no.json", 1, 0, None)
    with pytest.raises(BadInput, match="bad.json: is not in ShareGPT's JSON format .KeyError"):
        bench.dataset_prompts(bad, 1, 0, None)
    with pytest.raises(BadInput, match="holds 1 conversations of 50 to 2,000 tokens, but --num-requests is 2"):
        bench.dataset_prompts(few, 2, 0, None)
    assert bench.dataset_prompts(few, 1, 0, None) == [(62, 87)]


def test_bench_lengths_follow_the_paper_and_the_seed():
    lengths = bench.synthetic_lengths(4000, 0)
    assert all(50 <= p + n <= 2000 for p, n in lengths)
    assert abs(sum(p for p, _ in lengths) / 4000 - 161) < 10 and abs(sum(n for _, n in lengths) / 4000 - 338) < 15
    assert lengths[:100] == bench.synthetic_lengths(100, 0) != bench.synthetic_lengths(100, 1)


def test_bench_does_not_time_variants_that_disagree():
    fresh = tiny_model([])
    sets = bench.make_adapter_sets(fresh, [("lora", 2), ("flora", 2), ("ia3", 0.5)], 2)
    bench.check_agreement(fresh, sets, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flora, "lora_masked", lambda x, A, B, mask: torch.zeros(*x.shape[:2], A.shape[1]))
        with pytest.raises(RuntimeError, match="lora rank 2: masked differs from example"):
            bench.check_agreement(fresh, sets, torch.float32)


def test_int8_base_is_close_and_adapters_run_on_it():
    model, exact = tiny_model(), tiny_model()
    flora.quantize_int8(model)
    ids, adapter_ids = torch.randint(0, 97, (7, 9)), torch.arange(7)
    with torch.no_grad():
        expected, layers = exact(ids, adapter_ids), [layer for _, layer in flora.adapter_layers(model)]
        assert (model(ids, adapter_ids) - expected).norm() < 0.03 * expected.norm()
        for layer, exact_layer in zip(layers, (layer for _, layer in flora.adapter_layers(exact))):
            exact_layer.weight.copy_(layer.weight.float() * layer.scale[:, None])
        for path in ("expand", "materialise"):
            for layer in layers:
                layer.path = path
            torch.testing.assert_close(model(ids, adapter_ids), exact(ids, adapter_ids), atol=1e-4, rtol=1e-4)
    assert generate.generate(model, [[1, 2]], [3], max_new_tokens=6)[0] == plain(exact, [1, 2], 3, 6)
