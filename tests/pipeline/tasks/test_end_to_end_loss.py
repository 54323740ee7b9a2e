"""Losses of whole models: what they are equal to, and what objective and precision change."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rest_samples import with_packed_tables
from run_samples import TINY, tiny_recipe
from task_samples import open_language_task
from torch import Tensor, nn

from exporters.modules import PackedOutput
from pipeline.compression.factors import factorize_group, install
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.training_loop import train
from pipeline.recipe.plan import make_plan
from pipeline.recipe.schema import EndToEnd, Tier
from pipeline.tasks import make_task
from pipeline.tasks.base import Task
from pipeline.tasks.causal_lm import CausalLMTask
from pipeline.tasks.image_classification import ImageClassificationTask
from qat import losses


def config(**changes: Any) -> EndToEnd:
    return EndToEnd(**{"objective": "task", "steps": 1, "batch_size": 4, **changes})


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True))


def trained_factors(task: Task, wanted: EndToEnd) -> nn.Module:
    """The model with its MLPs factorized, moved far away from where they were, and trained as ``wanted`` says."""
    mlps = [
        mlp
        for group in make_plan(task.recipe, task.sites).groups
        for mlp in factorize_group(task.model, group, calibration=None, masked=False, seed=0)[0]
    ]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for mlp in mlps:
            for projection in mlp.projections.parameters():
                projection.add_(3 * torch.randn(projection.shape, generator=generator))
    model = install(task.model, mlps)
    if wanted.steps > 1:
        train(
            nn.ModuleList(mlps),
            task.end_to_end_loss(model, wanted, 0),
            steps=wanted.steps,
            learning_rate=wanted.learning_rate,
            weight_decay=wanted.weight_decay,
            progress=Progress(),
            label="train",
        )
    return model.eval()


# --- language models -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language_task(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CausalLMTask]:
    """The open task of a tiny model of a kind, whose two blocks are one group. Not to be changed."""
    opened: dict[str, CausalLMTask] = {}

    def open_task(kind: str) -> CausalLMTask:
        if kind not in opened:
            compression = {"groups": 2, "budget": 0.6, "pattern": "dense"}
            folder = tmp_path_factory.mktemp(kind)
            opened[kind] = open_language_task(kind, folder, compression=compression, fit=None)
        return opened[kind]

    return open_task


def windows(task: CausalLMTask) -> Tensor:
    """All training windows, int64 [n, context]."""
    return task.data.train.batch(range(task.train_samples))


def own_loss(model: Any, input_ids: Tensor) -> Tensor:
    """What transformers computes."""
    loss: Tensor = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    return loss


def changed(model: nn.Module) -> Any:
    """A copy with other blocks, trainable ones."""
    copied: Any = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in copied.model.layers.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    copied.model.layers.requires_grad_(True)
    return copied


@pytest.mark.parametrize("chunk", [1000, 1 << 24])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "llama", "qwen2"])
def test_objective_task_is_the_loss_of_transformers(
    language_task: Callable[[str], CausalLMTask], monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int
) -> None:
    """Models have soft caps (Gemma 2), tied tables and others; chunks are of 3 tokens, or all."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    task = language_task(kind)
    model = changed(task.model)
    loss = task.end_to_end_loss(model, config(batch_size=task.train_samples), 0)(0)
    expected = own_loss(model, windows(task))
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    for gradient, own in zip(gradients(loss, model.model.layers), gradients(expected, model.model.layers), strict=True):
        torch.testing.assert_close(gradient, own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["gemma3", "llama"])
def test_objective_task_reads_quantized_output_layers(language_task: Callable[[str], CausalLMTask], kind: str) -> None:
    task = language_task(kind)
    model: Any = with_packed_tables(task.model, [Tier(bits=4, tokens=50), Tier(bits=2)], 16)
    assert isinstance(model.get_output_embeddings(), PackedOutput)
    with torch.no_grad():
        loss = task.end_to_end_loss(model, config(batch_size=task.train_samples), 0)(0)
        torch.testing.assert_close(loss, own_loss(model, windows(task)), rtol=2e-6, atol=0)
        assert abs(float(loss) - float(own_loss(task.model, windows(task)))) > 1e-4


@pytest.mark.parametrize("objective", ["task", "distill"])
def test_steps_go_through_all_windows(language_task: Callable[[str], CausalLMTask], objective: str) -> None:
    task = language_task("gemma3")
    count = task.train_samples
    assert count > 20
    with torch.no_grad():
        model = changed(task.model)
        whole = float(task.end_to_end_loss(model, config(objective=objective, batch_size=count), 0)(0))
        single = task.end_to_end_loss(model, config(objective=objective, batch_size=1), 0)
        steps = [float(single(step)) for step in range(2 * count)]
    assert sum(steps[:count]) / count == pytest.approx(whole, rel=1e-5)
    assert steps[count:] == steps[:count]
    assert len(set(steps[:count])) > 0.9 * count


def test_objectives_of_language_models_are_two(language_task: Callable[[str], CausalLMTask]) -> None:
    """The dense model does not diverge from itself, but does not predict every token."""
    task = language_task("gemma3")
    with torch.no_grad():
        assert abs(float(task.end_to_end_loss(task.model, config(objective="distill"), 0)(0))) < 1e-5
        assert float(task.end_to_end_loss(task.model, config(), 0)(0)) > 1.0


