"""The errors users see: what was asked, what was found, what to do, and an exit code."""


class MyptError(Exception):
    """Base of every error that is the input's fault, not ours; the CLI prints it as one line.

    Args:
        what: what was asked, with its name (a key path, a file, a flag).
        found: what was found instead.
        cure: what the user can do about it.
    """

    exit_code = 2

    def __init__(self, what: str, found: str = "", cure: str = "") -> None:
        super().__init__("; ".join(part for part in (what, found, cure) if part))
        self.what, self.found, self.cure = what, found, cure


class ConfigError(MyptError):
    """A setting, preset or flag that cannot be used."""


class DataError(MyptError):
    """Missing or unusable input text, dataset or tokenizer."""


class CheckpointError(MyptError):
    """A run directory that is missing, incomplete or does not fit what was asked."""


class DeviceError(MyptError):
    """A device that was asked for and cannot be used."""


class IntegrityError(MyptError):
    """Bytes that are not what their header, manifest or hash says."""

    exit_code = 3


class FormatError(IntegrityError):
    """A file whose header, index or layout is not what its format says."""


class TruncatedShardError(IntegrityError):
    """A file that ends before, or goes on after, where it says it ends."""


class ChecksumError(IntegrityError):
    """Bytes that differ from the hash that was recorded for them."""


class DataChangedError(IntegrityError):
    """A file that changed while it was being read."""


class TokenRangeError(DataError):
    """A token id that the model has no embedding for."""


class DivergedError(MyptError):
    """A run whose losses or gradients are no longer numbers, and that nothing brings back."""
