"""Files of tokens: find them, check them, know what lies beside the tokens.

`open_split` opens one split of a dataset folder, whichever format it has (`dataset`); a `Shard`
says where the tokens are. `native` is the layout of this program's own format.
"""

from mypt_fast.data.format.dataset import has_split, open_file, open_split
from mypt_fast.data.format.metadata import FORMATS, METADATA, read_metadata
from mypt_fast.data.format.shard import (
    WIDTHS,
    Documents,
    Plane,
    Shard,
    Split,
    dataset_fingerprint,
)

__all__ = [
    "FORMATS",
    "METADATA",
    "WIDTHS",
    "Documents",
    "Plane",
    "Shard",
    "Split",
    "dataset_fingerprint",
    "has_split",
    "open_file",
    "open_split",
    "read_metadata",
]
