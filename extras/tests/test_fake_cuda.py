"""The paths of CUDA on a machine without a GPU: no two devices meet, and how often the host waits for the GPU.

A read makes the host wait, so that the GPU runs dry; these tests hold how many there are in each step, and which
function asks. They see devices and shapes, no values (fake_cuda.py): whether the tokens are right, extras/gpu.py says.
"""
import contextlib
import importlib.util
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import flora
import train
from extras import fast, gpu_parts, hot_swap, int8, train_many, whisper
from extras.graphs import BLOCK, GraphEngine
from extras.tests import conftest
from extras.tests.conftest import EXTRA_KINDS, MIXED
from extras.tests.fake_cuda import LACKING, TOKEN, build_guard, fake_cuda
from extras.whisper_model import WhisperConfig, write_greedily
from generate import Engine, new_engine
from model import model_from_config
from plumbing import adapter_files, folders, processes, provenance, timing
from plumbing.files import BadInput

CUDA = torch.device("cuda")
CONFIGS = {name: replace(config, n_layer=1) for name, config in conftest.CONFIGS.items()}   # fake tensors are slow
FAMILIES = ["gpt_bigcode", "llama"]
FAKE = "fake", "fake"   # fingerprints; those of fake tensors cannot be had
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WHISPER = WhisperConfig(vocab_size=300, n_positions=24, n_embd=16, n_layer=2, n_head=2, n_inner=64, encoder_layers=1,
                        encoder_heads=2, encoder_inner=64, n_mels=8, n_heard=10)


@pytest.fixture(scope="module")
def set_guard(tmp_path_factory):
    """build_guard's; None where torch brings its own."""
    if torch.version.cuda:
        return None
    return build_guard(tmp_path_factory.mktemp("guard")) or pytest.skip(LACKING)


@pytest.fixture
def traffic(set_guard):
    with fake_cuda(set_guard) as traffic:
        yield traffic


class Captures(list):
    """What passed between host and GPU in each capture; devices: which were made the current one for it."""


@pytest.fixture
def captured(traffic, monkeypatch):
    """Stand-ins for streams and graphs -> Captures."""
    captures = Captures()

    @contextlib.contextmanager
    def graph(graph, stream):
        before = traffic.reads + traffic.uploads
        yield
        captures.append(traffic.reads + traffic.uploads - before)

    def stream():
        return SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def device(device):
        captures.devices.append(device)
        yield

    captures.devices = []   # that were made the current one for a capture
    for name, value in dict(graph=graph, Stream=stream, current_stream=stream, stream=contextlib.nullcontext,
                            device=device, CUDAGraph=lambda: SimpleNamespace(replay=lambda: None)).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return captures


def model_on_cuda(config, dtype=torch.float32, kinds=()):
    with CUDA:
        model = model_from_config(config)
    model.to(dtype)
    model.requires_grad_(False)
    for kind, rank, targets in kinds:
        flora.add_adapter(model, kind, rank, targets)
    return model


def served_on_cuda(family="gpt_bigcode", dtype=torch.float32):
    """With adapters of every kind, stacked for serving."""
    model = model_on_cuda(CONFIGS[family], dtype, MIXED[family] + EXTRA_KINDS[family])
    flora.freeze_bank(model)
    return model


def ids_for(model, B, T):
    return torch.zeros(B, T, dtype=torch.int64, device=CUDA)


def adapters_for(model, B, T=None):
    return torch.arange(B, device=CUDA) if T is None else torch.zeros(B, T, dtype=torch.int64, device=CUDA)


def scaled_layers(model):
    """How many layers have a ΔW."""
    return sum(layer.bank().scale_A is not None for _, layer in flora.adapter_layers(model) if layer.adapters)


