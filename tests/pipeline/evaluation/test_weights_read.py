"""Bytes that a token needs: what is stored once counts once, of a table that is only looked up in one row."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.evaluation.weights_read import weight_bytes_per_token


def save(folder: Path, nodes: list[onnx.NodeProto], stored: dict[str, np.ndarray], *, external: bool = False) -> Path:
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "tokens"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("ai.fips", 1)])
    onnx.save(model, folder / "text.onnx", save_as_external_data=external, location="text.onnx.data", size_threshold=0)
    config = {"model": {"decoder": {"filename": "text.onnx"}}}
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("external", [False, True])
def test_counts_what_a_token_needs(tmp_path: Path, external: bool) -> None:
    """A table of 100 rows with 8 float16 each, looked up only; a basis that two products read; a rotary table."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("QMatMul", ["x", "codes", "scales"], ["t"], domain="ai.fips"),
        helper.make_node("QMatMul", ["t", "codes", "scales"], ["y"], domain="ai.fips"),
        helper.make_node("RotaryEmbedding", ["y", "ids", "cosines", "cosines"], ["logits"], domain="com.microsoft"),
    ]
    stored = {
        "table": np.zeros((100, 8), np.float16),
        "codes": np.zeros(96, np.uint8),
        "scales": np.zeros((8, 2), np.float16),
        "cosines": np.zeros((500, 4), np.float32),
        "read by no node": np.zeros(1000, np.float32),
    }
    folder = save(tmp_path, nodes, stored, external=external)
    assert weight_bytes_per_token(folder) == 16 + (96 + 32) + 16


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_read_as_a_whole(tmp_path: Path, tied: bool) -> None:
    """Rows of packed codes are as many as those of the scales."""
    output = ["codes", "scales"] if tied else ["own codes", "own scales"]
    nodes = [
        helper.make_node("QMatMul", ["x", *output], ["logits"], domain="ai.fips"),
        helper.make_node("QGather", ["ids", "codes", "scales"], ["x"], domain="ai.fips"),
    ]
    codes, scales = np.zeros(3200, np.uint8), np.zeros((100, 2), np.float16)
    stored = {"codes": codes, "scales": scales} | dict(zip(output, (codes, scales), strict=True))
    assert weight_bytes_per_token(save(tmp_path, nodes, stored)) == 3200 + 400 + (0 if tied else 32 + 4)


def test_tensors_of_one_place_in_a_file_count_once(tmp_path: Path) -> None:
    """An artefact stores the codes of a tied table once, under two names."""
    nodes = [
        helper.make_node("GatherBlockQuantized", ["codes", "ids", "scales"], ["x"], domain="com.microsoft"),
        helper.make_node("MatMulNBits", ["x", "same codes", "scales"], ["logits"], domain="com.microsoft"),
    ]
    codes = np.zeros((100, 32), np.uint8)
    folder = save(
        tmp_path, nodes, {"codes": codes, "same codes": codes, "scales": np.zeros((100, 2), np.float32)}, external=True
    )
    model = onnx.load(folder / "text.onnx", load_external_data=False)
    first, second = model.graph.initializer[:2]
    assert weight_bytes_per_token(folder) == 3200 + 800 + 32  # two places
    del second.external_data[:]
    second.external_data.extend(first.external_data)
    onnx.save(model, folder / "text.onnx")
    assert weight_bytes_per_token(folder) == 3200 + 800
