"""What a GPU needs that a processor does not: copies that nobody waits for, and passes that are as large as it pays."""

import traceback
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from embeddings_pipeline.encoders.token_rows import Row, TokenRows

FEWEST_TOKENS, MOST_TOKENS = 8_192, 1 << 20
USEFUL_GAIN = 1.05  # in texts a second, for which a pass is made twice as large


class Link:
    """Copies between this process's memory and a device. CUDA makes them in turn with the passes, from memory that
    stays where it is, while this process goes on; elsewhere they are waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waits = device.type != "cuda"

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device."""
        if self._waits:
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def fetch(self, tensor: torch.Tensor) -> Callable[[], NDArray[np.floating]]:
        """Begin to copy a tensor of the device; what it returns waits for its numbers."""
        if self._waits:
            return lambda: tensor.cpu().numpy()
        here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        here.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # whoever waits leaves the core to others
        copied.record(torch.cuda.current_stream(self.device))

        def numbers() -> NDArray[np.floating]:
            copied.synchronize()
            array: NDArray[np.floating] = here.numpy()
            return array

        return numbers


def padded(rows: TokenRows, tokens: Sequence[Row], link: Link) -> dict[str, torch.Tensor]:
    """What `TokenRows.padded` makes of rows, made on the device: no padding is copied, and all that is in one piece."""
    ids, types = [row[0] for row in tokens], [row[1] for row in tokens if row[1] is not None]
    sizes = [len(tokens), sum(map(len, ids)), sum(map(len, types))]
    sent = np.concatenate([list(map(len, ids)), *ids, *types], dtype=np.int32)
    lengths, *values = link.send(torch.from_numpy(sent)).long().split(sizes)
    places = torch.arange(max(map(len, ids)), device=link.device)
    there = places >= len(places) - lengths[:, None] if rows.padding.side == "left" else places < lengths[:, None]
    filled = {"input_ids": (rows.padding.token, values[0]), "token_type_ids": (rows.padding.type, values[1])}
    inputs: dict[str, torch.Tensor] = {}
    for name in rows.inputs:
        if name == "attention_mask":
            inputs[name] = there.long()
        else:
            padding, value = filled[name]
            inputs[name] = torch.full(there.shape, padding, device=link.device).masked_scatter_(there, value)
    return inputs


def useful_tokens(rate: Callable[[int], float], out_of_memory: Callable[[Exception], bool]) -> int:
    """Tokens of a pass: doubled until the rate, of texts a second in passes of so many tokens, no longer rises by a
    useful share, or memory runs out. One doubling that does not pay may be chance.
    """
    tokens = tried = FEWEST_TOKENS
    try:
        best = rate(tokens)
        while tried < min(MOST_TOKENS, 4 * tokens):
            tried *= 2
            if (doubled := rate(tried)) >= USEFUL_GAIN * best:
                tokens, best = tried, doubled
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
    return tokens
