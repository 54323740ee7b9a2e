"""The profile of a decode step: all nodes are counted, products apart."""

from collections import Counter
from pathlib import Path

import pytest
from causal_lm_samples import language_sample, write_language_sample

from benchmarks import decode
from benchmarks.decode import OpTime, StepProfile, format_profile, main, op_times


def kernel(name: str, op: str, start: int, duration: int) -> dict:
    return {"name": f"{name}_kernel_time", "ts": start, "dur": duration, "args": {"op_name": op}}


def run(start: int, duration: int) -> dict:
    return {"name": "model_run", "ts": start, "dur": duration, "args": {}}


def test_times_are_medians_over_runs_of_sums_in_a_run() -> None:
    events = [run(0, 100), run(100, 100), run(200, 500)]
    for start, duration in ((0, 10), (100, 20), (200, 90)):
        events.append(kernel("model.layers.0.mlp/up_proj", "QMatMul", start + 1, duration))
        events.append(kernel("model.layers.1.mlp/up_proj", "QMatMul", start + 2, 2 * duration))
        events.append(kernel("lm_head", "QMatMul", start + 3, 7))
        events.append(kernel("/model/layers.0/norm", "Add", start + 4, 1))
    assert op_times(events) == (
        OpTime("QMatMul up_proj", 2, 0.06),
        OpTime("QMatMul lm_head", 1, 0.007),
        OpTime("Add", 1, 0.001),
    )


def test_table_adds_up() -> None:
    profile = StepProfile((OpTime("QMatMul up_proj", 18, 1.8), OpTime("Add", 2, 0.1)), profiled=2.5, unprofiled=2.2)
    lines = format_profile(profile).splitlines()
    assert lines[2:] == [
        "| QMatMul up_proj | 18 | 1.800 | 100.0 |",
        "| Add | 2 | 0.100 | 50.0 |",
        "| between nodes | | 0.600 | 30.0 |",
        "| whole, profiled | 20 | 2.50 | |",
        "| whole, not profiled | | 2.20 | |",
    ]


def test_all_nodes_of_a_step_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = language_sample("gemma3")
    write_language_sample(tmp_path / "artefact", exported)
    monkeypatch.setattr(decode, "_ROOM", 64)
    assert main([str(tmp_path / "artefact"), "--threads", "1", "--past", "20", "--seconds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main([str(tmp_path)]) == 2
    assert "is this the folder of an artefact?" in capsys.readouterr().err
    rows = {cells[0]: cells[1] for line in lines if len(cells := [cell.strip() for cell in line.split("|")[1:-1]]) == 4}
    layers = exported.module.config.num_hidden_layers
    expected = Counter(node.op_type for node in exported.graph.graph)
    assert int(rows["QKNormCachedAttention"]) == expected["QKNormCachedAttention"] == layers
    products = {name: int(nodes) for name, nodes in rows.items() if "QMatMul" in name}
    assert sum(products.values()) == sum(expected[op] for op in ("QMatMul", "SparseQMatMul", "BitmapQMatMul"))
    assert any(name.endswith(" up_proj") and nodes == layers for name, nodes in products.items())