def check_forwards(model, traffic, reads={}, per_token=(False, True)):
    """Prompts and single tokens, an adapter for each example and for each token: each a forward with `reads`."""
    cache = model.new_kv_cache(4, 20)
    for T, positions in [(7, None), (1, torch.full((4, 1), 9, device=CUDA))]:
        for each in per_token:
            traffic.clear()
            with torch.inference_mode():
                logits = model(ids_for(model, 4, T), adapters_for(model, 4, T if each else None), cache, positions)
            assert logits.device.type == "cuda" and logits.dtype == model.wte.weight.dtype
            assert logits.shape == (4, T, model.config.vocab_size)
            assert traffic.reads == reads and not traffic.uploads


# --------------------------------------------------------------------------------- what is counted


def test_devices_that_meet_are_refused(traffic):
    with pytest.raises(Exception, match="device"):
        torch.zeros(3, device=CUDA) + torch.zeros(3)


@pytest.mark.parametrize("what, reads, uploads", [
    (lambda x: x.sum().item(), 1, 0), (lambda x: bool(x.any()), 1, 0), (lambda x: int(x[0]), 1, 0),
    (lambda x: x.tolist(), 1, 0), (lambda x: x.cpu(), 1, 0), (lambda x: x.unique(), 1, 0), (lambda x: x[x > 0], 1, 0),
    (lambda x: torch.zeros(3).copy_(x), 1, 0), (lambda x: x.copy_(torch.zeros(3)), 0, 1),
    (lambda x: torch.zeros(3).to(CUDA), 0, 1), (lambda x: torch.tensor([1, 2], device=CUDA), 0, 1),
    (lambda x: x[[0, 2]], 0, 1), (lambda x: x.to(torch.float16) + 1, 0, 0), (lambda x: x[:2].clone(), 0, 0),
    (lambda x: torch.arange(3, device=CUDA) + x, 0, 0)])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_what_the_host_waits_for_is_counted(what, reads, uploads, mode, traffic):
    x = torch.zeros(3, device=CUDA)
    with mode():
        what(x)
    assert (traffic.reads.total(), traffic.uploads.total()) == (reads, uploads)


# ------------------------------------------------------------------------------------- the forward


@pytest.mark.parametrize("family, dtype", [*(("gpt_bigcode", dtype) for dtype in DTYPES), ("llama", torch.bfloat16)],
                         ids=str)
def test_a_forward_of_every_kind_by_eq_6_reads_nothing(family, dtype, traffic):
    """With the adapters as they are trained, and stacked for serving."""
    model = model_on_cuda(CONFIGS[family], dtype, MIXED[family] + EXTRA_KINDS[family])
    flora.set_path(model, "expand")
    check_forwards(model, traffic)
    traffic.clear()
    flora.freeze_bank(model)
    assert not traffic.reads
    check_forwards(model, traffic)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_and_both_forms_of_attention_read_nothing(family, flash, traffic):
    model = model_on_cuda(CONFIGS[family], torch.float16)
    model.set_attention(flash)
    check_forwards(model, traffic)


@pytest.mark.parametrize("family", FAMILIES)
def test_eq_4_reads_which_adapters_there_are_and_each_ones_tokens(family, traffic):
    """Of two: the ids once, and the places of each one's inputs and outputs."""
    model = served_on_cuda(family)
    flora.set_path(model, "materialise")
    check_forwards(model, traffic, {"flora.py materialised": scaled_layers(model) * (1 + 2 * 2)})


def test_a_path_is_chosen_without_a_read_but_for_long_prompts(traffic):
    """16 x 48 tokens at rank 4: choose_path counts the adapters, and of two it takes Eq. 4."""
    model = model_on_cuda(CONFIGS["gpt_bigcode"], kinds=[("flora", 4, None)] * 2)
    flora.freeze_bank(model)
    check_forwards(model, traffic)
    traffic.clear()
    model(ids_for(model, 16, 48), adapters_for(model, 16))
    layers = scaled_layers(model)
    assert traffic.reads == {"flora.py choose_path": layers, "flora.py materialised": layers * (1 + 2 * 2)}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_int8_base_reads_nothing(family, traffic):
    """FFBA runs unfused on it."""
    model = model_on_cuda(CONFIGS[family], torch.bfloat16)
    model.fingerprints = FAKE
    traffic.clear()
    int8.quantize_int8(model)
    assert not traffic.reads
    for adapter in MIXED[family] + EXTRA_KINDS[family]:
        flora.add_adapter(model, *adapter)
    flora.freeze_bank(model)
    flora.set_path(model, "expand")
    check_forwards(model, traffic)


