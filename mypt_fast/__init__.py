"""mypt_fast: train GPTs of 2 M to 1.5 B parameters on the card people really own."""

__version__ = "0.1.0"
