"""Inputs of the attention ops, and models of one node."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from exporters.functions import MINIMUM_OPSET, op_functions
from fips_ort.attention import HeadNorms, cached_attention
from fips_ort.ops import CACHED_ATTENTION, DOMAIN, QK_NORM_CACHED_ATTENTION

NAMES = ("qkv", "past_key", "past_value", "seqlens_k", "total_sequence_length", "position_ids", "cos_cache",
         "sin_cache", "q_norm", "k_norm")
OUTPUTS = ("Y", "present_key", "present_value")
EPSILON = 1e-6


@dataclass(frozen=True)
class AttentionCase:
    heads: int = 4
    kv_heads: int = 1
    head_size: int = 64
    tokens: int = 3
    pasts: tuple[int, ...] = (5,)
    """Tokens of each text before the new ones."""
    spare: int = 0
    """For how many more tokens than needed the caches have room."""
    window: int = -1
    norms: bool = True
    scale: float = 0.125
    seed: int = 0

    @property
    def is_known_to_onnxruntime(self) -> bool:
        """Its GroupQueryAttention refuses several new tokens of several texts behind others."""
        return self.tokens == 1 or len(self.pasts) == 1 or not any(self.pasts)

    @property
    def attributes(self) -> dict[str, Any]:
        return {"num_heads": self.heads, "kv_num_heads": self.kv_heads, "local_window_size": self.window,
                "scale": self.scale}

    def feeds(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        batch, size, total = len(self.pasts), self.head_size, max(self.pasts) + self.tokens
        past = [batch, self.kv_heads, max(self.pasts) + (self.tokens + self.spare if self.spare else 0), size]
        angles = rng.uniform(0, 2 * np.pi, (total + 3, size // 2))
        norms = {name: rng.uniform(0.5, 2, size) for name in ("q_norm", "k_norm")} if self.norms else {}
        floats = {
            "qkv": rng.standard_normal((batch, self.tokens, (self.heads + 2 * self.kv_heads) * size)),
            "past_key": rng.standard_normal(past), "past_value": rng.standard_normal(past),
            "cos_cache": np.cos(angles), "sin_cache": np.sin(angles), **norms,
        }
        positions = np.array(self.pasts)[:, None] + np.arange(self.tokens)
        return {name: value.astype(np.float32) for name, value in floats.items()} | {
            "seqlens_k": np.array(self.pasts, np.int32) + self.tokens - 1,
            "total_sequence_length": np.array(total, np.int32),
            "position_ids": positions.astype(np.int64),
        }

    def expected(self, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        values = dict(feeds)
        norms = HeadNorms(values.pop("q_norm"), values.pop("k_norm"), EPSILON) if self.norms else None
        values["total_sequence_length"] = int(values["total_sequence_length"])
        return cached_attention(**values, **self.attributes, norms=norms)

    def model(self) -> onnx.ModelProto:
        feeds = self.feeds()
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(feeds[name].dtype),
                                          [f"{name}_{axis}" for axis in range(feeds[name].ndim)])
            for name in NAMES if name in feeds
        ]
        outputs = [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [f"{name}_{axis}" for axis in range(rank)])
            for name, rank in zip(OUTPUTS, (3, 4, 4), strict=True)
        ]
        kind = QK_NORM_CACHED_ATTENTION if self.norms else CACHED_ATTENTION
        epsilon = {"epsilon": EPSILON} if self.norms else {}
        node = helper.make_node(kind, [value.name for value in inputs], list(OUTPUTS), domain=DOMAIN, name="attention",
                                **self.attributes, **epsilon)
        opsets = [helper.make_opsetid(*pair) for pair in (("", MINIMUM_OPSET), (DOMAIN, 1), ("com.microsoft", 1))]
        functions = op_functions((kind,))
        graph = helper.make_graph([node], "attention", inputs, outputs)
        return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions)


CASES = {
    "decode": AttentionCase(tokens=1, pasts=(130,)),
    "decode in place of a longer cache": AttentionCase(tokens=1, pasts=(37,), spare=27),
    "a first token": AttentionCase(tokens=1, pasts=(0,)),
    "a prompt": AttentionCase(tokens=41, pasts=(0,)),
    "a prompt behind another": AttentionCase(tokens=70, pasts=(33,)),
    "long": AttentionCase(tokens=1, pasts=(1500,), head_size=32),
    "long, two texts": AttentionCase(tokens=2, pasts=(1500, 3), head_size=32, spare=5),
    "window": AttentionCase(tokens=20, pasts=(50,), window=16),
    "window of one": AttentionCase(tokens=3, pasts=(50,), window=1),
    "window longer than the text": AttentionCase(tokens=3, pasts=(5,), window=512),
    "window, decode": AttentionCase(tokens=1, pasts=(700,), window=512, head_size=96),
    "texts": AttentionCase(tokens=9, pasts=(0, 7, 31), heads=6, kv_heads=2),
    "texts, decode": AttentionCase(tokens=1, pasts=(2, 7, 31), heads=6, kv_heads=2),
    "prompts": AttentionCase(tokens=9, pasts=(0, 0), heads=6, kv_heads=2),
    "every head its own": AttentionCase(tokens=5, pasts=(4,), heads=3, kv_heads=3),
    "large heads": AttentionCase(tokens=17, pasts=(40,), head_size=256, heads=8, kv_heads=2),
    "small heads": AttentionCase(tokens=7, pasts=(20,), head_size=16),
    "heads of halves": AttentionCase(tokens=7, pasts=(20,), head_size=80, heads=2),
    "no norms": AttentionCase(tokens=6, pasts=(11,), norms=False, head_size=160),
    "no norms, decode": AttentionCase(tokens=1, pasts=(99,), norms=False, heads=8, kv_heads=8, head_size=128),
}
