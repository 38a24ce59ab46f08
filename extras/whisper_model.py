"""Whisper (§4.3): speech in, text out; loaded from and written to Hugging Face folders.

An encoder hears log-mel features of a window of at most 30 s; a decoder writes tokens, and in each
layer looks at the encoder's output by cross-attention. All projections of both halves are
`flora.AdapterLinear`, so each row of a batch may be a clip of another language with its own
adapter. extras/whisper.py has the commands.

Reading order: (1) the model, (2) from a file of sound to features, (3) from features to text.

Shapes: B batch, T tokens, F frames of 10 ms, S = F / 2 positions of the encoder, C = n_embd,
H heads, D = C / H.
"""
import math
import os
import re
import wave
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from flora import AdapterLinear, gather
from model import GPT, GPTConfig, read_config
from plumbing.files import BadInput, existing_file, read_json
from plumbing.folders import StarCoderFolder
from plumbing.outputs import write_json
from plumbing.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------ 1 the model


@dataclass
class WhisperConfig(GPTConfig):
    """Sizes: the decoder's by the names of GPTConfig, then the encoder's. Defaults: large-v2's."""
    vocab_size: int = 51865
    n_positions: int = 448               # of a text, in tokens
    n_embd: int = 1280
    n_layer: int = 32
    n_head: int = 20
    n_inner: int = 5120
    bos_token_id: int = 50257
    eos_token_id: int | list = 50257
    activation_function: str = "gelu"
    encoder_layers: int = 32
    encoder_heads: int = 20
    encoder_inner: int = 5120
    n_mels: int = 80
    n_heard: int = 1500                  # positions of the encoder, 20 ms each: 30 s
    decoder_start_token_id: int = 50258
    pad_token_id: int = 50257
    model_type: ClassVar[str] = "whisper"

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % self.encoder_heads:
            raise BadInput(f"d_model {self.n_embd} is not a multiple of encoder_attention_heads "
                           f"{self.encoder_heads}")


def sizes(n_embd, n_layer, n_head):
    """The config of a published size, whose halves are alike."""
    return WhisperConfig(n_embd=n_embd, n_layer=n_layer, n_head=n_head, n_inner=4 * n_embd,
                         encoder_layers=n_layer, encoder_heads=n_head, encoder_inner=4 * n_embd)


PRESETS = {
    "whisper-tiny": sizes(384, 4, 6),
    "whisper-base": sizes(512, 6, 8),
    "whisper-small": sizes(768, 12, 12),
    "whisper-medium": sizes(1024, 24, 16),
    "whisper-large-v2": WhisperConfig(),
    "whisper-large-v3": WhisperConfig(vocab_size=51866, n_mels=128),
}


def attend_plainly(q, k, v, is_causal=False):
    """F.scaled_dot_product_attention by plain matmuls: twice as fast to train with on a CPU in
    bfloat16."""
    scores = (q * q.shape[-1]**-0.5) @ k.mT                                   # [B, H, T, S]
    if is_causal:
        scores = scores + torch.full_like(scores[0, 0], float("-inf")).triu(1)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head attention, to the same sequence (self_attn) or to another one (encoder_attn)."""
    attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = AdapterLinear(C, C)
        self.k_proj = AdapterLinear(C, C, bias=False)
        self.v_proj = AdapterLinear(C, C)
        self.out_proj = AdapterLinear(C, C)

    def split(self, x):
        """x [B, T, C] -> its heads [B, H, T, D]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_and_values(self, x, adapters):
        """x [B, S, C] -> [2, B, H, S, D]."""
        k, v = self.k_proj(x, adapters), self.v_proj(x, adapters)
        return torch.stack([self.split(k), self.split(v)])

    def forward(self, x, adapters, kv, causal=False):
        """x [B, T, C] looks at kv [2, B, H, S, D], all of it or, causal, what came before."""
        q, (k, v) = self.split(self.q_proj(x, adapters)), kv
        y = self.attend(q, k, v, is_causal=causal)                            # [B, H, T, D]
        return self.out_proj(y.transpose(1, 2).flatten(2), adapters)


