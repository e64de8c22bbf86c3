"""What is said in a prompt: its words, their parts of speech, its noun phrases.

The published scorer asks spaCy's `en_core_web_sm` (MIT), and so does this: other parsers cut phrases otherwise and
would ask BLIP other questions. It is an extra, since only the colours, shapes, textures and complex prompts need it;
places and numbers are asked for in fixed forms, which `rules` reads without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from bittern.errors import UserError

PIPELINE = "en_core_web_sm"


@dataclass(frozen=True)
class Parsed:
    """A prompt, parsed.

    Attributes:
        words: its words with their parts of speech in the universal tag set, such as ("mirror", "NOUN").
        phrases: its noun phrases in their order, such as "a green bench".
    """

    words: tuple[tuple[str, str], ...]
    phrases: tuple[str, ...]


class Parser(Protocol):
    """Parses prompts."""

    @property
    def identity(self) -> str:
        """What tells it from another that parses otherwise."""
        ...

    def __call__(self, prompt: str) -> Parsed:
        """A prompt, parsed."""
        ...


class SpacyParser:
    """A pipeline of spaCy."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.identity = "{lang}_{name} {version}".format(**pipeline.meta)

    def __call__(self, prompt: str) -> Parsed:
        """A prompt, parsed."""
        doc = self._pipeline(prompt)
        return Parsed(tuple((word.text, word.pos_) for word in doc), tuple(phrase.text for phrase in doc.noun_chunks))


def load() -> Parser:
    """The parser that the published scorer asks, spaCy with its small English pipeline.

    Raises:
        UserError: if either is not installed, with the way to bring it.
    """
    try:
        import spacy

        return SpacyParser(spacy.load(PIPELINE))
    except (ImportError, OSError) as error:
        raise UserError(
            f"color, shape, texture and complex need spaCy and its pipeline {PIPELINE}, and one is not installed: run "
            f'`pip install "bittern[compbench]"` and `python -m spacy download {PIPELINE}`; without a network bring '
            "its wheel from github.com/explosion/spacy-models/releases and pip install that"
        ) from error
