"""A tape of allocations: what lives, by part, and the moment when most does."""

PARTS = ("weights", "gradients", "states", "weight_copies", "activations", "head", "work")


class Tape:
    """Named pieces of memory that come and go; the peak remembers its parts.

    "work" is what lives for a moment inside an operator; the head's part is its chunk of logits
    and the gradients that it makes ahead of the backward.
    """

    def __init__(self) -> None:
        self.live = dict.fromkeys(PARTS, 0.0)
        self.total = 0.0
        self.peak = 0.0
        self.at_peak = dict(self.live)
        self.when = ""
        self.now = ""
        self._held: dict[str, tuple[str, float]] = {}

    def hold(self, name: str, part: str, size: float) -> None:
        """Allocate `size` bytes under a name that is free."""
        assert name not in self._held, name
        self._held[name] = (part, size)
        self.gain(part, size)

    def gain(self, part: str, size: float) -> None:
        """Allocate bytes that have no name: they go by `gain` of a negative size, or never."""
        self.live[part] += size
        self.total += size
        self.touch(0.0)

    def touch(self, size: float) -> None:
        """Need `size` bytes for a moment."""
        if self.total + size > self.peak:
            self.peak, self.when = self.total + size, self.now
            self.at_peak = dict(self.live)
            self.at_peak["work"] += size

    def drop(self, *names: str) -> None:
        """Free pieces; those that were never held are passed over: policies keep different ones."""
        for name in names:
            part, size = self._held.pop(name, ("work", 0.0))
            self.live[part] -= size
            self.total -= size

    def held(self) -> list[str]:
        """Names of the pieces that live."""
        return list(self._held)

    def snapshot(self) -> dict[str, float]:
        """What lives now, by part."""
        return dict(self.live)
