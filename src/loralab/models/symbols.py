"""The tiny base's symbols: a vocabulary of readable tokens, its tokenizer, operations on strings.

A line of text is `operation letters = answer end`, its tokens separated by spaces:
`reverse a b c d = d c b a end`. The tags `#1` to `#8` are operations without a meaning; tasks give
them one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from loralab.errors import UserError, near_misses

N_LETTERS = 8
LETTERS = tuple("abcdefgh")
TAGS = tuple(f"#{i}" for i in range(1, 9))


def _swap(s: Tensor) -> Tensor:
    out = s.clone()
    even = s.shape[-1] // 2 * 2
    out[..., 0:even:2], out[..., 1:even:2] = s[..., 1:even:2], s[..., 0:even:2]
    return out


# Each maps letters 0 to 7, [n, length], to the answer of the same shape.
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda s: s,
    "reverse": lambda s: s.flip(-1),
    "shift": lambda s: (s + 1) % N_LETTERS,
    "sort": lambda s: s.sort(-1).values,
    "rotate": lambda s: s.roll(-1, -1),
    "swap": _swap,
}


def apply(operations: Iterable[str], s: Tensor) -> Tensor:
    """Return letters `s` [n, length] after each named operation in turn.

    Raises:
        UserError: an operation is unknown.
    """
    for name in operations:
        if name not in OPERATIONS:
            raise UserError(f"unknown operation {name!r}{near_misses(name, OPERATIONS)}")
        s = OPERATIONS[name](s)
    return s


VOCABULARY = ("<pad>", "end", "=", *LETTERS, *OPERATIONS, *TAGS)


@dataclass(frozen=True)
class SymbolTokenizer:
    """One token per word; unknown words are an error."""

    vocabulary: tuple[str, ...] = VOCABULARY
    pad_token_id: int = 0
    eos_token_id: int = 1
    padding_side: str = "left"

    def __len__(self) -> int:
        """Return the size of the vocabulary."""
        return len(self.vocabulary)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the token of each space-separated word; there are no special tokens to add.

        Raises:
            UserError: a word is not in the vocabulary.
        """
        try:
            return [self.vocabulary.index(word) for word in text.split()]
        except ValueError:
            word = next(word for word in text.split() if word not in self.vocabulary)
            raise UserError(
                f"the tiny model has no token {word!r}; its tokens are {' '.join(self.vocabulary)}"
            ) from None

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """Return the words of `ids`, without padding and `end` if special tokens are skipped."""
        special = {self.pad_token_id, self.eos_token_id} if skip_special_tokens else set()
        return " ".join(self.vocabulary[int(i)] for i in ids if int(i) not in special)
