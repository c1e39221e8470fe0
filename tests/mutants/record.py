"""What a seeded bug is."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """``old`` stands once in ``file``; ``new`` replaces it; ``tests`` (files, or tests of them) must then fail."""

    file: str
    old: str
    new: str
    what: str
    tests: str
