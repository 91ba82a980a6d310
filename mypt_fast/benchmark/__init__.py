"""Measuring: what `mypt-fast bench` runs on a user's machine, and what bench/ builds on."""
