from extras.whisper_model import PRESETS, Whisper  # noqa: F401

MODEL = Whisper
