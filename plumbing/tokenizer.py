"""The tokenizer of a model folder: tokenizer.json by `tokenizers`, tokenizer.model by
`sentencepiece`."""
import os
import re
import shutil

from plumbing.files import BadInput, check_json, existing_file, existing_folder, is_json, read_json
from plumbing.folders import read_ends
from plumbing.outputs import open_output

FIM_TOKENS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")

EOS_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>")

# What makes up a tokenizer, and what goes with it into a merged folder. generation_config.json
# comes along because it says which tokens end a text.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                   "added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt",
                   "chat_template.jinja", "chat_template.json", "generation_config.json")


class Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, or tokenizer.model (the embedded model's,
    Llama 2's). decode(encode(text)) == text, but for the character ▁ (U+2581) in a tokenizer.json
    of Llama 2's kind, which takes it for a space.

    eos_ids: what ends a text: the eos_token_id, one or several, of generation_config.json, or of
    config.json, or the first of EOS_TOKENS that it has. One outside of the model's vocabulary
    is left out. eos_id: what stands between texts: the first of them, or of EOS_TOKENS, or 0.
    bos_id: what the family's own tokenizer puts before a text (<s> of Llama), or None.
    fim_ids: the ids of FIM_TOKENS, or None. byte_ids: the tokens that are one byte of a character.
    """

    def __init__(self, folder):
        self.folder = folder
        names = ("tokenizer.json", "tokenizer.model")
        files = [file for file in (os.path.join(existing_folder(folder), name) for name in names)
                 if os.path.exists(file)]
        if not files:
            raise BadInput(f"{folder}: holds neither tokenizer.json nor tokenizer.model")
        file = existing_file(files[0])
        try:
            self.backend = (JsonTokenizer if file.endswith(".json") else PieceTokenizer)(file)
        except BadInput:
            raise
        except Exception as e:  # tokenizers raises plain Exception
            raise BadInput(f"{file}: not a readable tokenizer ({e})") from e
        self.vocab_size, self.bos_id = self.backend.vocab_size, self.backend.bos_id
        self.token_id = self.backend.token_id   # (text of a token) -> its id, or None
        self.limit, self.eos_ids, self.eos_id = self.read_configs()
        byte_ids = (self.token_id(f"<0x{byte:02X}>") for byte in range(256))
        self.byte_ids = {i for i in byte_ids if i is not None}
        fim_ids = [self.token_id(token) for token in FIM_TOKENS]
        self.fim_ids = None if None in fim_ids else fim_ids

    def read_configs(self):
        """-> (how many token ids the folder's model has, or None; eos_ids; eos_id)."""
        names = ("generation_config.json", "config.json")
        files = [os.path.join(self.folder, name) for name in names]
        configs = [read_json(file) if os.path.exists(file) else {} for file in files]
        limit = configs[1].get("vocab_size")
        limit = limit if is_json(limit, int) else None
        named = [i for i in map(self.token_id, EOS_TOKENS)
                 if i is not None and (limit is None or i < limit)][:1]
        for values, file in zip(configs, files):
            if values.get("eos_token_id") not in (None, []):
                ends = read_ends(values, file, limit)
                return limit, ends, [*ends, *named, 0][0]
        if not named:
            raise BadInput(f"{self.folder}: its tokenizer has none of {', '.join(EOS_TOKENS)}, "
                           "and config.json no eos_token_id")
        return limit, named, named[0]

    def encode(self, text, bos=False):
        """text -> list of ids. No special token is added, but with bos=True the bos_id, if any.
        BadInput for text that is not Unicode, or has a token that the model does not have."""
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise BadInput(f"a text holds half of a surrogate pair ({ascii(text[:40])}), which is "
                           "not Unicode; write the character in full")
        ids = self.backend.encode(text)
        if self.limit is not None and ids and max(ids) >= self.limit:
            raise BadInput(f"a text has token id {max(ids)}, but the model of {self.folder} has "
                           f"ids 0 to {self.limit - 1}; encode it with this model's tokenizer")
        return ids if not bos or self.bos_id is None else [self.bos_id, *ids]

    def decode(self, ids, continues=False):
        """list of ids -> text; bytes that are not UTF-8 become U+FFFD. continues: the ids go on
        from a text (a prompt), so that a space at their start is part of the text."""
        if not continues:
            return self.backend.decode(list(ids))
        start = self.backend.encode("x")
        return self.backend.decode(start + list(ids))[len(self.backend.decode(start)):]

    def save(self, folder):
        """Copy the tokenizer, and which tokens end a text, into another model folder, in the place
        of any that is there."""
        if os.path.exists(folder) and os.path.samefile(self.folder, folder):
            return
        for name in TOKENIZER_FILES:
            source, target = (os.path.join(place, name) for place in (self.folder, folder))
            if os.path.isfile(source):
                with open(source, "rb") as read, open_output(target) as write:
                    shutil.copyfileobj(read, write)
            elif os.path.isfile(target):
                os.remove(target)


class JsonTokenizer:
    """tokenizer.json, by `tokenizers`."""

    def __init__(self, file):
        from tokenizers import Tokenizer as HFTokenizer
        self.hf = HFTokenizer.from_file(file)
        self.hf.no_truncation()   # a file may hold either, left there by a training script
        self.hf.no_padding()
        self.vocab_size = self.hf.get_vocab_size()
        marked, plain = self.hf.encode("a").ids, self.encode("a")
        self.bos_id = None if marked[:1] == plain[:1] else marked[0]

    def token_id(self, token):
        return self.hf.token_to_id(token)

    def encode(self, text):
        return self.hf.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.hf.decode(ids, skip_special_tokens=False)


class PieceTokenizer:
    """tokenizer.model, by `sentencepiece`, with the tokens that the files beside it add. The ids
    are those of transformers' AutoTokenizer, but for a space that follows an added token or begins
    a text: here it comes back."""

    def __init__(self, file):
        from sentencepiece import SentencePieceProcessor
        with open(file, "rb") as f:
            proto = f.read()
        self.whole = SentencePieceProcessor(model_proto=proto)   # Llama's puts a space before
        self.prefix = " " if self.whole.normalize("a").startswith("▁") else ""
        # One that does not, for what goes on from a text: a field after the protobuf's end,
        # normalizer_spec.add_dummy_prefix = 0, overrides
        self.sp = SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        folder = os.path.dirname(file)
        file = os.path.join(folder, "tokenizer_config.json")
        config = read_json(file) if os.path.exists(file) else {"legacy": True}
        self.every_part = config.get("legacy") is True   # gets the space, not the first alone
        found = self.control_pieces() | read_added_tokens(folder, config.get(DECODER), file)
        self.added = {text: i for text, (i, _) in found.items()}
        self.texts = {i: text for text, i in self.added.items()}
        patterns = [found[text][1] for text in sorted(found, key=len, reverse=True)]
        self.split = re.compile("|".join(patterns) or "(?!)")   # (?!): nowhere
        self.vocab_size = max([self.sp.vocab_size() - 1, *self.texts]) + 1
        self.bos_id = self.read_bos(config)

    def control_pieces(self):
        """{text: (id, pattern)} of <s>, </s> and <unk> of Llama's kind, which a prompt may hold.
        What looks so in code, of which the embedded model's are made, is code."""
        sp = self.sp
        own = [i for i in range(sp.vocab_size() if self.prefix else 0)
               if sp.is_control(i) or sp.is_unknown(i)]
        return {sp.id_to_piece(i): (i, pattern(sp.id_to_piece(i))) for i in own}

    def read_bos(self, config):
        """The bos_id: tokenizer_config.json's bos_token, or the model's own; None where either says
        that a text has none."""
        if self.sp.bos_id() < 0 or not config.get("add_bos_token", True):
            return None
        token = config.get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        named = self.token_id(token) if isinstance(token, str) else None
        return self.sp.bos_id() if named is None else named

    def token_id(self, token):
        if token in self.added:
            return self.added[token]
        i = self.sp.piece_to_id(token)
        return None if i == self.sp.unk_id() else i

    def encode(self, text):
        ids, start = [], 0
        for found in self.split.finditer(text):
            ids += self.encode_pieces(text[start:found.start()], start == 0)
            ids.append(self.added[found.group(found.lastindex)])
            start = found.end()
        return ids + self.encode_pieces(text[start:], start == 0)

    def encode_pieces(self, text, first):
        """The ids of a part between added tokens; first: of the one at the text's start."""
        if not text:
            return []
        sp, prefix = self.sp, ""
        if first or self.every_part:
            sp, prefix = self.whole, self.prefix
        # sentencepiece writes a space as ▁, so that a ▁ of the text must go in as its UTF-8 bytes
        low_line = [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        begin, *rest = text.split("▁")
        ids = sp.encode(begin) if begin else self.sp.encode(prefix)
        return ids + [i for part in rest for i in low_line + self.sp.encode(part)]

    def decode(self, ids):
        """Ids without a text, of padding in the embedding, are left out."""
        text, run = "", []
        for i in ids:
            if i in self.texts:
                text, run = text + self.decode_pieces(run, not text) + self.texts[i], []
            elif i < self.sp.vocab_size():
                run.append(i)
        return text + self.decode_pieces(run, not text)

    def decode_pieces(self, ids, first):
        text = self.sp.decode(ids)
        return text.removeprefix(self.prefix) if first or self.every_part else text


DECODER = "added_tokens_decoder"   # in tokenizer_config.json


def read_added_tokens(folder, decoder, config):
    """{text: (id, pattern)} of the tokens that a folder adds to its tokenizer.model's: those of
    added_tokens.json and those of the `decoder` in the file `config`."""
    file = os.path.join(folder, "added_tokens.json")
    ids = read_json(file) if os.path.exists(file) else {}
    check_json(list(ids.values()), [int], file, "an id")
    added = {text: (i, pattern(text)) for text, i in ids.items() if text}
    for i, token in (decoder if isinstance(decoder, dict) else {}).items():
        check_json(token, {"content": str, "lstrip?": bool, "rstrip?": bool}, config, DECODER)
        text = token["content"]
        if text and i.isdecimal() and len(i) < 10:
            i = ids.get(text, int(i))
            added[text] = i, pattern(text, token.get("lstrip"), token.get("rstrip"))
    return added


def pattern(text, lstrip=False, rstrip=False):
    """The regular expression that finds a token; lstrip, rstrip: with the white space there."""
    return (r"\s*" if lstrip else "") + f"({re.escape(text)})" + (r"\s*" if rstrip else "")
