"""The 19 pinned special tokens (MyPT specification 9.3), as the tokenizer knows them."""

from mypt_fast.gpt2_files import GPT2_BASE_VOCAB
from mypt_fast.tokenizer import SPECIAL_STRINGS, SPECIAL_TOKENS

BASE_VOCAB_SIZE = GPT2_BASE_VOCAB
SPECIAL_TOKEN_STRINGS: dict[str, str] = dict(SPECIAL_STRINGS)  # name -> string
SPECIAL_TOKEN_IDS: dict[str, int] = dict(SPECIAL_TOKENS)  # name -> id


def get_special_token_ids() -> dict[str, int]:
    """Return a copy of name -> id.

    Raises:
        ValueError: somebody changed one of the two tables, so that their names differ.
    """
    if set(SPECIAL_TOKEN_IDS) != set(SPECIAL_TOKEN_STRINGS):
        odd = sorted(set(SPECIAL_TOKEN_IDS) ^ set(SPECIAL_TOKEN_STRINGS))
        raise ValueError(f"special tokens: names and ids disagree about {', '.join(odd)}")
    return dict(SPECIAL_TOKEN_IDS)