@pytest.mark.parametrize("objective", ["task", "distill"])
def test_precision_of_language_models(language_task: Callable[[str], CausalLMTask], objective: str) -> None:
    task = language_task("gemma3")
    model = changed(task.model)
    exact, rounded = (
        task.end_to_end_loss(model, config(objective=objective, precision=precision), 0)(0)
        for precision in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    assert rounded.item() != exact.item()
    assert rounded.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(rounded, model.model.layers))


def test_training_by_the_task_lowers_cross_entropy(language_task: Callable[[str], CausalLMTask]) -> None:
    """A model of random weights learns from the text what its own distribution does not know."""
    task = language_task("llama")
    found = {}
    for name, changes in {
        "start": {"steps": 1},
        "task": {"steps": 30},
        "task in bfloat16": {"steps": 30, "precision": "bfloat16"},
        "distill": {"steps": 30, "objective": "distill"},
    }.items():
        model = trained_factors(task, config(learning_rate=3e-2, batch_size=8, **changes))
        with torch.no_grad():
            found[name] = float(own_loss(model, windows(task)))
    assert found["task"] < found["start"] - 0.5
    assert found["task in bfloat16"] == pytest.approx(found["task"], abs=0.1)
    assert found["task"] < found["distill"] - 0.5


# --- image classifiers -----------------------------------------------------------------------------------------

_SMALL = {"image_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "vit": {**_SMALL, "patch_size": 4, "intermediate_size": 64},
    "deit": {**_SMALL, "patch_size": 4, "intermediate_size": 64},
    "dinov2": {**_SMALL, "patch_size": 4, "mlp_ratio": 2},
    "swin": {
        "image_size": 8, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def image_task(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ImageClassificationTask]:
    """The open task of a tiny classifier of digits that has learned a little. Not to be changed."""
    opened: dict[str, ImageClassificationTask] = {}

    def open_task(kind: str) -> ImageClassificationTask:
        if kind not in opened:
            model = {**TINY["model"], "model_type": kind, "config": CLASSIFIERS[kind]}
            compression = {"groups": [[0, 1]], "budget": 0.6, "pattern": "dense"}
            task = make_task(tiny_recipe(model=model, compression=compression))
            assert isinstance(task, ImageClassificationTask)
            folder = tmp_path_factory.mktemp(kind)
            task.make_dense(folder, Progress())
            task.open_dense(folder)
            opened[kind] = task
        return opened[kind]

    return open_task


def whole_loss(task: ImageClassificationTask, model: nn.Module) -> float:
    """Cross-entropy on all training images."""
    pixel_values, labels = task.data.train.batch(range(task.train_samples))
    with torch.no_grad():
        return float(F.cross_entropy(task.predictor(model)(pixel_values), labels))


@pytest.mark.parametrize("objective", ["task", "distill"])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_precision_of_image_classifiers(
    image_task: Callable[[str], ImageClassificationTask], kind: str, objective: str
) -> None:
    task = image_task(kind)
    model = copy.deepcopy(task.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    exact, rounded = (
        task.end_to_end_loss(model, config(objective=objective, precision=precision, batch_size=64), 0)(0)
        for precision in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    assert rounded.item() != exact.item()
    assert rounded.item() == pytest.approx(exact.item(), rel=0.1)
    gradient, expected = (
        torch.cat([part.flatten() for part in gradients(loss, model)]) for loss in (rounded, exact)
    )
    assert gradient.dtype == torch.float32
    assert float(F.cosine_similarity(gradient, expected, dim=0)) > 0.95


def test_objective_task_is_cross_entropy_with_the_labels(
    image_task: Callable[[str], ImageClassificationTask],
) -> None:
    task = image_task("vit")
    with torch.no_grad():
        loss = float(task.end_to_end_loss(task.model, config(batch_size=task.train_samples), 0)(0))
        distilled = float(task.end_to_end_loss(task.model, config(objective="distill"), 0)(0))
    assert loss == pytest.approx(whole_loss(task, task.model), rel=1e-5)
    assert abs(distilled) < 1e-6


def test_both_models_are_computed_in_bfloat16(image_task: Callable[[str], ImageClassificationTask]) -> None:
    """The dense model would diverge from itself if one were not."""
    task = image_task("vit")
    with torch.no_grad():
        loss = task.end_to_end_loss(task.model, config(objective="distill", precision="bfloat16"), 0)(0)
    assert abs(float(loss)) < 1e-6


@pytest.mark.parametrize("objective", ["task", "distill"])
def test_training_of_classifiers_works_in_bfloat16(
    image_task: Callable[[str], ImageClassificationTask], objective: str
) -> None:
    task = image_task("vit")
    found = {
        name: whole_loss(task, trained_factors(task, config(objective=objective, batch_size=64, **changes)))
        for name, changes in {
            "start": {"steps": 1},
            "float32": {"steps": 40, "learning_rate": 1e-2},
            "bfloat16": {"steps": 40, "learning_rate": 1e-2, "precision": "bfloat16"},
        }.items()
    }
    assert found["float32"] < 0.9 * found["start"]
    assert found["bfloat16"] < 0.9 * found["start"]
    assert found["bfloat16"] != found["float32"]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.1)
