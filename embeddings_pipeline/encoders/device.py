"""What a GPU needs that a processor does not: copies that nobody waits for, and passes that are as large as it pays."""

import traceback
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

FEWEST_TOKENS, MOST_TOKENS = 8_192, 1 << 20
USEFUL_GAIN = 1.05  # in texts a second, for which a pass is made twice as large


class Link:
    """Copies between this process's memory and a device. CUDA makes them in turn with the passes, from memory that
    stays where it is, while this process goes on; elsewhere they are waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waits = device.type != "cuda"

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device."""
        if self._waits:
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def fetch(self, tensor: torch.Tensor) -> Callable[[], NDArray[np.floating]]:
        """Begin to copy a tensor of the device; what it returns waits for its numbers."""
        if self._waits:
            return lambda: tensor.cpu().numpy()
        here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        here.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # whoever waits leaves the core to others
        copied.record(torch.cuda.current_stream(self._device))

        def numbers() -> NDArray[np.floating]:
            copied.synchronize()
            array: NDArray[np.floating] = here.numpy()
            return array

        return numbers


def useful_tokens(rate: Callable[[int], float], out_of_memory: Callable[[Exception], bool]) -> int:
    """Tokens of a pass: doubled until the rate, of texts a second in passes of so many tokens, no longer rises by a
    useful share, or memory runs out.
    """
    tokens = FEWEST_TOKENS
    try:
        best = rate(tokens)
        while tokens < MOST_TOKENS and (doubled := rate(2 * tokens)) >= USEFUL_GAIN * best:
            tokens, best = 2 * tokens, doubled
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
    return tokens
