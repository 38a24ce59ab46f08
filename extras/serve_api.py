"""What extras/serve.py speaks: OpenAI's requests checked, OpenAI's answers and errors made.

Nothing here knows HTTP but for the body that a request brings, nor the engine.
"""
import json
import os
import secrets
import time
from pathlib import Path

from extras.requests import parse_int
from plumbing.files import BadInput, check_json, read_json
from plumbing.prompts import certain_text, cut_at_stop, new_text

LARGEST_BODY = 1 << 22   # bytes of a request
MOST_CHOICES = 128       # texts that one request may ask for
FIELDS = {               # of a request, with their types; null is as if it were not there
    "model": str, "max_tokens?": int, "max_completion_tokens?": int, "temperature?": float, "top_p?": float,
    "top_k?": int, "seed?": int, "n?": int, "stream?": bool, "stream_options?": {"include_usage?": bool},
    "ignore_eos?": bool}
NEUTRAL = {              # fields that are not there, and the values with which they change nothing
    "presence_penalty": [0], "frequency_penalty": [0], "repetition_penalty": [1], "min_p": [0], "logit_bias": [{}],
    "suffix": [""], "best_of": [1], "echo": [False], "logprobs": [False], "top_logprobs": [0], "tools": [[]],
    "response_format": [{"type": "text"}]}
IGNORED = {"user", "metadata", "store"}


class Refused(Exception):
    """An answer with another status than 200."""

    def __init__(self, status, message, code=None, headers=None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def error_object(status, message, code=None):
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    return {"error": dict(message=message, type=kind, param=None, code=code)}


# ------------------------------------------------------------------------------- what a client asks


async def read_body(request):
    """The object that a POST brings; Refused if it is too large, BadInput if it is no JSON object."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise BadInput("send the header Content-Type: application/json")   # no web page of another site can
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise Refused(413, f"the request has more than {LARGEST_BODY} bytes")
    try:
        value = json.loads(body.decode(), parse_int=parse_int)
    except (ValueError, RecursionError) as e:
        raise BadInput(f"the request is not JSON ({e})") from None
    if not isinstance(value, dict):
        raise BadInput("the request must be a JSON object")
    return {key: field for key, field in value.items() if field is not None}


def check_fields(body, text):
    """BadInput for a field that is unknown, of another type, or asks for what is not there. text: the one that holds
    the prompt or messages, which is checked elsewhere."""
    check_json(body, FIELDS, "the request")
    known = {key.rstrip("?") for key in FIELDS} | IGNORED | {text, "stop"}
    for key, value in body.items():
        if key in NEUTRAL and not any(value == same and type(value) in (type(same), float) for same in NEUTRAL[key]):
            raise BadInput(f"{key} is not supported here; leave it out")
        if key not in known and key not in NEUTRAL:
            raise BadInput(f"unknown field {key[:40]!r}")
    stops = stops_of(body)
    if not (isinstance(stops, list) and len(stops) <= 16 and all(isinstance(s, str) and s for s in stops)):
        raise BadInput("stop must be a text or a list of up to 16 texts, none of them empty")


def stops_of(body):
    stops = body.get("stop", [])
    return [stops] if isinstance(stops, str) else stops


def prompts_of(body):
    """A completion's "prompt" as a list: of texts, or of lists of token ids."""
    prompt = body.get("prompt")
    is_ids = isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt)
    prompts = [prompt] if isinstance(prompt, str) or is_ids else prompt
    if isinstance(prompts, list) and prompts:
        if all(isinstance(p, str) for p in prompts):
            return prompts
        if all(isinstance(p, list) and all(type(i) is int for i in p) for p in prompts):
            return prompts
    raise BadInput("prompt must be a text, a list of texts, a list of token ids, or a list of such lists")


# ------------------------------------------------------------------------------- what a client gets


class Text:
    """The text of one job as it grows, without the stops and what could still become one."""

    def __init__(self, tokenizer, stops):
        self.tokenizer, self.stops, self.ids, self.shown = tokenizer, stops, [], ""

    def more(self, ids, ended):
        """Take in new ids -> (what is new of the text for sure, finish_reason or None)."""
        self.ids += ids
        text = new_text(self.tokenizer, self.ids)
        cut = cut_at_stop(text, self.stops) if ended else certain_text(self.tokenizer, self.ids, self.stops)
        delta, self.shown = cut[len(self.shown):], cut
        stopped = ended and (cut != text or self.ids[-1:] and self.ids[-1] in self.tokenizer.eos_ids)
        return delta, ("stop" if stopped else "length") if ended else None


class Shape:
    """OpenAI's objects for a completion."""

    def __init__(self, prefix, kind, model):
        self.kind, self.head = kind, dict(id=f"{prefix}-{secrets.token_hex(12)}", created=int(time.time()), model=model)

    def answer(self, choices, **more):
        return self.head | dict(object=self.kind, choices=choices) | more

    chunk = answer

    def choice(self, index, text, reason):
        return dict(index=index, text=text, logprobs=None, finish_reason=reason)

    delta = choice

    def begin(self, index):
        """What comes before the first delta, or None."""


class ChatShape(Shape):
    """The same for a chat."""

    def chunk(self, choices, **more):
        return self.head | dict(object=f"{self.kind}.chunk", choices=choices) | more

    def choice(self, index, text, reason):
        return dict(index=index, message=dict(role="assistant", content=text), logprobs=None, finish_reason=reason)

    def delta(self, index, text, reason):
        return dict(index=index, delta=dict(content=text) if text else {}, logprobs=None, finish_reason=reason)

    def begin(self, index):
        return dict(index=index, delta=dict(role="assistant", content=""), logprobs=None, finish_reason=None)


def usage(prompts, texts):
    sent, new = sum(map(len, prompts)), sum(len(text.ids) for text in texts.values())
    return dict(prompt_tokens=sent, completion_tokens=new, total_tokens=sent + new)


def event(value):
    return f"data: {json.dumps(value)}\n\n"


# --------------------------------------------------------------------------------- chat templates


def read_chat_template(folder):
    """A model folder's chat template and the special tokens that it may name -> (template, {name: token}), or None."""
    def read(name):
        file = os.path.join(folder, name)
        return read_json(file) if os.path.exists(file) else {}
    config, file = read("tokenizer_config.json"), os.path.join(folder, "chat_template.jinja")
    template = read("chat_template.json").get("chat_template", config.get("chat_template"))
    if os.path.exists(file):
        template = Path(file).read_text(encoding="utf-8")
    if isinstance(template, list):   # several, by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    if not isinstance(template, str):
        return None
    tokens = {key: config.get(key) for key in ("bos_token", "eos_token")}
    return template, {key: t.get("content") if isinstance(t, dict) else t or "" for key, t in tokens.items()}


def render_chat(chat_template, messages):
    """Messages as the text that the model was trained on. BadInput without jinja2, or where the template refuses."""
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        raise BadInput("chat needs jinja2; pip install -r extras/requirements.txt") from None

    def refuse(message):
        raise TemplateError(message)

    template, tokens = chat_template
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)
    except (TemplateError, TypeError, ValueError) as e:
        raise BadInput(f"the chat template refuses these messages ({e})") from None
