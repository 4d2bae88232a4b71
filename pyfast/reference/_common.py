"""Philox, and the dropout mask that is made from it."""

import torch
from torch import Tensor


def philox(seed: int, row: Tensor, counter: Tensor) -> Tensor:
    """Return Philox4x32 of 7 rounds, [.., 4] words of 32 bits.

    The key is the seed, the counter is (counter, row's low word, row's high word, 0).
    """
    word = 0xFFFFFFFF
    c = [counter & word, row & word, row >> 32 & word, torch.zeros_like(row & counter)]
    c[0], c[1], c[2] = (v + c[3] for v in c[:3])
    k = [seed & word, seed >> 32 & word]
    for _ in range(7):
        high0, low0 = _multiply_words(0xD2511F53, c[0])
        high1, low1 = _multiply_words(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [k[0] + 0x9E3779B9 & word, k[1] + 0xBB67AE85 & word]
    return torch.stack(c, dim=-1)


def _multiply_words(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low words of a 64-bit product, which int64 cannot hold."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def dropout_threshold(p: float) -> int:
    """Return p in units of 2^-16, to which all kernels round it."""
    return min(round(p * 65536), 65535)


def dropout_mask(rows: int, cols: int, p: float, seed: int, device=None) -> Tensor:
    """Return a dropout mask, [rows, cols] of 0 and 1 / (1 - p).

    Element (i, j) is kept if its 16 random bits are not below the threshold. They are half j % 2
    (low first) of word j / 2 % 4 of philox(seed, row i, counter j / 8).
    """
    row = torch.arange(rows, device=device)[:, None]
    counter = torch.arange(-(-cols // 8), device=device)[None, :]
    words = philox(seed, row, counter).flatten(1)
    bits = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :cols]
    threshold = dropout_threshold(p)
    return (bits >= threshold).double() / (1 - threshold / 65536)
