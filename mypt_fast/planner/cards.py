"""Cards that people train on: memory, and what big matmuls reach on them, measured.

Ceilings are TFLOP/s of the best square matmul that somebody measured with PyTorch and published in
zzc0721/torch-performance-test-data (on GitHub); the source names the issue or `database.md`, its
table. Where several were published the lowest stands here. Bandwidths are the makers' data sheets.
"""

import difflib
import re
from dataclasses import dataclass

from mypt_fast.errors import ConfigError

DATA = "zzc0721/torch-performance-test-data"


@dataclass(frozen=True)
class Card:
    """A GPU by its usual name.

    Attributes:
        memory: nominal, GiB.
        tflops: by dtype: "fp16", "bf16", and "fp32" (without TF32) where it was published.
        source: of the ceilings.
        gb_per_s: memory bandwidth, of the maker's data sheet; 0: unknown.
        visible: GiB that programs see, where that is well below the nominal; else 0.
        share: of its ceiling that a training step reaches, as estimated.
    """

    name: str
    memory: float
    tflops: dict[str, float]
    source: str
    gb_per_s: float = 0.0
    visible: float = 0.0
    share: float = 0.8

    @property
    def dtype(self) -> str:
        """The dtype to train in: fp16 where bf16 is emulated."""
        return "bf16" if self.tflops["bf16"] > self.tflops["fp16"] / 2 else "fp16"


def _card(
    name: str,
    memory: float,
    fp32: float | None,
    fp16: float,
    bf16: float,
    source: str,
    **more: float,
) -> Card:
    ceilings = {"fp16": fp16, "bf16": bf16} | ({"fp32": fp32} if fp32 else {})
    return Card(name, memory, ceilings, f"{DATA} {source}", **more)


# Cards before Ampere reach a smaller share: their matmuls are fast, the rest is not.
OLD = 0.6
CARDS = (
    _card("T4", 16, 4.17, 41.9, 2.46, "database.md", visible=14.74, share=OLD, gb_per_s=320),
    _card("V100S", 32, 13.6, 88.9, 9.85, "database.md", share=OLD, gb_per_s=1134),
    _card("V100", 16, 13.6, 88.9, 9.85, "database.md, of the V100S", share=OLD, gb_per_s=900),
    _card("RTX 2080", 8, 9.23, 39.0, 5.14, "database.md", share=OLD, gb_per_s=448),
    _card("RTX 3080 Ti", 12, 24.4, 75.6, 76.5, "database.md", gb_per_s=912),
    _card("RTX 3090", 24, 24.5, 75.6, 76.3, "database.md", gb_per_s=936),
    _card("RTX A2000 12GB", 12, 5.51, 36.0, 37.3, "#72", gb_per_s=288),
    _card("RTX A4000", 16, 11.9, 65.4, 62.8, "#97", gb_per_s=448),
    _card("A40", 48, 23.7, 119.2, 122.3, "#185", gb_per_s=696),
    _card("RTX 4060", 8, 8.34, 32.6, 31.2, "#66", gb_per_s=272),
    _card("RTX 4060 Ti", 16, 11.9, 43.4, 44.7, "#130 (also #145)", gb_per_s=288),
    _card("RTX 4070 SUPER", 12, 22.8, 65.1, 72.5, "#196 (also #54)", gb_per_s=504),
    _card("RTX 4070 Ti SUPER", 16, 31.3, 92.7, 92.7, "#70 (also #71)", gb_per_s=672),
    _card("RTX 4090", 24, 46.5, 162.4, 162.4, "database.md (also #78)", gb_per_s=1008),
    _card("RTX 5050", 8, 8.74, 24.5, 28.4, "#170", gb_per_s=320),
    _card("RTX 5060", 8, 13.3, 41.3, 41.8, "#147 (also #128)", gb_per_s=448),
    _card("RTX 5060 Ti", 16, 15.9, 45.9, 46.1, "#129 (also #85 #134 #136 #163)", gb_per_s=448),
    _card("RTX 5070", 12, 22.5, 62.0, 62.0, "#179 (also #101 #149 #178 #194)", gb_per_s=672),
    _card("RTX 5070 Ti", 16, 28.3, 84.0, 85.3, "#172 (also #86)", gb_per_s=896),
    _card("RTX 5080", 16, 33.6, 102.4, 102.9, "#104", gb_per_s=960),
    _card("RTX 5090", 32, 56.8, 179.0, 178.9, "#200 (also database.md)", gb_per_s=1792),
    _card("A100 40GB", 40, 17.6, 241.5, 234.1, "#108 (also database.md)", gb_per_s=1555),
    _card("A100 80GB", 80, 19.2, 258.7, 264.5, "database.md", gb_per_s=2039),
    _card("H100 80GB", 80, None, 761.8, 789.2, "database.md", gb_per_s=3350),
    _card("H200", 141, None, 761.8, 789.2, "database.md, of the H100", gb_per_s=4800),
    _card("RTX PRO 6000", 96, 77.2, 315.5, 418.0, "database.md", gb_per_s=1792),
    _card("B200", 180, 66.2, 1627.6, 1696.0, "database.md", gb_per_s=8000),
)  # fmt: skip


def plain(name: str) -> str:
    """A name without what makers and drivers add: 'NVIDIA GeForce RTX 5060 Ti' is '5060ti'."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    noise = r"nvidia|geforce|rtx|tesla|gpu|sxm\d?|pcie|hbm\d?e?"
    words = [re.sub(r"^(geforce|rtx|tesla)(?=\d)", "", word) for word in words]  # RTX5060Ti
    return "".join(word for word in words if not re.fullmatch(noise, word))


def known(name: str) -> Card | None:
    """The card of that name, None for one that is not in the table."""
    wanted = plain(name)
    same = [card for card in CARDS if plain(card.name) == wanted]
    # what a driver says has more: "NVIDIA H100 80GB HBM3", "Tesla V100-SXM2-16GB", "4060 Ti 16GB"
    same += sorted(
        (card for card in CARDS if wanted.startswith(plain(card.name)) and _ends(wanted, card)),
        key=lambda card: -len(card.name),
    )
    return same[0] if same else None


def find(name: str) -> Card:
    """The card of that name.

    Raises:
        ConfigError: for a name that is not in the table, with the nearest that are.
    """
    if card := known(name):
        return card
    wanted, names = plain(name), {plain(card.name): card.name for card in CARDS}
    near = [key for key in names if wanted and wanted in key]
    near += [key for key in difflib.get_close_matches(wanted, names, 3, 0.5) if key not in near]
    shown = ", ".join(names[key] for key in near[:4]) or ", ".join(names.values())
    raise ConfigError(
        f"--gpu: no card of the name {name[:60]!r} is in the table",
        f"the nearest are {shown}" if near else f"it knows {shown}",
        "use one of these, or --vram alone for memory without tokens/s",
    )


def _ends(wanted: str, card: Card) -> bool:
    """Whether what follows the card's name is its memory, and nothing else, as 'laptop' is."""
    return wanted[len(plain(card.name)) :] == f"{card.memory:.0f}gb"