@pytest.mark.parametrize("activation", ["identity", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ffba_fused_reads_nothing(family, activation, traffic):
    model = model_on_cuda(CONFIGS[family], torch.bfloat16)
    for rank in (3, 1):
        flora.add_adapter(model, "ffba", rank, activation=activation)
    flora.freeze_bank(model)
    assert all(layer.frozen_bank.fused for _, layer in flora.adapter_layers(model) if layer.adapters)
    check_forwards(model, traffic)


def test_blends_read_nothing(traffic):
    if not importlib.util.find_spec("extras.blend"):
        pytest.skip("needs extras/blend.py")
    from extras.blend import blend
    model = model_on_cuda(CONFIGS["gpt_bigcode"], kinds=MIXED["gpt_bigcode"])
    blend(model, {1: 0.7, 3: 0.3})
    blend(model, {2: 1.5, 4: -0.5})
    flora.freeze_bank(model)
    traffic.clear()
    with torch.inference_mode():
        model(ids_for(model, 10, 7), adapters_for(model, 10))
    assert not traffic.reads and not traffic.uploads


def test_whisper_reads_one_value_a_token_and_the_tokens_at_the_end(traffic):
    """The value: whether all rows have ended."""
    kinds = [("flora", 1, None), ("lora", 2, None), ("ia3", 1, None), ("hira", 2, None)]
    model = model_on_cuda(WHISPER, torch.float16, kinds)
    flora.freeze_bank(model)
    writing = SimpleNamespace(never=[7], not_first=[8, 9], end=TOKEN + 1)
    mel, prompts = torch.zeros(5, 8, 20, device=CUDA), torch.zeros(5, 4, dtype=torch.int64, device=CUDA)
    traffic.clear()
    model.listen(mel, adapters_for(model, 5))
    assert not traffic.reads and not traffic.uploads
    never = torch.Tensor.all   # the answer to a read is True, and would end it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "all", lambda x: never(x).to(torch.int64) - TOKEN)
        write_greedily(model, writing, mel, prompts, adapters_for(model, 5), max_new_tokens=3)
    assert traffic.reads == {"whisper_model.py write_greedily": 1 + 1}
    assert set(traffic.uploads) == {"whisper_model.py write_greedily"}


# ------------------------------------------------------------------------------------- the engines


def serve(engine, traffic):
    """Submit requests of several lengths and adapters, half of them sampled -> (reads, uploads) of each step."""
    for i in range(7):
        sampled = dict(temperature=0.7, top_k=5, top_p=0.9, seed=i) if i % 2 else {}
        engine.submit([1, 2, 3 + i] * (1 + i % 3), adapter_id=i, max_new_tokens=3 + i, **sampled)
    steps = []
    while engine.busy and len(steps) < 100:
        traffic.clear()
        engine.step()
        steps.append((Counter(traffic.reads), Counter(traffic.uploads)))
    assert not engine.busy
    return steps


def check_steps(steps, reads, prefills):
    """At most one read in a step, where tokens are read, `reads` in all; 7 uploads in each of `prefills`: the
    prompts and 6 columns of the engine's table."""
    all_reads, all_uploads = (sum(counts, Counter()) for counts in zip(*steps))
    assert all_reads == {"generate.py sync": reads} and all_uploads == {"generate.py prefill": 7 * prefills}
    assert max(read.total() for read, _ in steps) == 1


ENGINES = pytest.mark.parametrize("family, dtype, sync_every, reads", [   # every dtype, family and way to read
    ("gpt_bigcode", torch.float32, 1, 14), ("gpt_bigcode", torch.bfloat16, 2, 9),
    ("gpt_bigcode", torch.float16, None, 7), ("llama", torch.bfloat16, None, 7)], ids=str)


@ENGINES
def test_the_engine_reads_tokens_and_nothing_else(family, dtype, sync_every, reads, traffic):
    """14 steps. None: the default of CUDA, 8, more than there are between the ends of two requests."""
    engine = Engine(served_on_cuda(family, dtype), slots=4, sync_every=sync_every)
    steps = serve(engine, traffic)
    assert len(steps) == 14
    check_steps(steps, reads, prefills=4)


@ENGINES
def test_the_graph_engine_captures_steps_that_neither_read_nor_upload(
        family, dtype, sync_every, reads, traffic, captured):
    engine = new_engine(served_on_cuda(family, dtype), 4, sync_every=sync_every)
    assert type(engine) is GraphEngine
    check_steps(serve(engine, traffic), reads, prefills=4)
    assert captured == [{}] and len(engine.graphs) == 1   # one cache length: the context of this model


def test_a_graph_is_captured_for_each_256_tokens(traffic, captured):
    engine = new_engine(model_on_cuda(replace(CONFIGS["gpt_bigcode"], n_positions=600)), 2)
    engine.submit([1] * (BLOCK - 2), max_new_tokens=5)
    engine.run()
    assert captured == [{}, {}] and list(engine.graphs) == [BLOCK, 2 * BLOCK]


def test_a_graph_is_captured_on_the_gpu_of_the_model(traffic, captured):
    """Streams are made on the current one, which may be another."""
    with torch.device("cuda:1"):
        engine = new_engine(model_from_config(CONFIGS["gpt_bigcode"]), 2)
    engine.submit([1, 2], max_new_tokens=3)
    engine.run()
    assert captured == [{}] and captured.devices == [torch.device("cuda:1")]


@pytest.mark.parametrize("make", [Engine, new_engine], ids=["Engine", "GraphEngine"])
def test_a_cancelled_request_costs_no_read(make, traffic, captured):
    engine = make(served_on_cuda(), 4, sync_every=4)
    requests = [engine.submit([1, 2, 3], adapter_id=i, max_new_tokens=8) for i in range(6)]
    engine.step()
    traffic.clear()
    engine.cancel(requests[1])
    engine.cancel(requests[5])
    assert not traffic.reads and not traffic.uploads
    steps = []
    while engine.busy:
        traffic.clear()
        engine.step()
        steps.append(Counter(traffic.reads))
    assert all(read in ({}, {"generate.py sync": 1}) for read in steps)
    assert [r.state for r in requests] == ["done", "cancelled", "done", "done", "done", "cancelled"]


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory):
    """A FLoRA of rank 2 of a model whose fingerprints are FAKE."""
    model, file = model_from_config(CONFIGS["gpt_bigcode"]), tmp_path_factory.mktemp("adapter") / "a.safetensors"
    model.fingerprints = FAKE
    flora.save_adapter(model, flora.add_adapter(model, "flora", 2), file)
    return file


@pytest.mark.parametrize("make", [Engine, new_engine], ids=["Engine", "GraphEngine"])
def test_adapters_come_and_go_between_steps_without_a_read(make, adapter_file, set_guard, monkeypatch, request):
    tensors, metadata = adapter_files.load_tensors(adapter_file)
    traffic, captured = map(request.getfixturevalue, ("traffic", "captured"))   # all is fake from here

    def load_tensors(file):
        return {name: torch.empty(tensor.shape) for name, tensor in tensors.items()}, metadata

    monkeypatch.setattr(adapter_files, "load_tensors", load_tensors)
    model = served_on_cuda()
    model.fingerprints = FAKE
    engine = make(model, 4, sync_every=4)
    long = engine.submit([1, 2, 3], adapter_id=3, max_new_tokens=8)
    engine.step()
    traffic.clear()
    hot_swap.remove_adapter(engine, 2)
    assert not traffic.reads and not traffic.uploads
    assert hot_swap.load_adapter(engine, adapter_file) == 2
    assert not traffic.reads and set(traffic.uploads) == {"adapter_files.py fill"}
    other = engine.submit([4, 5], adapter_id=2, max_new_tokens=5)
    engine.run()
    assert long.state == other.state == "done"
    assert make is Engine or captured == [{}]   # the one graph is kept


# ------------------------------------------------------------------- loading, merging, training


def test_a_folder_is_loaded_onto_the_gpu_with_two_reads_a_tensor(traffic, monkeypatch):
    """They say that its smallest and its largest value are finite in the model's dtype."""
    config = CONFIGS["gpt_bigcode"]
    stored = {name: torch.empty(p.shape) for name, p in model_from_config(config).base_parameters().items()}
    monkeypatch.setattr(folders, "stored_tensors", lambda folder: [("a file", *item) for item in stored.items()])
    monkeypatch.setattr(folders, "sample", lambda tensor: (b"", b""))
    traffic.clear()
    model = folders.load("a folder", config, model_from_config, CUDA, torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert traffic.reads == {"files.py check_weights": 2 * len(stored)}
    assert traffic.uploads == {"folders.py load": len(stored)}


@pytest.mark.parametrize("kind", [*flora.KINDS, "hira"])
def test_merging_reads_nothing(kind, traffic):
    model = model_on_cuda(CONFIGS["gpt_bigcode"], torch.bfloat16, [(kind, 2, ["all"])])
    traffic.clear()
    flora.merge_adapter(model, 1)
    assert not traffic.reads and not traffic.uploads


@pytest.fixture
def autocast_on_cuda(monkeypatch):
    """torch.autocast("cuda") switches itself off where there is no GPU."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


def loop(**more):
    return SimpleNamespace(**dict(grad_accum=2, dtype="bfloat16", clip=1.0) | more)


@pytest.mark.parametrize("family, quantize", [("gpt_bigcode", False), ("llama", True)])
@pytest.mark.parametrize("kind", [*flora.KINDS, "hira", "ffba"])
def test_a_training_step_reads_the_loss_and_whether_to_stop(
        kind, family, quantize, traffic, autocast_on_cuda, monkeypatch):
    """All of a step but the backward pass, which fake CUDA does not have: two micro-batches in bfloat16."""
    model = model_on_cuda(CONFIGS[family])
    model.fingerprints = FAKE
    if quantize:
        int8.quantize_int8(model)
    model.gradient_checkpointing = family == "llama"
    adapter_id = flora.add_adapter(model, kind, 2, ["all"] if kind != "ffba" else None)
    parameters = flora.adapter_parameters(model, adapter_id)
    asked, losses = torch.zeros(1), []

    def loss(model, x, y):
        losses.append(train.loss_of(model, x, y, train.row_ids(adapter_id, len(x), CUDA)))
        return losses[-1]

    def next_batch(step, micro):
        return torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)

    traffic.clear()
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    total = train.backward(model, next_batch, loss, 0, loop())
    assert total.device.type == "cuda" and losses[0].requires_grad and losses[0].dtype == torch.float32
    # choose_path counts no adapters of so few tokens
    assert not traffic.reads and traffic.uploads["train.py backward"] == 2 * 2
    processes.over_processes(total, asked)
    assert traffic.reads.total() == 1 and set(traffic.reads) == {"processes.py over_processes"}
    for p in parameters.values():
        p.grad = torch.empty_like(p)
    traffic.clear()
    train.update(train.adamw(parameters.values()), parameters, 1e-3, 1.0)
    assert not traffic.reads and not traffic.uploads


def test_a_held_out_loss_reads_once_for_each_8_rows(traffic, autocast_on_cuda):
    model = model_on_cuda(CONFIGS["gpt_bigcode"], kinds=[("flora", 2, None)])
    data = SimpleNamespace(x=torch.zeros(20, 9, dtype=torch.int64), y=torch.zeros(20, 9, dtype=torch.int64),
                           heldout_tokens=100)
    traffic.clear()
    train.heldout_loss(model, data, 1, "bfloat16")
    assert traffic.reads == {"train.py heldout_loss": 3}


def test_the_losses_of_whisper_and_of_many_adapters(traffic, autocast_on_cuda, monkeypatch):
    model = model_on_cuda(WHISPER, kinds=[("flora", 1, None)])
    ids = torch.zeros(2, 6, dtype=torch.int64, device=CUDA)
    traffic.clear()
    with train.autocast(CUDA, "bfloat16"):
        loss = whisper.loss_of(1, model, torch.zeros(2, 8, 20, device=CUDA), ids, ids)
    assert loss.requires_grad and not traffic.reads
    model = model_on_cuda(CONFIGS["gpt_bigcode"], kinds=[("flora", 1, None), ("lora", 1, None)])
    monkeypatch.setattr(train_many, "backward", lambda tensor, gradient=None: None)
    batches = [(model, ids, ids, torch.full((2,), i, device=CUDA)) for i in (1, 2)]
    traffic.clear()
    assert [loss.device.type for loss in train_many.one_pass(batches, 1)] == ["cuda"] * 2
    assert not traffic.reads and not traffic.uploads


def test_the_peak_of_memory_and_the_end_of_work_are_those_of_the_device_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {torch.device("cuda:1"): 7}.__getitem__)
    monkeypatch.setattr(torch.cuda, "synchronize", {torch.device("cuda:1"): None}.__getitem__)
    assert provenance.peak_memory(torch.device("cuda:1")) == 7
    timing.synchronize(torch.device("cuda:1"))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_model_that_was_packed_for_a_cpu_runs_on_the_gpu(traffic):
    model = model_from_config(CONFIGS["gpt_bigcode"]).requires_grad_(False)
    model.pack()
    assert model.times_output is not F.linear
    check_forwards(model.to(CUDA), traffic)


def test_what_gpu_py_measures_runs_on_cuda(traffic, captured, autocast_on_cuda, monkeypatch):
    """Its own parts, but for the tokens, which need values."""
    args = SimpleNamespace(device="cuda", rehearse=False)
    monkeypatch.setattr(gpu_parts.importlib.util, "find_spec", lambda name: None)   # PEFT is not ours
    monkeypatch.setattr(gpu_parts, "BLOCK", 1)
    monkeypatch.setattr(gpu_parts, "preset", lambda name: replace(CONFIGS["gpt_bigcode"], n_positions=1024))
    monkeypatch.setattr(gpu_parts, "quantize_int8", lambda model: None)   # it reads values for the fingerprint
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3e9)
    assert set(gpu_parts.graphs(args)["milliseconds"]) == {"base", "flora r1"}
    assert captured == [{}, {}]
    assert {"flora", "lora", "ia3"} <= set(gpu_parts.training(args)["tokens_per_second"])
    assert gpu_parts.memory(args)["training_gb"] == 3.0


def test_what_is_for_a_cpu_alone_is_refused(traffic):
    model = model_on_cuda(CONFIGS["gpt_bigcode"])
    with pytest.raises(BadInput, match="--fast is for one process on a CPU"):
        fast.speed_up(model, SimpleNamespace(compile=False))
    with pytest.raises(BadInput, match="int8-dynamic needs an x86 CPU"):
        int8.quantize_int8(model, dynamic=True)
    model.pack()
    assert model.times_output is F.linear
