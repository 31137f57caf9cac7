"""Random states as a user gives them: generators or seeds, one for all images or one per image."""

from __future__ import annotations

import torch

Generators = torch.Generator | int | list | tuple | None


def read_generator(generator: Generators, count: int) -> torch.Generator | list[torch.Generator] | None:
    """Generators as given, seeds turned into generators.

    Raises:
        ValueError: negative seeds, another number than `count`, or something else.
    """
    if isinstance(generator, list | tuple):
        if len(generator) != count:
            raise ValueError(f"{count} images need one generator or {count}, got {len(generator)}.")
        return [read_generator(one, 1) for one in generator]
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, bool) or not isinstance(generator, int):
        raise ValueError(f"generator must be torch.Generators or seeds (integers), got {type(generator).__name__}.")
    if not 0 <= generator < 2**63:
        raise ValueError(f"seeds must lie in [0, 2^63), got {generator}.")
    return torch.Generator().manual_seed(generator)
