"""Our errors that a MyPT script catches by the name of a builtin exception."""

from mypt_fast.errors import CheckpointError, ConfigError, DataError


class NoCheckpointError(CheckpointError, FileNotFoundError):
    """Nothing to load where a checkpoint was asked for."""


class UnfitWeightsError(CheckpointError, RuntimeError):
    """Weights that are not those of the model they are loaded into."""


class TokenizerError(DataError, ValueError):
    """A tokenizer that is not usable, or not the model's."""


class UnknownTokenError(DataError, KeyError):
    """A character or a token's name that the tokenizer does not have."""

    __str__ = Exception.__str__  # KeyError's own would quote the sentence


class SettingError(ConfigError, ValueError):
    """An argument out of its range."""


class ContextError(ConfigError, IndexError, ValueError):
    """More positions than the model or its cache has; MyPT raises either, by where it notices."""
