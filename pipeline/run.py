"""A whole run: the list of stages, in order, with what each depends on; those of single groups are in
:mod:`pipeline.stages.groups`."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from exporters.modules import install_packed
from exporters.packed_model import load_packed_model, save_packed_model
from fips_ort.native import library_path
from pipeline.compression.factors import install
from pipeline.estimate import estimate
from pipeline.plumbing.engines import Engine
from pipeline.plumbing.files import file_digest
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.run_folder import RunFolder
from pipeline.quantization.prepare import freeze
from pipeline.recipe.schema import Recipe
from pipeline.report.assembly import assemble_report
from pipeline.report.render import write_report
from pipeline.report.schema import Report
from pipeline.stages import deliver, quantize, results, train
from pipeline.stages.groups import calibrate, fit_on_ray, open_dense

ARTIFACT = "artifact"


def run(
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    *,
    fresh: bool = False,
    shared: Path | None = None,
    engine: Engine = "local",
) -> Report:
    """Everything from the recipe to the validated artefact in ``folder/artifact`` and the report beside it.

    ``engine`` ray: groups, which are independent until quantization, are factorized and fitted side by side on a Ray
    cluster whose machines see ``folder`` at the same path.

    Stages whose inputs have not changed are taken from ``folder/work``, or from ``shared``, where other runs have left
    what they have in common with this one (:mod:`pipeline.plumbing.run_folder`). Raises InputError for what the user
    can mend, StageError if the artefact does not keep what was promised.
    """
    estimate(recipe)  # refuses what cannot work before anything is computed or written
    run_folder = RunFolder(folder, progress, fresh=fresh, shared=shared)
    with run_folder.lock():
        return _run(recipe, run_folder, progress, engine)


def _run(recipe: Recipe, folder: RunFolder, progress: Progress, engine: Engine) -> Report:
    work = folder.work
    settings = recipe.model_dump(mode="json")
    evaluated: dict[str, Path] = {}
    errors: dict[str, dict[str, float]] = {}
    task, dense_key = open_dense(recipe, folder, progress)

    def evaluate(name: str, before: str, make_model: Callable[[], nn.Module]) -> None:
        def measure(out: Path) -> None:
            progress.say(f"  {name}: {task.measure(make_model().eval(), out, name, progress)}")

        folder.stage(f"evaluate/{name}", settings["evaluation"], before, measure)
        evaluated[name] = work / "evaluate" / name

    evaluate("dense", dense_key, lambda: task.model)
    calibrated = calibrate(task, dense_key, folder, progress)
    plan, calibration = calibrated.plan, calibrated.calibration

    # Factorization and fit, group by group.
    if engine == "ray":
        fit_on_ray(calibrated)
    keys = {group.name: calibrated.factorize(group) for group in plan.groups}
    unquantized = [work / "factorize" / group.name for group in plan.groups]
    restore = partial(results.restore_all, task.model, plan)
    key = json.dumps(keys)
    if recipe.compression.method == "fips":
        factorized = unquantized
        evaluate("factorized", key, lambda: install(task.model, restore(factorized)))
        errors["factorized"] = results.merge_errors(factorized)
    if recipe.fit is not None:
        keys = {group.name: calibrated.fit(group, keys[group.name]) for group in plan.groups}
        fitted = unquantized = [work / "fit" / group.name for group in plan.groups]
        key = json.dumps(keys)
        evaluate("fitted", key, lambda: install(task.model, restore(fitted)))
        errors["fitted"] = results.merge_errors(fitted)

    # Optional global error minimisation.
    if recipe.finetune is not None:
        compute = partial(train.finetune, task=task, plan=plan, before=unquantized)
        key = folder.stage(
            "finetune",
            settings["finetune"],
            key,
            partial(compute, calibration=calibration, progress=progress),
        )
        finetuned = unquantized = [work / "finetune" / group.name for group in plan.groups]
        evaluate("finetuned", key, lambda: install(task.model, restore(finetuned)))
        errors["finetuned"] = results.load_errors(work / "finetune")

    # Quantization-aware training, in a model whose other weights are as they will be stored.
    schemes = {name: value for name, value in settings["quantization"].items() if name != "training"}
    chosen_schemes = [own.quantization.projections.model_dump(mode="json") for own in plan.recipes.values()]
    rest_key = folder.stage(
        "qat/rest",
        [settings["calibration"], schemes["rest"], schemes["start"], recipe.seed],
        json.dumps([task.source_hash, task.data_hash]),
        partial(task.store_rest, progress=progress),
    )
    base = task.open_rest(work / "qat" / "rest")
    models = quantize.QuantizationInputs(task, base, plan, unquantized, calibration)
    rounded = last = work / "qat" / "0-start"
    key = folder.stage(
        "qat/0-start",
        [schemes, chosen_schemes, settings["export"]["accuracy_level"], rest_key],
        key,
        partial(quantize.quantize, inputs=models, progress=progress),
    )
    restore_quantized = partial(quantize.restore_quantized, models, rounded)
    if recipe.quantization.training:
        evaluate("rounded", key, lambda: install(base, restore_quantized(rounded)))
        errors["rounded"] = results.load_errors(rounded)
    for position, entry in enumerate(recipe.quantization.training):
        name = f"qat/{position + 1}-{entry.objective}"
        compute = partial(train.train_quantized, inputs=models, position=position, started=rounded, before=last)
        key = folder.stage(
            name,
            [settings["quantization"]["training"][position], recipe.seed],
            key,
            partial(compute, progress=progress),
        )
        last = work / name
    mlps, base = restore_quantized(last), quantize.open_base(models, last)
    fake_quantized = install(base, mlps).eval()
    evaluate("qat", key, lambda: fake_quantized)
    errors["qat"] = results.load_errors(last)

    # Integer codes, artefact, validation, speed, report.
    key = folder.stage("pack", [], key, lambda out: save_packed_model(freeze(mlps), out / "packed.safetensors"))
    packed = load_packed_model(work / "pack" / "packed.safetensors")
    stored = install_packed(base, packed, recipe.export.accuracy_level).eval()
    artifact = folder.folder / ARTIFACT
    key = folder.stage(
        "export",
        [settings, file_digest(library_path())],  # both go into the artefact
        key,
        lambda out: deliver.export(out, task, stored, packed, artifact),
        is_valid=lambda out: deliver.is_intact(out, artifact),
    )
    folder.stage(
        "validate",
        [settings["export"], settings["evaluation"]],
        key,
        lambda out: deliver.validate(out, task, fake_quantized, stored, artifact, evaluated["dense"], progress),
    )
    for backend in ("onnx_native", "onnx_portable"):
        if (work / "validate" / backend).is_dir():
            evaluated[backend] = work / "validate" / backend
    folder.stage("bench", [], key, lambda out: deliver.bench(out, task, artifact))
    segments = quantize.load_segments(rounded)
    report = assemble_report(task, plan, folder, artifact, packed, segments, mlps, evaluated, errors)
    write_report(report, folder.folder)
    return report
