"""Causal language models: perplexity, ONNX on onnxruntime-genai's model builder."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from exporters.artifact import Golden
from exporters.causal_lm import MAX_LENGTH, export_causal_lm
from exporters.genai_config import save_causal_lm_config
from exporters.nbits import NBitsLinear
from exporters.packed_model import PackedModel
from exporters.rest import quantize_embedding, quantize_linears, round_to_float16
from fips_ort.causal_lm import prefill_inputs
from fips_ort.memory import measure_memory
from pipeline.compression.calibrate import record_activations
from pipeline.data.text import load_text_data
from pipeline.evaluation.perplexity import (
    DenseReference,
    evaluate_dense,
    evaluate_perplexity,
    lazy_logits,
    load_perplexity,
    paired_difference,
    save_perplexity,
)
from pipeline.evaluation.text_speed import PROMPT_TOKENS, bench_causal_lm
from pipeline.models.adapters import find_mlps
from pipeline.models.causal_lm import load_language_model, load_tokenizer
from pipeline.plumbing.progress import Progress
from pipeline.quantization.rest_start import load_tables, rest_tables, save_tables
from pipeline.recipe.plan import MLPSite, Plan, make_plan
from pipeline.recipe.schema import CausalLanguageModel, EndToEnd, LanguageModelSection, Recipe, TextDataSection
from pipeline.tasks.base import Form, Predict, Task
from qat.distill import Vocabulary, distillation_loss

REST_TABLES = "tables.safetensors"
GOLDEN_TOKENS = 8
"""Of the golden text. The artefact carries the logits of the last one, a megabyte at a vocabulary of 262,144."""
PARITY_TOKENS = 32
"""Tokens of the short text on which all forms must agree; the long one has as many more than the sliding window."""


class CausalLMTask(Task):
    """``recipe.model`` is a causal language model, ``recipe.data`` text; a sample is a window of token ids."""

    # Functions inlined and folded take gigabytes and minutes on whole texts; parity is checked on them all the same.
    evaluated_backends = ("native",)

    def __init__(self, recipe: Recipe, artifact: Path | None = None) -> None:
        self.recipe = recipe
        section, data = recipe.model, recipe.data
        assert isinstance(section, LanguageModelSection)
        assert isinstance(data, TextDataSection)
        self.section = section if artifact is None else CausalLanguageModel(source="causal_lm", path=str(artifact))
        self.tokenizer = load_tokenizer(self.section)
        train = 1 if artifact is not None else None
        self.data = load_text_data(data, self.tokenizer, recipe.seed, train, recipe.evaluation.samples)
        self.data_hash = self.data.hash
        self.train_samples = len(self.data.train)

    # --- dense model ---

    def make_dense(self, folder: Path, progress: Progress) -> None:
        """Nothing to make: a language model is loaded from where it is."""

    def open_dense(self, folder: Path) -> None:
        loaded = load_language_model(self.section, self.tokenizer)
        self.model = loaded.model
        self.source_hash = loaded.source_hash
        self.sites = find_mlps(loaded.model)

    # --- samples ---

    def training_batch(self, indices: Sequence[int]) -> Tensor:
        return self.data.train.batch(indices)

    def predictor(self, model: nn.Module) -> Predict:
        return lambda input_ids: model(input_ids=input_ids, use_cache=False).logits

    def calibrate(self, folder: Path, plan: Plan, samples: Sequence[int], progress: Progress) -> None:
        sites = [site for group in plan.groups for site in group.sites]
        batch_size = self.recipe.calibration.batch_size
        body = _body(self.model)
        record_activations(
            lambda input_ids: body(input_ids=input_ids, use_cache=False),
            self.model,
            sites,
            self.training_batch,
            samples,
            batch_size,
            folder,
            progress,
        )

    def end_to_end_loss(self, model: nn.Module, config: EndToEnd, seed: int) -> Callable[[int], Tensor]:
        """Windows are drawn without replacement until all were; ``objective: task`` is next-token cross-entropy."""
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        bodies = _body(model), _body(self.model)
        tables = _output_table(model).to(dtype), _output_table(self.model).to(dtype)
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        counts = torch.bincount(self.data.train.tokens, minlength=tables[1].shape[0])
        vocabulary = Vocabulary.of(counts)
        order = torch.randperm(self.train_samples, generator=torch.Generator().manual_seed(seed))

        def hidden(body: nn.Module, input_ids: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                states = body(input_ids=input_ids, use_cache=False).last_hidden_state
            return states.reshape(-1, states.shape[-1])

        def loss(step: int) -> Tensor:
            first = step * config.batch_size
            windows = [int(order[(first + i) % len(order)]) for i in range(config.batch_size)]
            input_ids = self.training_batch(windows)
            with torch.no_grad():
                target = hidden(bodies[1], input_ids)
            ids, offsets = vocabulary.sample(torch.Generator().manual_seed(seed * 1_000_003 + step))
            return distillation_loss(
                hidden(bodies[0], input_ids), target, tables[0][ids], tables[1][ids], offsets, softcap
            )

        return loss

    # --- quality ---

    def measure(
        self, form: Form, folder: Path, label: str, progress: Progress, *, against_dense: Path | None = None
    ) -> str:
        config = self.recipe.evaluation
        settings = (self.data.test, config.batch_size, config.stride)
        with progress.counter(f"evaluate {label}", len(self.data.test.strided(config.stride))) as report:
            if form is getattr(self, "model", None):
                quality = evaluate_dense(form, *settings, folder, report)
            else:
                logits_of = lazy_logits(form) if isinstance(form, nn.Module) else _session_logits(form)
                reference = None if against_dense is None else DenseReference(against_dense, self.model)
                quality = evaluate_perplexity(logits_of, *settings, report, reference)
        save_perplexity(quality, folder)
        return (
            f"perplexity {quality.perplexity:.3f} ± {quality.perplexity_error:.3f} ({quality.tokens} tokens, context "
            f"{quality.context}, stride {quality.stride})"
        )

    def describe_quality(self, folders: dict[str, Path]) -> dict[str, Any]:
        results = {stage: load_perplexity(folder) for stage, folder in folders.items()}
        dense = results["dense"]
        differences = {
            stage: paired_difference(result, dense) for stage, result in results.items() if stage != "dense"
        }
        quality = {
            "metric": "perplexity",
            "unit": "perplexity",
            "tokens": dense.tokens,
            "context": dense.context,
            "stride": dense.stride,
            "windows": len(dense.window_nll),
            "standard_error": {stage: result.perplexity_error for stage, result in results.items()},
            "difference_to_dense": {
                stage: {"nll": pair.nll, "standard_error": pair.standard_error, "ratio": pair.ratio}
                for stage, pair in differences.items()
            },
            **{stage: result.perplexity for stage, result in results.items()},
        }
        divergence = results["onnx_native"].divergence
        assert divergence is not None
        return {"quality": quality, "divergence": asdict(divergence)}

    def describe_data(self) -> dict[str, Any]:
        context = self.data.train.context
        calibration = min(self.recipe.calibration.samples or self.train_samples, self.train_samples)
        return {
            "source": self.recipe.data.source,
            "hash": self.data_hash,
            "train_samples": self.train_samples,
            "calibration_samples": calibration,
            "test_samples": len(self.data.test),
            "context": context,
            "train_tokens": self.train_samples * context,
            "calibration_tokens": calibration * context,
            "test_tokens": len(self.data.test) * context,
        }

    # --- delivery ---

    def store_rest(self, folder: Path, progress: Progress) -> None:
        if self.recipe.quantization.start == "nearest":
            return
        rest = self.recipe.quantization.rest
        generator = np.random.default_rng(self.recipe.seed)
        count = min(self.recipe.calibration.samples or self.train_samples, self.train_samples)
        samples = sorted(generator.permutation(self.train_samples)[:count].tolist())
        size = self.recipe.calibration.batch_size
        body = _body(self.model)

        def run(input_ids: Tensor) -> Tensor:
            states: Tensor = body(input_ids=input_ids, use_cache=False).last_hidden_state
            return states.reshape(-1, states.shape[-1])

        tables = rest_tables(
            self.model,
            _linears(self.sites),
            run,
            (self.training_batch(samples[first : first + size]) for first in range(0, count, size)),
            rest.linear_bits,
            rest.embedding_bits,
            rest.block_size,
            progress,
        )
        save_tables(tables, folder / REST_TABLES)

    def open_rest(self, folder: Path) -> nn.Module:
        rest, level = self.recipe.quantization.rest, self.recipe.export.accuracy_level
        # Copies of large models are dear. The compressed MLPs are about to be replaced and come in again at the end;
        # all else is shared with the dense model until something takes its place.
        groups = make_plan(self.recipe, self.sites).groups
        compressed = {site.path: self.model.get_submodule(site.path) for group in groups for site in group.sites}
        memo: dict[int, object] = {id(mlp): nn.Identity() for mlp in compressed.values()}
        memo |= {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        base = copy.deepcopy(self.model, memo)
        skip = _linears([site for site in self.sites if site.path not in compressed])
        path = folder / REST_TABLES
        tables = load_tables(path) if path.exists() else {}
        if rest.linear_bits is not None:
            base = quantize_linears(base, rest.linear_bits, rest.block_size, skip, level, tables)
        if rest.embedding_bits is not None:
            base = quantize_embedding(base, rest.embedding_bits, rest.block_size, level, tables)
        if rest.weights == "float16":
            base = round_to_float16(base)
        for name, mlp in compressed.items():
            base.set_submodule(name, mlp)
        return base

    def parity_batches(self) -> list[Tensor]:
        """A short text and one past the sliding window, if the model has one."""
        context = self.data.test.context
        window = getattr(self.model.config, "sliding_window", None) or context
        stream = self.data.test.batch(range(min(len(self.data.test), 1 + window // context + 1))).flatten()
        return [stream[None, : PARITY_TOKENS], stream[None, : window + PARITY_TOKENS]]

    def export_graph(self, stored: nn.Module, packed: PackedModel) -> ir.Model:
        return export_causal_lm(stored, self._max_length)

    def golden(self, predict: Predict, tolerance: float) -> Golden:
        input_ids = self.data.test.batch([0])[:, :GOLDEN_TOKENS]
        with torch.inference_mode():
            logits = predict(input_ids)[:, -1:]
        return Golden({"input_ids": input_ids.numpy()}, {"logits": logits.numpy()}, tolerance)

    def save_config(self, folder: Path) -> None:
        save_causal_lm_config(folder, self.model, self.tokenizer, self._max_length)

    def bench(self, artifact: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        threads = os.cpu_count() or 1
        prompt = self.data.test.batch([0])[0, :PROMPT_TOKENS].tolist()
        measured = bench_causal_lm(artifact, self.model, self.tokenizer, prompt, threads)
        memory = measure_memory(artifact) | {"load_rss_by_backend": measured["load_rss_by_backend"]}
        return measured["speed"], memory

    @property
    def _max_length(self) -> int:
        config: Any = self.model.config
        return int(min(MAX_LENGTH, config.max_position_embeddings))


def _linears(sites: Sequence[MLPSite]) -> list[str]:
    """Paths of the linear layers of MLPs."""
    return [f"{site.path}.{name}" for site in sites for name in (*site.first, site.last)]


def _body(model: nn.Module) -> nn.Module:
    """The model without its output layer: token ids to final hidden states."""
    return model.get_submodule(str(model.base_model_prefix))


def _output_table(model: Any) -> Tensor:
    """Rows of the output layer as the model computes with them: float32 [vocabulary, d]."""
    layer = model.get_output_embeddings()
    table: Tensor = layer.values if isinstance(layer, NBitsLinear) else layer.weight
    return table.detach()


def _session_logits(session: "onnxruntime.InferenceSession") -> Callable[[Tensor], Tensor]:
    def logits_of(input_ids: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], prefill_inputs(session, input_ids.numpy()))[0])

    return logits_of
