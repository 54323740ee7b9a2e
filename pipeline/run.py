"""A whole run: the list of stages, in order, with what each depends on."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import nn

from exporters.modules import install_packed
from exporters.packed_model import load_packed_model, save_packed_model
from fips_ort.native import library_path
from pipeline import deliver, stages
from pipeline.compress import install
from pipeline.data import load_data
from pipeline.estimate import estimate
from pipeline.evaluate import Quality, check_samples
from pipeline.files import file_digest
from pipeline.models.adapters import find_mlps
from pipeline.models.loading import load_preprocessing
from pipeline.plan import make_plan
from pipeline.progress import Progress
from pipeline.quantize import freeze
from pipeline.recipe import PretrainedModel, Recipe
from pipeline.report.assembly import assemble_report
from pipeline.report.render import write_report
from pipeline.report.schema import Report
from pipeline.run_folder import RunFolder

ARTIFACT = "artifact"


def run(recipe: Recipe, folder: Path, progress: Progress, *, fresh: bool = False) -> Report:
    """Everything from the recipe to the validated artefact in ``folder/artifact`` and the report beside it.

    Stages whose inputs have not changed are taken from ``folder/work``. Raises InputError for what the user can
    mend, StageError if the artefact does not keep what was promised.
    """
    estimate(recipe)  # refuses what cannot work before anything is computed or written
    run_folder = RunFolder(folder, progress, fresh=fresh)
    with run_folder.lock():
        return _run(recipe, run_folder, progress)


def _run(recipe: Recipe, folder: RunFolder, progress: Progress) -> Report:
    work = folder.work
    settings = recipe.model_dump(mode="json")
    quality: dict[str, Quality] = {}
    errors: dict[str, dict[str, float]] = {}

    # The dense model and its data.
    preprocessing = load_preprocessing(recipe.model, recipe.data)
    # A pretrained model may come with a large data set: only what the run draws is read and hashed.
    limited = isinstance(recipe.model, PretrainedModel)
    limits = (recipe.calibration.samples, recipe.evaluation.samples) if limited else (None, None)
    data = load_data(recipe.data, preprocessing, recipe.seed, *limits)
    check_samples(data.test, recipe.evaluation.samples)
    key = folder.stage(
        "model",
        [settings["model"], recipe.seed, data.hash],
        "",
        partial(stages.train_dense, recipe=recipe, preprocessing=preprocessing, data=data, progress=progress),
    )
    loaded = stages.open_dense(work / "model", recipe, preprocessing, data)
    sites = find_mlps(loaded.model)
    plan = make_plan(recipe, sites)
    dense = deliver.Dense(loaded.model, loaded.image_processor, loaded.image_size, sites, plan, data)
    key = json.dumps([loaded.source_hash, data.hash, key])

    def evaluate(name: str, before: str, make_model: Callable[[], nn.Module]) -> None:
        measure = partial(stages.evaluate_model, name=name, make_model=make_model, recipe=recipe, data=data)
        folder.stage(f"evaluate/{name}", settings["evaluation"], before, partial(measure, progress=progress))
        quality[name] = stages.load_quality(work / "evaluate" / name)

    evaluate("dense", key, lambda: dense.model)

    # Calibration, factorization and fit, group by group.
    calibration = work / "calibrate"
    calibrated = folder.stage(
        "calibrate",
        [settings["calibration"], [site.path for group in plan.groups for site in group.sites], recipe.seed],
        key,
        partial(stages.calibrate, recipe=recipe, dense=dense.model, plan=plan, data=data, progress=progress),
    )
    keys = {}
    for group in plan.groups:
        keys[group.name] = folder.stage(
            f"factorize/{group.name}",
            [settings["compression"], asdict(group)],
            calibrated,
            partial(stages.factorize, recipe=recipe, dense=dense.model, group=group, calibration=calibration),
        )
    factorized = [work / "factorize" / group.name for group in plan.groups]
    restore = partial(stages.restore_all, recipe, dense.model, plan)
    evaluate("factorized", json.dumps(keys), lambda: install(dense.model, restore(factorized)))
    errors["factorized"] = stages.merge_errors(factorized)
    for group, before in zip(plan.groups, factorized, strict=True):
        compute = partial(stages.fit, recipe=recipe, dense=dense.model, group=group, before=before)
        keys[group.name] = folder.stage(
            f"fit/{group.name}",
            settings["fit"],
            keys[group.name],
            partial(compute, calibration=calibration, progress=progress),
        )
    fitted = [work / "fit" / group.name for group in plan.groups]
    key = json.dumps(keys)
    evaluate("fitted", key, lambda: install(dense.model, restore(fitted)))
    errors["fitted"] = stages.merge_errors(fitted)

    # Optional global error minimisation.
    unquantized = fitted
    if recipe.finetune is not None:
        compute = partial(stages.finetune, recipe=recipe, dense=dense.model, plan=plan, before=fitted)
        key = folder.stage(
            "finetune",
            settings["finetune"],
            key,
            partial(compute, calibration=calibration, data=data, progress=progress),
        )
        unquantized = [work / "finetune" / group.name for group in plan.groups]
        evaluate("finetuned", key, lambda: install(dense.model, restore(unquantized)))
        errors["finetuned"] = stages.load_errors(work / "finetune")

    # Quantization-aware training, in a model whose other weights are as they will be stored.
    base = stages.store_rest(recipe, dense.model, sites, dense.image_size)
    segments = stages.segments_of_groups(recipe, dense.model, plan, unquantized)
    models = stages.QuantizationInputs(recipe, dense.model, base, plan, unquantized, calibration)
    schemes = {name: value for name, value in settings["quantization"].items() if name != "training"}
    last = work / "qat" / "0-scales"
    key = folder.stage(
        "qat/0-scales",
        [schemes, settings["export"]["accuracy_level"]],
        key,
        partial(stages.quantize, inputs=models),
    )
    for position, entry in enumerate(recipe.quantization.training):
        name = f"qat/{position + 1}-{entry.objective}"
        compute = partial(stages.train_quantized, inputs=models, position=position, before=last)
        key = folder.stage(
            name,
            [settings["quantization"]["training"][position], recipe.seed],
            key,
            partial(compute, data=data, progress=progress),
        )
        last = work / name
    mlps = stages.restore_quantized(models, last)
    fake_quantized = install(base, mlps).eval()
    evaluate("qat", key, lambda: fake_quantized)
    errors["qat"] = stages.load_errors(last)

    # Integer codes, artefact, validation, speed, report.
    key = folder.stage("pack", [], key, lambda out: save_packed_model(freeze(mlps), out / "packed.safetensors"))
    packed = load_packed_model(work / "pack" / "packed.safetensors")
    stored = install_packed(base, packed, recipe.export.accuracy_level).eval()
    artifact = folder.folder / ARTIFACT
    key = folder.stage(
        "export",
        [settings, file_digest(library_path())],  # both go into the artefact
        key,
        lambda out: deliver.export(out, recipe, dense, stored, packed, artifact),
        is_valid=lambda out: deliver.is_intact(out, artifact),
    )
    folder.stage(
        "validate",
        [settings["export"], settings["evaluation"]],
        key,
        lambda out: deliver.validate(out, recipe, dense, fake_quantized, stored, artifact, progress),
    )
    for backend in ("onnx_native", "onnx_portable"):
        quality[backend] = stages.load_quality(work / "validate" / backend)
    folder.stage("bench", [], key, lambda out: deliver.bench(out, dense, artifact))
    report = assemble_report(recipe, folder, artifact, dense, packed, segments, mlps, quality, errors)
    write_report(report, folder.folder)
    return report
