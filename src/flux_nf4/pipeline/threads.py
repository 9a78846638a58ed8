"""How many threads suit an image on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux_nf4.pipeline.load import Model

_NARROW_HIDDEN_SIZE, _SMALL_PIXELS = 512, 512 * 512


def suited_num_threads(model: Model, width: int, height: int, *, otherwise: int) -> int:
    """One for small images of a narrow model on a CPU, else `otherwise`.

    Its operations are so short that threads wait for each other more than they work: 20 steps of
    the demo model took 0.8 s with one thread and 1.0 s with four on four idle cores. With other
    programs running, where a barrier waits for a thread that is not scheduled, four took 91 s.
    """
    is_narrow = model.transformer.config.hidden_size <= _NARROW_HIDDEN_SIZE
    is_small = width * height <= _SMALL_PIXELS
    return 1 if model.device.type == "cpu" and is_narrow and is_small else otherwise
