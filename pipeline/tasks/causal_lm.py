"""Causal language models: perplexity, ONNX on onnxruntime-genai's model builder."""

import copy
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from exporters.artifact import Golden
from exporters.causal_lm import export_causal_lm
from exporters.genai_config import save_causal_lm_config
from exporters.packed_model import PackedModel
from exporters.packed_rest import load_packed_rest
from exporters.rest import install_rest, round_to_float16
from fips_ort.causal_lm import prefill_inputs
from fips_ort.memory import measure_memory
from pipeline.data.samples import check_samples_asked, check_train_samples
from pipeline.data.text import TextData, check_vocabulary, load_text_data
from pipeline.data.token_bytes import content_of
from pipeline.evaluation.measurements import (
    NATIVE,
    ArtifactMemory,
    Benchmark,
    PerplexityByFrequency,
    PerplexityByStage,
    Stage,
    TextDivergence,
    TextSamples,
    VocabularyCut,
)
from pipeline.evaluation.perplexity import (
    DenseReference,
    Perplexity,
    evaluate_dense,
    evaluate_perplexity,
    lazy_logits,
    load_perplexity,
    paired_difference,
    save_perplexity,
)
from pipeline.evaluation.text_speed import GENERATED_TOKENS, PROMPT_TOKENS, bench_causal_lm
from pipeline.models.adapters import find_mlps
from pipeline.models.causal_lm import (
    load_language_config,
    load_language_model,
    load_tokenizer,
    longest_text,
    notes_on,
)
from pipeline.models.causal_lm_parts import final_softcap, hidden_states, output_table
from pipeline.models.weights import check_float16
from pipeline.plumbing.errors import StageError
from pipeline.plumbing.progress import Progress
from pipeline.plumbing.training_loop import step_generator
from pipeline.quantization.rest_layers import rest_linears
from pipeline.quantization.rest_start import RestCalibration, RestMoments
from pipeline.recipe.plan import MLPSite, make_plan
from pipeline.recipe.schema import CausalLanguageModel, EndToEnd, LanguageModelSection, Recipe, TextDataSection
from pipeline.tasks.base import PACKED_REST, Dense, Form, Predict, Task, products_in
from pipeline.vocabulary.cut import CutVocabulary
from pipeline.vocabulary.cut_model import cut_model
from pipeline.vocabulary.frequency import expected_frequencies, frequency_order, windows_to_expect_from
from pipeline.vocabulary.kept import hardly_counted
from pipeline.vocabulary.of_recipe import cut_for, respelled_text
from pipeline.vocabulary.respelled import RespelledText
from qat.losses import Vocabulary, distillation_loss, next_token_loss

GOLDEN_TOKENS = 8
"""Tokens of the golden text. The artefact carries the logits of the last one, a megabyte at a vocabulary of 262,144."""
PARITY_TOKENS = 32
"""Tokens of the short text on which all forms must agree; the long one has as many more than the sliding window."""