class EncoderBlock(nn.Module):
    def __init__(self, C, heads, inner):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(C)
        self.self_attn = Attention(C, heads)
        self.final_layer_norm = nn.LayerNorm(C)
        self.fc1 = AdapterLinear(C, inner)
        self.fc2 = AdapterLinear(inner, C)

    def mlp(self, x, adapters):
        return self.fc2(F.gelu(self.fc1(self.final_layer_norm(x), adapters)), adapters)

    def forward(self, x, adapters):
        y = self.self_attn_layer_norm(x)
        x = x + self.self_attn(y, adapters, self.self_attn.keys_and_values(y, adapters))
        return x + self.mlp(x, adapters)


class DecoderBlock(EncoderBlock):
    def __init__(self, C, heads, inner):
        super().__init__(C, heads, inner)
        self.encoder_attn_layer_norm = nn.LayerNorm(C)
        self.encoder_attn = Attention(C, heads)

    def forward(self, x, adapters, heard, kv_cache, start):
        """heard [2, B, H, S, D]: this layer's keys and values of the encoder's output.
        kv_cache [2, B, H, length, D] or None takes those of the tokens, from position `start`."""
        y = self.self_attn_layer_norm(x)
        kv, end = self.self_attn.keys_and_values(y, adapters), start + x.shape[1]
        if kv_cache is not None:
            kv_cache[:, :, :, start:end] = kv
            kv = kv_cache[:, :, :, :end]
        x = x + self.self_attn(y, adapters, kv, causal=start == 0)
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), adapters, heard)
        return x + self.mlp(x, adapters)


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv1d(c.n_mels, c.n_embd, 3, padding=1)
        self.conv2 = nn.Conv1d(c.n_embd, c.n_embd, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(c.n_heard, c.n_embd)   # sines, which folders hold
        self.layers = nn.ModuleList(EncoderBlock(c.n_embd, c.encoder_heads, c.encoder_inner)
                                    for _ in range(c.encoder_layers))
        self.layer_norm = nn.LayerNorm(c.n_embd)

    def forward(self, mel, adapters):
        """mel [B, n_mels, F] -> [B, S, C]. A window shorter than 30 s takes the first positions."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).mT                    # [B, S, C]
        x = x + self.embed_positions.weight[:x.shape[1]]
        for block in self.layers:
            x = block(x, adapters)
        return self.layer_norm(x)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.embed_positions = nn.Embedding(c.n_positions, c.n_embd)
        self.layers = nn.ModuleList(DecoderBlock(c.n_embd, c.n_head, c.n_inner)
                                    for _ in range(c.n_layer))
        self.layer_norm = nn.LayerNorm(c.n_embd)


class WhisperFolder(StarCoderFolder):
    """How a folder holds a Whisper."""
    ARCHITECTURE = dict(architectures=["WhisperForConditionalGeneration"], dropout=0.0,
                        attention_dropout=0.0, activation_dropout=0.0)
    KEYS = dict(n_positions="max_target_positions", n_embd="d_model", n_layer="decoder_layers",
                n_head="decoder_attention_heads", n_inner="decoder_ffn_dim",
                encoder_heads="encoder_attention_heads", encoder_inner="encoder_ffn_dim",
                n_mels="num_mel_bins", n_heard="max_source_positions",
                initializer_range="init_std")
    SUPPORTED = {"activation_function": ["gelu"], "scale_embedding": [False],
                 "tie_word_embeddings": [True], "layer_norm_epsilon": [1e-5]}
    SIZES = (*StarCoderFolder.SIZES, "encoder_layers", "encoder_heads", "encoder_inner", "n_mels", "n_heard")
    TIED = "proj_out.weight"


class Whisper(GPT):
    """Whisper, by Hugging Face's names (`model.decoder.layers.0.encoder_attn.q_proj.weight`)."""

    # Self-attention, cross-attention and MLP of both halves: every fully connected layer (App. A)
    TARGETS = {name: name for name in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")}
    DEFAULT_TARGETS = {"flora": tuple(TARGETS)}
    SCALES_INPUT = {"fc2"}

    RESIDUAL = ()
    FOLDER = WhisperFolder
    CONFIG = WhisperConfig

    def build(self, config):
        self.model = nn.ModuleDict(dict(encoder=Encoder(config), decoder=Decoder(config)))

    @property
    def wte(self):
        return self.model.decoder.embed_tokens

    @property
    def output(self):
        return self.wte

    @property
    def blocks(self):
        return self.model.decoder.layers

    def columns(self, target):
        return None

    def listen(self, mel, adapter_ids=None):
        """mel float [B, n_mels, F] -> what the decoder hears: of each layer its keys and values of
        the encoder's output, [2, B, H, S, D]. adapter_ids as in `forward`."""
        c, most = self.config, 2 * self.config.n_heard
        if mel.shape[1] != c.n_mels or mel.shape[2] % 2 or not 0 < mel.shape[2] <= most:
            raise BadInput(f"features have shape {list(mel.shape)}; this model hears "
                           f"[clips, {c.n_mels}, an even number of frames up to {most}]")
        adapters = gather(self, adapter_ids)
        x = self.model.encoder(mel.to(self.wte.weight.dtype), adapters)
        return [block.encoder_attn.keys_and_values(x, adapters) for block in self.blocks]

    def hidden(self, ids, adapter_ids=None, kv_cache=None, start=0, heard=None):
        """All of the decoder but the output embedding: ids int64 [B, T] at the positions from
        `start` -> [B, T, C]. heard: from `listen`. kv_cache: from `new_kv_cache`, written in place;
        if start > 0, T is 1 and the tokens before stand in it."""
        if heard is None:
            raise BadInput("a Whisper model writes what it hears and nothing else; use "
                           "python -m extras.whisper train or transcribe")
        decoder, end = self.model.decoder, start + ids.shape[1]
        if end > self.config.n_positions:
            raise BadInput(f"{end} tokens are more than the {self.config.n_positions} of this "
                           "model (max_target_positions); shorten the text")
        adapters = gather(self, adapter_ids)
        x = decoder.embed_tokens(ids) + decoder.embed_positions.weight[start:end]
        for i, block in enumerate(decoder.layers):
            x = block(x, adapters, heard[i], None if kv_cache is None else kv_cache[i], start)
        return decoder.layer_norm(x)

    def forward(self, ids, adapter_ids=None, mel=None):
        """ids int64 [B, T], mel [B, n_mels, F] -> logits [B, T, vocab_size].

        adapter_ids: int64 [B], 0 for the base model; or flora.gather's; None is the base for all.
        """
        adapter_ids = gather(self, adapter_ids)
        heard = None if mel is None else self.listen(mel, adapter_ids)
        return self.logits(self.hidden(ids, adapter_ids, heard=heard))

    def new_kv_cache(self, batch, length):
        """An empty cache of the decoder's own tokens, [n_layer, 2, B, H, length, D]."""
        c, weight = self.config, self.wte.weight
        return weight.new_zeros(c.n_layer, 2, batch, c.n_head, length, c.head_dim)

    def save_pretrained(self, folder, dtype=None):
        """As GPT's, with the preprocessor_config.json that transformers wants beside it."""
        super().save_pretrained(folder, dtype)
        write_json(os.path.join(folder, "preprocessor_config.json"), dict(
            feature_extractor_type="WhisperFeatureExtractor", feature_size=self.config.n_mels,
            sampling_rate=RATE, n_fft=N_FFT, hop_length=HOP, chunk_length=window_of(self.config),
            padding_side="right", padding_value=0.0, return_attention_mask=False))


def load_whisper(folder, device="cpu", dtype=torch.float32):
    """A folder -> (its Whisper, its Writing); BadInput where it is another family's."""
    config = read_config(folder)
    if config.model_type != "whisper":
        raise BadInput(f"{folder} holds a {config.model_type}, not a Whisper; name a Whisper "
                       "folder with --weights (python -m extras.whisper_data weights makes one)")
    return GPT.from_pretrained(folder, device, dtype), Writing(folder)


# ---------------------------------------------------------------------- 2 from a file to features

RATE, N_FFT, HOP = 16000, 400, 160   # samples a second; a spectrum's and a frame's samples
REQUIREMENTS = "pip install -r extras/requirements.txt"


def window_of(config):
    """The longest window that a model hears, in whole seconds: 30."""
    return config.n_heard * 2 * HOP // RATE


def read_audio(file):
    """A file of one channel -> float32 [n] at 16 kHz: WAV of 16 bits by the standard library, all
    else (flac, ogg, mp3, ...) by soundfile."""
    existing_file(file, "audio file")
    samples, rate = read_wav(file) or read_sound(file)
    return check_audio(samples, rate, file)


def read_wav(file):
    """-> (float32 [n, channels], samples a second), or None unless it is WAV of 16 bits."""
    try:
        with wave.open(str(file)) as f:
            if f.getsampwidth() != 2:
                return None
            data, channels, rate = f.readframes(f.getnframes()), f.getnchannels(), f.getframerate()
    except (wave.Error, EOFError, OSError):
        return None
    data = np.frombuffer(data[:len(data) // (2 * channels) * 2 * channels], "<i2")
    return data.reshape(-1, channels).astype(np.float32) / 2**15, rate


def read_sound(file, name=None):
    """The same of any file, or file object called `name`, that soundfile reads."""
    try:
        import soundfile
    except ImportError:
        raise BadInput(f"{name or file}: only WAV of 16 bits is read without soundfile; for other "
                       f"audio: {REQUIREMENTS}") from None
    try:
        return soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, TypeError) as e:
        reason = str(e).splitlines()[0]
        raise BadInput(f"{name or file}: not readable as audio ({reason})") from None


def check_audio(samples, rate, file):
    """samples float32 [n, channels], `rate` of them a second -> float32 tensor [n] at 16 kHz.

    BadInput for no samples, several channels, less than 16 kHz and values that are not finite."""
    if samples.shape[1] != 1:
        raise BadInput(f"{file}: has {samples.shape[1]} channels, but Whisper hears one; mix it "
                       f"down (ffmpeg -i {file} -ac 1 one.wav)")
    if rate < RATE:
        raise BadInput(f"{file}: has {rate:,} samples a second, but Whisper needs at least "
                       f"{RATE:,}; what is missing cannot be made up, so record it again")
    if not len(samples):
        raise BadInput(f"{file}: holds no sound; it is empty")
    if not np.isfinite(samples).all():
        raise BadInput(f"{file}: holds samples that are not finite; it is damaged")
    return torch.from_numpy(resample(samples[:, 0], rate))


def resample(samples, rate):
    """float32 [n] at `rate` >= 16 kHz -> at 16 kHz, by leaving out all frequencies above 8 kHz."""
    if rate == RATE:
        return np.ascontiguousarray(samples)
    shared = math.gcd(rate, RATE)
    periods = -(-len(samples) // (rate // shared))                   # the end is filled with zeros
    n_in, n_out = periods * (rate // shared), periods * (RATE // shared)
    spectrum = np.fft.rfft(samples.astype(np.float64), n_in)[:n_out // 2 + 1]
    resampled = np.fft.irfft(spectrum, n_out) * (n_out / n_in)
    return resampled[:math.ceil(len(samples) * RATE / rate)].astype(np.float32)


def mel_filters(n_mels):
    """Slaney's triangles -> float32 [n_mels, N_FFT / 2 + 1]: on a scale that is linear up to 1 kHz
    (15 mel) and logarithmic above, each of area 1."""
    step = math.log(6.4) / 27
    mels = np.linspace(0, 15 + math.log(RATE / 2 / 1000) / step, n_mels + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))   # Hz
    slopes = edges[:, None] - np.linspace(0, RATE / 2, N_FFT // 2 + 1)       # [n_mels + 2, bins]
    widths = np.diff(edges)[:, None]
    triangles = np.minimum(-slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]).clip(0)
    return torch.from_numpy(triangles * 2 / (edges[2:] - edges[:-2])[:, None]).float()


def log_mel(samples, n_mels, seconds, name="the clip"):
    """samples float32 [n] at 16 kHz, filled with zeros to a window of `seconds` -> float32
    [n_mels, F], as OpenAI's Whisper computes it. BadInput, naming it, for a longer clip."""
    room = round(seconds * RATE) - len(samples)
    if room < 0:
        raise BadInput(f"{name}: is {len(samples) / RATE:.1f} s long, more than the window of "
                       f"{seconds:g} s; cut it, or take a larger --window (up to 30)")
    samples = F.pad(samples, (0, room))
    spectrum = torch.stft(samples, N_FFT, HOP, window=torch.hann_window(N_FFT), return_complex=True)
    power = (spectrum[:, :-1].abs()**2).contiguous()                          # [bins, F]
    mel = (mel_filters(n_mels) @ power).clamp(min=1e-10).log10()
    return (torch.maximum(mel, mel.max() - 8) + 4) / 4


# ---------------------------------------------------------------------- 3 from features to text

RULES = {"is_multilingual?": bool, "suppress_tokens?": [int], "begin_suppress_tokens?": [int]}


class Writing:
    """How the model of a folder writes: its tokenizer, the tokens that name a language, and those
    that generation_config.json forbids (`never`, and `not_first` as the first of a text)."""

    def __init__(self, folder):
        self.folder, self.tokenizer = folder, Tokenizer(folder)
        file = os.path.join(folder, "generation_config.json")
        rules = read_json(file, RULES) if os.path.exists(file) else {}
        if rules.get("is_multilingual") is False:
            raise BadInput(f"{folder}: is a model of English alone; use a multilingual one")
        self.never = rules.get("suppress_tokens") or []
        self.not_first = rules.get("begin_suppress_tokens") or []
        for i in (*self.never, *self.not_first):
            if not 0 <= i < (self.tokenizer.limit or i + 1):
                raise BadInput(f"{file}: suppresses token {i}, which the model does not have")
        self.end = self.tokenizer.eos_id
        self.start, self.transcribe, self.no_times = map(
            self.token, ("startoftranscript", "transcribe", "notimestamps"))

    def token(self, name):
        """The id of <|name|>."""
        i = self.tokenizer.token_id(f"<|{name}|>")
        if i is None or self.tokenizer.limit is not None and i >= self.tokenizer.limit:
            raise BadInput(f"{self.folder}: has no token <|{name}|>")
        return i

    def prompt(self, language):
        """What stands before a text in a language, "cs" -> 4 token ids."""
        try:
            if not re.fullmatch("[a-z]{2,3}", language):
                raise BadInput("not a code")
            return [self.start, self.token(language), self.transcribe, self.no_times]
        except BadInput:
            raise BadInput(f"--language {language}: {self.folder} has no token <|{language}|> for "
                           "it; use the code of a language that the model knows, as cs") from None

    def encode(self, text):
        return self.tokenizer.encode(" " + text) + [self.end]

    def decode(self, ids):
        """Token ids -> text, tokens that are no text left out."""
        return self.tokenizer.decode([i for i in ids if i < self.end]).strip()


@torch.no_grad()
def write_greedily(model, writing, mel, prompts, adapter_ids=None, max_new_tokens=224):
    """mel [B, n_mels, F], prompts int64 [B, P] (each row its own language), adapter_ids int64 [B]
    -> the token ids that follow in each row, up to its end token, without it."""
    prompt = prompts.shape[1]
    most = min(prompt + max_new_tokens, model.config.n_positions)
    forbidden = torch.zeros(2, model.config.vocab_size, device=mel.device)    # as the first, later
    forbidden[:, writing.never] = float("-inf")
    forbidden[0, writing.not_first] = float("-inf")
    adapters = gather(model, adapter_ids)
    heard, cache = model.listen(mel, adapters), model.new_kv_cache(len(mel), most)
    ids, written, ended = prompts, [], torch.zeros(len(mel), dtype=torch.bool, device=mel.device)
    for end in range(prompt, most):
        x = model.hidden(ids, adapters, cache, end - ids.shape[1], heard)[:, -1]
        ids = (model.logits(x).float() + forbidden[int(end > prompt)]).argmax(-1, keepdim=True)
        written.append(ids)
        ended |= ids[:, 0] == writing.end
        if ended.all():
            break
    rows = torch.cat(written, dim=1).tolist()
    return [row[:row.index(writing.end)] if writing.end in row else row for row in rows]
