"""Random streams named by what they are for, so that no draw depends on what was drawn before it."""

from __future__ import annotations

import hashlib


def stream(*parts: int | str) -> int:
    """A 64-bit seed for the stream named by `parts`: equal parts, equal seed; in any other case an unrelated one."""
    name = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