class CausalLMTask(Task):
    """``recipe.model`` is a causal language model, ``recipe.data`` text; a sample is a window of token ids."""

    # Functions inlined and folded take gigabytes and minutes on whole texts; parity is checked on them all the same.
    evaluated_backends = ("native",)

    def __init__(
        self, recipe: Recipe, artifact: Path | None = None, expected: Callable[[TextData], Tensor] | None = None
    ) -> None:
        """``expected``: of the text's windows in the full vocabulary, the frequencies that a cut one is chosen by
        where counts are equal (:mod:`pipeline.vocabulary.frequency`)."""
        section, data = recipe.model, recipe.data
        assert isinstance(section, LanguageModelSection)
        assert isinstance(data, TextDataSection)
        self.section = section if artifact is None else CausalLanguageModel(source="causal_lm", path=str(artifact))
        self.tokenizer = load_tokenizer(self.section)
        self._is_artifact = artifact is not None
        train = 1 if artifact is not None else None
        self.data: TextData | RespelledText = load_text_data(
            data, self.tokenizer, recipe.seed, train, recipe.evaluation.samples
        )
        self._full_text, self._full_tokenizer = self.data, self.tokenizer
        self._vocabulary: CutVocabulary | None = None
        if artifact is not None:
            check_vocabulary(self.data, self.tokenizer, load_language_config(self.section).vocab_size)
        if artifact is None and recipe.vocabulary is not None:
            assert isinstance(self.data, TextData)
            found = None if expected is None or recipe.vocabulary.keep is None else expected(self.data)
            self._vocabulary = cut_for(recipe, self.tokenizer, self.data, found)
            self.tokenizer = self._vocabulary.tokenizer
            self.data = respelled_text(recipe, self._full_text, self._vocabulary)
        if artifact is None:
            check_train_samples(recipe, len(self.data.train))
        check_samples_asked("evaluation", recipe.evaluation.samples, "test", len(self.data.test))
        super().__init__(recipe, self.data.hash, len(self.data.train))

    # --- dense model ---

    def make_dense(self, folder: Path, progress: Progress) -> None:
        """Nothing to make: a language model is loaded from where it is."""

    def load_dense(self, folder: Path) -> Dense:
        loaded = load_language_model(self.section, self.tokenizer)
        whole, notes, rows = loaded.model, notes_on(self.section), len(output_table(loaded.model))
        check_vocabulary(self._full_text, self._full_tokenizer, rows)
        if self._vocabulary is None:
            return Dense(whole, find_mlps(whole), loaded.source_hash, notes)
        assert isinstance(self.data, RespelledText)
        model = cut_model(whole, self._vocabulary)
        return Dense(model, find_mlps(model), loaded.source_hash, (*notes, self.data.note), whole)

    def check_stored(self) -> None:
        compressed = {path for site in self._compressed_sites for path in site.linear_paths}
        plain = {path for site in self.sites for path in site.linear_paths}
        check_float16(self.model, self.recipe.quantization.rest, compressed, plain)

    @property
    def _compressed_sites(self) -> list[MLPSite]:
        return [site for group in make_plan(self.recipe, self.sites).groups for site in group.sites]

    # --- samples ---

    def training_batch(self, indices: Sequence[int]) -> Tensor:
        return self.data.train.batch(indices)

    def predictor(self, model: nn.Module) -> Predict:
        return lambda input_ids: model(input_ids=input_ids, use_cache=False).logits

    def run_dense(self, batch: Tensor) -> Tensor:
        return hidden_states(self.model, batch)

    def end_to_end_loss(self, model: nn.Module, config: EndToEnd, seed: int) -> Callable[[int], Tensor]:
        """The loss on windows that are drawn without replacement until all were. Objective ``task`` is the
        cross-entropy of the next token, over the whole vocabulary."""
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        table, softcap = output_table(model).to(dtype), final_softcap(model)
        order = torch.randperm(self.train_samples, generator=torch.Generator().manual_seed(seed))

        def drawn(step: int) -> list[int]:
            first = step * config.batch_size
            return [int(order[(first + i) % len(order)]) for i in range(config.batch_size)]

        def windows(step: int) -> Tensor:
            return self.training_batch(drawn(step))

        def states(of: nn.Module, input_ids: Tensor) -> Tensor:
            with products_in(config.precision):
                return hidden_states(of, input_ids)

        def task_loss(step: int) -> Tensor:
            input_ids = windows(step)
            hidden = states(model, input_ids)[:, :-1]  # nothing follows a window's last token
            return next_token_loss(hidden.flatten(0, 1), input_ids[:, 1:].flatten(), table, softcap)

        if config.objective == "task":
            return task_loss
        dense_table = output_table(self.model).to(dtype)
        vocabulary = Vocabulary.of(self._token_counts)

        def distillation(step: int) -> Tensor:
            input_ids = windows(step)
            with torch.no_grad():
                target = states(self.model, input_ids).flatten(0, 1)
            ids, offsets = vocabulary.sample(step_generator(seed, step))
            student = states(model, input_ids).flatten(0, 1)
            return distillation_loss(student, target, table[ids], dense_table[ids], offsets, softcap)

        def distillation_across(step: int) -> Tensor:
            """Distillation from the whole model, which reads the text in the full vocabulary. The rows of its output
            layer that are left make its distribution over the kept tokens. Of respelled tokens it says nothing: there
            the text itself teaches. As these occur as often as the text has them, both together have the minimum of
            the distribution in which each dropped token counts for the first piece of its new spelling."""
            assert isinstance(self.data, RespelledText)
            chosen = drawn(step)
            lesson = self.data.lesson(chosen)
            with torch.no_grad():
                target = states(self.dense.whole, lesson.input_ids).flatten(0, 1)[lesson.teacher_at]
            ids, offsets = vocabulary.sample(step_generator(seed, step))
            student = states(model, self.training_batch(chosen)).flatten(0, 1)
            taught = student[lesson.student_at]
            loss = len(taught) * distillation_loss(taught, target, table[ids], dense_table[ids], offsets, softcap)
            if len(lesson.alone_at):
                alone = student[lesson.alone_at]
                loss = loss + len(alone) * next_token_loss(alone, lesson.alone_targets, table, softcap)
            return loss / (len(taught) + len(lesson.alone_at))

        return distillation if self._vocabulary is None else distillation_across

    # --- quality ---

    def measure(
        self, form: Form, folder: Path, label: str, progress: Progress, *, against_dense: Path | None = None
    ) -> str:
        config = self.recipe.evaluation
        logits_of = lazy_logits(form) if isinstance(form, nn.Module) else _session_logits(form)
        reference = None if against_dense is None else DenseReference(against_dense, self.model)
        with progress.counter(f"evaluate {label}", self._evaluated_windows) as report:
            quality = evaluate_perplexity(
                logits_of, self.data.test, config.batch_size, config.stride, report, reference
            )
        said = _save(quality, folder, label)
        if self._is_artifact and self.recipe.vocabulary is not None:
            said += "; tokens are those of its own, cut vocabulary: compare bits per byte, not perplexities"
        return said

    def measure_dense(self, folder: Path, progress: Progress) -> str:
        config = self.recipe.evaluation
        with progress.counter("evaluate dense", self._evaluated_windows) as report:
            quality = evaluate_dense(
                self.dense.whole, self._full_text.test, config.batch_size, config.stride, folder, report
            )
        return _save(quality, folder, "dense")

    @property
    def _evaluated_windows(self) -> int:
        return len(self.data.test.strided(self.recipe.evaluation.stride))

    def describe_quality(self, folders: dict[Stage, Path]) -> tuple[PerplexityByStage, TextDivergence]:
        results = {stage: load_perplexity(folder) for stage, folder in folders.items()}
        dense = results["dense"]
        quality = PerplexityByStage(
            metric="perplexity",
            unit="perplexity",
            tokens=dense.tokens,
            context=dense.context,
            stride=dense.stride,
            windows=len(dense.window_nll),
            bytes=dense.bytes,
            bits_per_byte={stage: result.bits_per_byte for stage, result in results.items()},
            frequent_tokens=dense.frequent_tokens,
            by_frequency=_by_frequency(results),
            standard_error={stage: result.perplexity_error for stage, result in results.items()},
            difference_to_dense={
                stage: paired_difference(result, dense) for stage, result in results.items() if stage != "dense"
            },
            **{stage: result.perplexity for stage, result in results.items()},
        )
        divergence = results["onnx_native"].divergence
        assert divergence is not None
        return quality, divergence

    def describe_data(self) -> TextSamples:
        context = self.data.train.context
        calibration = self.recipe.calibration.samples or self.train_samples
        return TextSamples(
            source=self.recipe.data.source,
            hash=self.data_hash,
            train_samples=self.train_samples,
            calibration_samples=calibration,
            test_samples=len(self.data.test),
            context=context,
            train_tokens=self.train_samples * context,
            calibration_tokens=calibration * context,
            test_tokens=len(self.data.test) * context,
            vocabulary=self._describe_cut(),
        )

    def _describe_cut(self) -> VocabularyCut | None:
        if self._vocabulary is None:
            return None
        assert isinstance(self.data, RespelledText)
        text = self.data
        return VocabularyCut(
            tokens=text.rows, kept=text.kept, respelled=text.respelled, respelled_in_test=text.respelled_in_test
        )

    # --- delivery ---

    def rest_moments(self, paths: Collection[str]) -> RestMoments | None:
        if self.recipe.quantization.start != "gptq":
            return None
        samples, size = self.calibration_samples(), self.recipe.calibration.batch_size
        calibration = RestCalibration(
            lambda input_ids: self.run_dense(input_ids).flatten(0, 1),
            (self.training_batch(samples[first : first + size]) for first in range(0, len(samples), size)),
        )
        linears = rest_linears(self.model, self.sites)
        return calibration.moments({path: linear for path, linear in linears.items() if path in paths})

    @cached_property
    def token_order(self) -> Tensor:
        windows = windows_to_expect_from(self.data.train, self.recipe.seed)
        counts = self._token_counts
        # No text has the tokens that begin one or divide a chat, and yet all that follows hangs on them: with 2 bits
        # for the row of <bos>, Gemma 3 270M's perplexity is 2.4 times that of the dense model.
        leading = hardly_counted(content_of(self.tokenizer), len(counts), self.tokenizer.all_special_ids)
        return frequency_order(counts, expected_frequencies(self.model, windows), leading)

    @property
    def _token_counts(self) -> Tensor:
        return torch.bincount(self.data.train.tokens, minlength=len(output_table(self.model)))

    def open_rest(self, folder: Path) -> nn.Module:
        # Copies of large models are dear. The compressed MLPs are about to be replaced and come in again at the end;
        # all else is shared with the dense model until something takes its place.
        compressed = {site.path: self.model.get_submodule(site.path) for site in self._compressed_sites}
        memo: dict[int, object] = {id(mlp): nn.Identity() for mlp in compressed.values()}
        memo |= {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        base = copy.deepcopy(self.model, memo)
        base = install_rest(base, load_packed_rest(folder / PACKED_REST), self.recipe.export.accuracy_level)
        if self.recipe.quantization.rest.weights == "float16":
            base = round_to_float16(base)
        for name, mlp in compressed.items():
            base.set_submodule(name, mlp)
        return base

    def parity_batches(self) -> list[Tensor]:
        """Make two batches of one text each: a short one, and one past the sliding window, if the model has one."""
        context = self.data.test.context
        window = getattr(self.model.config, "sliding_window", None) or context
        stream = self.data.test.batch(range(min(len(self.data.test), 1 + window // context + 1))).flatten()
        longest = min(window + PARITY_TOKENS, longest_text(self.model.config))
        return [stream[None, : PARITY_TOKENS], stream[None, : longest]]

    def export_graph(self, stored: nn.Module, packed: PackedModel) -> ir.Model:
        return export_causal_lm(stored, longest_text(self.model.config))

    def golden(self, predict: Predict, tolerance: float) -> Golden:
        input_ids = self.data.test.batch([0])[:, :GOLDEN_TOKENS]
        with torch.inference_mode():
            logits = predict(input_ids)[:, -1:]
        return Golden({"input_ids": input_ids.numpy()}, {"logits": logits.numpy()}, tolerance)

    def save_config(self, folder: Path) -> None:
        save_causal_lm_config(folder, self.model, self.tokenizer, longest_text(self.model.config))

    def bench(self, artifact: Path) -> Benchmark:
        threads = os.cpu_count() or 1
        longest = min(PROMPT_TOKENS, longest_text(self.model.config) - GENERATED_TOKENS)
        # Where the vocabulary was cut, these ids are another text to the whole model, in which as much is computed.
        prompt = self.data.test.batch([0])[0, :longest].tolist()
        speed, loads = bench_causal_lm(artifact, self.dense.whole, self._full_tokenizer, prompt, threads)
        memory = ArtifactMemory(
            **measure_memory(artifact),
            load_rss_by_backend={name: load.load_rss_bytes for name, load in loads.items()},
            run_rss_by_backend={name: load.run_rss_bytes for name, load in loads.items()},
            base_rss_bytes=loads[NATIVE].base_rss_bytes,
        )
        return Benchmark(speed=speed, memory=memory)


def _save(quality: Perplexity, folder: Path, label: str) -> str:
    """Save the quality of the form ``label`` and describe it. Raises StageError if no number holds its perplexity."""
    if not math.isfinite(quality.perplexity):
        raise StageError(
            f"{label}: {quality.nll:.0f} nats a token are a perplexity that no number holds: the model is broken, or "
            "training diverged (try a lower learning_rate, or more bits)"
        )
    save_perplexity(quality, folder)
    return _describe(quality)


def _by_frequency(results: Mapping[Stage, Perplexity]) -> dict[Stage, PerplexityByFrequency]:
    """Perplexities of frequent and of rare tokens by stage; none where the text has not both."""
    found = {stage: result.by_frequency for stage, result in results.items()}
    return {
        stage: PerplexityByFrequency(frequent=values[0], rare=values[1])
        for stage, values in found.items()
        if values is not None
    }


def _describe(quality: Perplexity) -> str:
    return (
        f"perplexity {quality.perplexity:.3f} ± {quality.perplexity_error:.3f}, {quality.bits_per_byte:.4f} bits per "
        f"byte ({quality.tokens} tokens, context {quality.context}, stride {quality.stride})"
    )


def _session_logits(session: "onnxruntime.InferenceSession") -> Callable[[Tensor], Tensor]:
    def logits_of(input_ids: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], prefill_inputs(session, input_ids.numpy()))[0])

    return logits_of
