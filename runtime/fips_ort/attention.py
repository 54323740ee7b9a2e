"""The attention ops of domain ``ai.fips`` in numpy: what every other implementation is tested against."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fips_ort.ops import HEAD_STEP

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Norms of heads (RMSNorm): ``queries`` and ``keys`` float32 [head size], what elements are multiplied with after
    they were divided by the root of their mean square plus ``epsilon``."""

    queries: Floats
    keys: Floats
    epsilon: float


def cached_attention(
    qkv: Floats,
    past_key: Floats,
    past_value: Floats,
    seqlens_k: NDArray[np.int32],
    total_sequence_length: int,
    position_ids: NDArray[np.int64],
    cos_cache: Floats,
    sin_cache: Floats,
    *,
    num_heads: int,
    kv_num_heads: int,
    local_window_size: int,
    scale: float,
    norms: HeadNorms | None = None,
) -> tuple[Floats, Floats, Floats]:
    """Attention of new tokens to themselves and those before them: CachedAttention, or, with ``norms``,
    QKNormCachedAttention (docs/ops.md).

    ``qkv`` [batch, tokens, (num_heads + 2 kv_num_heads) * head size]: queries, keys and values of new tokens;
    ``past_key`` and ``past_value`` [batch, kv_num_heads, past capacity, head size]; ``seqlens_k`` [batch]: how many
    tokens each text has with the new ones, less one; ``position_ids`` [batch, tokens]: rows of ``cos_cache`` and
    ``sin_cache`` [rows, head size / 2]. ``local_window_size``: tokens that one attends to, itself the last of them; -1:
    all.

    Returns Y [batch, tokens, num_heads * head size] and the caches with the new tokens [batch, kv_num_heads, max(past
    capacity, total_sequence_length), head size], zeros behind them. Sums are float64. Raises ValueError for sizes that
    do not fit and texts that the caches have no room for, IndexError for positions that the tables do not have.
    """
    batch, tokens, width = qkv.shape
    size, rest = divmod(width, num_heads + 2 * kv_num_heads)
    if rest or size % HEAD_STEP or not size or num_heads % kv_num_heads:
        heads = f"{num_heads} + 2 x {kv_num_heads} heads"
        raise ValueError(f"{width} features are not those of {heads} of a multiple of {HEAD_STEP}")
    if local_window_size != -1 and local_window_size < 1:
        raise ValueError(f"local_window_size must be -1 or positive, got {local_window_size}")
    if position_ids.size and (position_ids.min() < 0 or position_ids.max() >= len(cos_cache)):
        raise IndexError(f"position_ids has one that is not among the {len(cos_cache)} rows of cos_cache")
    if not past_key.shape == past_value.shape == (batch, kv_num_heads, past_key.shape[2], size):
        raise ValueError(f"past_key {past_key.shape} and past_value {past_value.shape} are no such caches")
    room = max(past_key.shape[2], total_sequence_length)
    parts = qkv.reshape(batch, tokens, num_heads + 2 * kv_num_heads, size).astype(np.float64)
    queries, keys, values = np.split(parts, [num_heads, num_heads + kv_num_heads], axis=2)
    if norms is not None:
        queries = _normalized(queries, norms.queries, norms.epsilon)
        keys = _normalized(keys, norms.keys, norms.epsilon)
    cosines, sines = (table[position_ids][:, :, None].astype(np.float64) for table in (cos_cache, sin_cache))
    queries, keys = _rotated(queries, cosines, sines), _rotated(keys, cosines, sines)
    y = np.zeros((batch, tokens, num_heads, size))
    present_key = np.zeros((batch, kv_num_heads, room, size), np.float32)
    present_value = np.zeros_like(present_key)
    for text in range(batch):
        total = int(seqlens_k[text]) + 1
        past = total - tokens
        if not 0 <= past <= past_key.shape[2] or total > room:
            raise ValueError(f"a text of {total} tokens, {tokens} of them new, does not fit into the caches")
        for present, before, new in ((present_key, past_key, keys), (present_value, past_value, values)):
            present[text, :, :past] = before[text, :, :past]
            present[text, :, past:total] = new[text].swapaxes(0, 1)
        for head in range(num_heads):
            cached = head // (num_heads // kv_num_heads)
            scores = scale * queries[text, :, head] @ present_key[text, cached, :total].T.astype(np.float64)
            places, own = np.arange(total), past + np.arange(tokens)[:, None]
            seen = (places <= own) & ((places > own - local_window_size) | (local_window_size == -1))
            scores = np.where(seen, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            y[text, :, head] = weights @ present_value[text, cached, :total].astype(np.float64)
    return y.reshape(batch, tokens, num_heads * size).astype(np.float32), present_key, present_value


def _normalized(heads: NDArray[np.float64], weight: Floats, epsilon: float) -> NDArray[np.float64]:
    result: NDArray[np.float64] = heads / np.sqrt((heads**2).mean(axis=-1, keepdims=True) + epsilon) * weight
    return result


def _rotated(
    heads: NDArray[np.float64], cosines: NDArray[np.float64], sines: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Elements i and half + i of each head, rotated together (Su et al. 2021, in the order of Llama's code)."""
    low, high = np.split(heads, 2, axis=-1)
    return np.concatenate([low * cosines - high * sines, high * cosines + low * sines], axis=-1)
