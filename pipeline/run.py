"""A whole run as the list of its stages, which are the steps of the method.

With X and Y what the MLPs of the dense model read and write, W the MLP matrices of a group of blocks side by side, U
the basis that they share and V their projections (FiPS, arXiv 2411.09816, section 3):

| stage               | reads                  | leaves                                                                |
| ------------------- | ---------------------- | --------------------------------------------------------------------- |
| vocabulary          | dense model, text      | how often it expects each token, where a vocabulary is cut to a size  |
| model               | the recipe             | the dense model, where it is made in the run                          |
| calibrate           | dense model            | X and Y of every block                                                |
| sensitivities       | dense model, X         | what each choice of an allocation takes and costs, where there is one |
| allocate (optional) | these measurements     | rank, sparsity and bits of every group, bits of what lies outside     |
| factorize/GROUP     | W, X                   | U, V with W ≈ U V                                                     |
| fit/GROUP           | U, V, X, Y             | U, V that minimise the error of MLP(X; U, V) to Y, V becoming sparse  |
| finetune (optional) | U, V                   | U, V that minimise the loss of the whole model                        |
| qat/rest            | dense model            | codes of the weights outside the MLPs, where these take long to find  |
| qat/0-start         | U, V, X, Y             | scales s and integer codes q, so that U ≈ s q, V ≈ s q                |
| qat/N-OBJECTIVE     | the step before, X, Y  | scales and codes, trained by block (local) or in the whole model      |
| pack                | the last step          | integer codes, packed                                                 |
| export              | packed model           | the artefact                                                          |
| validate            | the artefact           | that all ways to run it agree; its quality                            |
| bench               | the artefact           | speed and memory                                                      |

After each step that changes the model, a stage ``evaluate/STEP`` measures its quality on the test samples. Stages of
single groups are in :mod:`pipeline.stages.groups`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from exporters.modules import install_packed
from exporters.packed_model import load_packed_model, save_packed_model
from fips_ort.errors import ArtifactError
from fips_ort.manifest import sha256
from fips_ort.native import library_path
from pipeline.compression.factors import install
from pipeline.estimate import estimate
from pipeline.evaluation.measurements import TrainedStage
from pipeline.plumbing.engines import Engine
from pipeline.plumbing.errors import InputError, StageError, UnforeseenError
from pipeline.plumbing.files import write_aside
from pipeline.plumbing.ownership import check_mine, claim
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.run_folder import RunFolder, StageResult
from pipeline.quantization.freeze import freeze
from pipeline.quantization.rest_layers import bits_as_json
from pipeline.recipe.schema import Recipe
from pipeline.report.assembly import assemble_report
from pipeline.report.render import REPORT_FILES, remove_report, write_report
from pipeline.report.schema import Report
from pipeline.stages import deliver
from pipeline.stages.evaluate import Evaluations
from pipeline.stages.groups import Calibrated, calibrate_and_plan, compute_on_ray, open_dense
from pipeline.stages.quantize import QuantizationInputs, load_segments, open_base, quantize, restore_quantized
from pipeline.stages.results import SavedFactors
from pipeline.stages.train import finetune, train_quantized

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
    """Run everything from the recipe to the validated artefact in ``folder/artifact`` and the report beside it.

    ``engine`` ray: groups, which are independent until quantization, are factorized and fitted side by side on a Ray
    cluster whose machines see ``folder`` at the same path.

    Stages whose inputs have not changed are taken from ``folder/work``, or from ``shared``, where other runs have left
    what they have in common with this one (:mod:`pipeline.plumbing.run_folder`). Raises InputError for what the user
    can mend, StageError if the artefact does not keep what was promised, UnforeseenError for anything else.
    """
    run_folder = RunFolder(folder, progress, fresh=fresh, shared=shared)
    # Refuse what is in the way and what cannot work before anything is computed or written.
    run_folder.check()
    check_mine(folder, f"--out {folder}", REPORT_FILES)
    known = deliver.known_files(run_folder.work, folder / ARTIFACT)
    for note in estimate(recipe, fetch=True).notes:
        progress.say(f"note: {note}")
    with run_folder.lock():
        claim(folder, f"--out {folder}", REPORT_FILES)
        try:
            return _run(recipe, run_folder, progress, engine, known)
        except (InputError, StageError, ArtifactError, FloatingPointError):
            raise
        except Exception as error:
            raise UnforeseenError(run_folder.computing, run_folder.work) from error


def _run(recipe: Recipe, folder: RunFolder, progress: Progress, engine: Engine, known: Collection[str]) -> Report:
    task, dense = open_dense(recipe, folder, progress)
    evaluations = Evaluations(task, folder, progress)
    evaluations.evaluate_dense(dense)

    # X and Y of every block; groups, their ranks and bits.
    calibrated = calibrate_and_plan(task, dense, folder, progress)
    if engine == "ray":
        compute_on_ray(calibrated)
    # W ≈ U V, then MLP(X; U, V) ≈ Y.
    unquantized = _compress(calibrated, evaluations)
    # U ≈ s q and V ≈ s q, then trained so.
    quantized = _quantize(calibrated, dense, unquantized, evaluations)
    # q as bytes of an artefact, which is proved right and measured.
    return _deliver(calibrated, quantized, evaluations, known)


def _compress(calibrated: Calibrated, evaluations: Evaluations) -> SavedFactors:
    """Factorize, fit and fine-tune as far as the recipe says; returns the factors that quantization starts from."""
    recipe, task, plan = calibrated.recipe, calibrated.task, calibrated.plan

    def evaluate(name: TrainedStage, factors: SavedFactors) -> None:
        evaluations.evaluate(
            name, factors.results, lambda: install(task.model, factors.restore(task.model, plan)), factors.errors()
        )

    factors = calibrated.factorize()
    if recipe.compression.method == "fips":
        evaluate("factorized", factors)
    if recipe.fit is not None:
        factors = calibrated.fit(factors)
        evaluate("fitted", factors)
    if recipe.finetune is not None:
        finetuned = calibrated.folder.stage(
            "finetune",
            recipe.finetune.model_dump(mode="json"),
            factors.results,
            partial(
                finetune,
                task=task,
                plan=plan,
                before=factors,
                calibration=calibrated.activations.folder,
                progress=calibrated.progress,
            ),
        )
        factors = SavedFactors.of_stage(finetuned, plan)
        evaluate("finetuned", factors)
    return factors


@dataclass(frozen=True)
class _Quantized:
    """What quantization leaves: what all its steps start from, the first step, and the last."""

    inputs: QuantizationInputs
    start: StageResult
    trained: StageResult


def _quantize(
    calibrated: Calibrated, dense: StageResult, unquantized: SavedFactors, evaluations: Evaluations
) -> _Quantized:
    """Start quantization and train it, in a model whose weights outside the MLPs are as they will be stored."""
    recipe, task, plan, folder = calibrated.recipe, calibrated.task, calibrated.plan, calibrated.folder
    settings = recipe.quantization.model_dump(mode="json")
    training = settings.pop("training")
    rest = folder.stage(
        "qat/rest",
        [
            recipe.calibration.model_dump(mode="json"),
            settings["rest"],
            bits_as_json(calibrated.rest_bits),
            settings["start"],
            recipe.seed,
        ],
        [dense],
        partial(task.store_rest, bits=calibrated.rest_bits, progress=calibrated.progress),
    )
    inputs = QuantizationInputs(task, task.open_rest(rest.folder), plan, unquantized, calibrated.activations.folder)
    chosen = [own.quantization.projections.model_dump(mode="json") for own in plan.recipes.values()]
    start = folder.stage(
        "qat/0-start",
        [settings, chosen, recipe.export.accuracy_level],
        [*unquantized.results, rest],
        partial(quantize, inputs=inputs, progress=calibrated.progress),
    )
    if training:
        evaluations.evaluate(
            "rounded",
            [start],
            lambda: install(inputs.base, restore_quantized(inputs, start.folder, start.folder)),
            SavedFactors.of_stage(start, plan).errors(),
        )
    last = start
    for position, entry in enumerate(training):
        last = folder.stage(
            f"qat/{position + 1}-{entry['objective']}",
            [entry, recipe.seed],
            [last],
            partial(
                train_quantized,
                inputs=inputs,
                position=position,
                started=start.folder,
                before=last.folder,
                progress=calibrated.progress,
            ),
        )
    return _Quantized(inputs, start, last)


def _deliver(
    calibrated: Calibrated, quantized: _Quantized, evaluations: Evaluations, known: Collection[str]
) -> Report:
    """Freeze the factors to integer codes, export, validate and measure the artefact, and write the report.

    ``known``: files of the artefact that may be there (:func:`deliver.known_files`)."""
    recipe, task, plan, folder = calibrated.recipe, calibrated.task, calibrated.plan, calibrated.folder
    trained = quantized.trained
    mlps = restore_quantized(quantized.inputs, quantized.start.folder, trained.folder)
    base = open_base(quantized.inputs, trained.folder)
    fake_quantized = install(base, mlps).eval()
    errors = SavedFactors.of_stage(trained, plan).errors()
    evaluations.evaluate("qat", [trained], lambda: fake_quantized, errors)

    packing = folder.stage(
        "pack",
        [],
        [trained],
        lambda out: write_aside(out / "packed.safetensors", partial(save_packed_model, freeze(mlps))),
    )
    packed = load_packed_model(packing.folder / "packed.safetensors")
    stored = install_packed(base, packed, recipe.export.accuracy_level).eval()
    artifact = folder.folder / ARTIFACT

    def export(out: Path) -> None:
        deliver.export(out, folder.work, task, stored, packed, artifact, known, calibrated.progress)
        remove_report(folder.folder)  # one of an earlier run would now speak of another artefact

    exported = folder.stage(
        "export",
        [recipe.model_dump(mode="json"), sha256(library_path())],  # both go into the artefact
        [packing],
        export,
        is_valid=lambda out: deliver.is_intact(out, artifact),
    )
    validated = folder.stage(
        "validate",
        [recipe.export.model_dump(mode="json"), recipe.evaluation.model_dump(mode="json")],
        [exported],
        partial(
            deliver.validate,
            task=task,
            fake_quantized=fake_quantized,
            stored=stored,
            artifact=artifact,
            dense_quality=evaluations.folders["dense"],
            progress=calibrated.progress,
        ),
    )
    folder.stage("bench", [], [exported], lambda out: deliver.bench(out, task, artifact, calibrated.progress))
    report = assemble_report(
        task,
        plan,
        folder,
        artifact=artifact,
        packed=packed,
        segments=load_segments(quantized.start.folder),
        mlps=mlps,
        evaluated=evaluations.folders | deliver.quality_folders(validated.folder, task),
        errors=evaluations.errors,
    )
    write_report(report, folder.folder)
    return report
