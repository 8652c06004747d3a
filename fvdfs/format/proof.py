"""How a target proves to its source that it is the one that has the disk: what it is called commits it.

A target draws a secret, which stays in its image's record. From it, and the epoch of the move, come two keys, one for
each word that frees the source: that the target has all of the disk, and that it has given the move up. The number by
which the target asks for the disk, and which the source keeps, is a hash of the hashes of both:

    key = H(word, epoch, secret)        number = H(epoch, H(key of RELEASE), H(key of GO_ON))

Whoever says a word shows its key, and the hash of the other one. All may see the number, and a key once it was used:
that serves no other word, and no other move. All are 128 bits of SHA-256, in hexadecimal digits. Pure.
"""

from __future__ import annotations

import enum
import hashlib
import re
from dataclasses import dataclass, field

LENGTH = 32  # hexadecimal digits
_DIGITS = re.compile(f"[0-9a-f]{{{LENGTH}}}")


class Word(enum.Enum):
    """What only the target that has the disk may say."""

    RELEASE = "release"
    GO_ON = "go-on"


@dataclass(frozen=True, slots=True)
class Proof:
    """What is shown with a word."""

    key: str = field(repr=False)
    other: str
    """The hash of the other word's key."""


def is_digest(text: str) -> bool:
    """Whether this can be a secret, a number of a target, or a part of a proof."""
    return bool(_DIGITS.fullmatch(text))


def number_of(secret: str, epoch: str) -> str:
    """What the target that has this secret is called in a move."""
    return _number(epoch, {word: _locked(_key(secret, epoch, word)) for word in Word})


def proof_of(secret: str, epoch: str, word: Word) -> Proof:
    """What the target shows as it says this word. Whoever has seen it can say the same once more."""
    (other,) = (each for each in Word if each is not word)
    return Proof(_key(secret, epoch, word), _locked(_key(secret, epoch, other)))


def proves(proof: Proof, epoch: str, number: str, word: Word) -> bool:
    """Whether the target of this number says the word."""
    (other,) = (each for each in Word if each is not word)
    return _number(epoch, {word: _locked(proof.key), other: proof.other}) == number


def _key(secret: str, epoch: str, word: Word) -> str:
    return _digest("key", word.value, epoch, secret)


def _locked(key: str) -> str:
    return _digest("lock", key)


def _number(epoch: str, locks: dict[Word, str]) -> str:
    return _digest("number", epoch, locks[Word.RELEASE], locks[Word.GO_ON])


def _digest(*parts: str) -> str:
    return hashlib.sha256(" ".join(("fvdfs move", *parts)).encode()).hexdigest()[:LENGTH]
