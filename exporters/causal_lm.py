"""A transformers causal language model with packed MLPs → the ONNX graph of its artefact.

onnxruntime-genai's model builder puts the graph together. Its matrix products are replaced by our nodes (packed MLPs,
n-bit linear layers and token tables), and all weights are those of a PyTorch model in memory. Inputs and outputs
follow optimum's conventions: ``input_ids`` and ``attention_mask`` int64 [batch, tokens], ``past_key_values.N.key``
and ``.value`` float32 [batch, heads, past tokens, head size] → ``logits`` float32 [batch, kept tokens, vocabulary],
``present.N.key`` and ``.value``. The attention mask spans past and new tokens. Logits are those of the last
``logits_to_keep`` tokens, an input int64 [1] that may be left out: then of the last token alone, which is all that a
text needs to go on. Those of a prompt of 128 tokens take as long as all else, and 134 MB for Gemma 3.

Zeros may stand anywhere in the mask, as in batches padded on the left, which transformers' and optimum's ``generate``
make. GroupQueryAttention knows only how many tokens each text has, all of them at its beginning. So the new tokens of a
text are moved together before the first layer, and back before the output layer; caches hold the tokens of a text one
after another, and padding behind them, which the next tokens take the place of.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporters import passes
from exporters.fused_attention import fuse_attention
from exporters.genai_builder import new_builder, silent
from exporters.modules import (
    PackedEmbedding,
    PackedLayer,
    PackedMatrix,
    PackedMLPModule,
    PackedOutput,
    PackedProjection,
    input_node,
    linear_node,
)
from exporters.nbits import BITS, NBitsEmbedding, NBitsLinear
from fips_ort.causal_lm import LOGITS_TO_KEEP, OWN_POSITIONS
from fips_ort.layout import Layout, padded_to_blocks
from fips_ort.ops import DOMAIN, Q_GATHER, gather_attributes, node_attributes, op_type
from fips_ort.packed import stack_rows

MAX_LENGTH = 8192
"""Limit of tokens, prompt and answer together, unless the export is given another."""

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the text."""
_MICROSOFT = "com.microsoft"
_KEPT = "kept_tokens"
"""Name of the dimension of values behind the output layer."""
_GATED = ("gate_proj", "up_proj", "down_proj")


def export_causal_lm(model: nn.Module, max_length: int = MAX_LENGTH) -> ir.Model:
    """Export ``model`` (a ``…ForCausalLM`` in eval mode), for texts of at most ``max_length`` tokens.

    Float32 weights whose numbers are all float16 numbers are stored as float16 (see
    :func:`exporters.rest.round_to_float16`). Initializers refer to the model's own memory where they can. Raises
    ValueError if the model is in training mode, its architecture is not supported, or its rotary embeddings change
    with the length of the text.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before the export")
    architecture = type(model).__name__
    builder = new_builder(architecture, model.config, max_length, _StoredModel)
    with torch.no_grad(), silent():
        graph: ir.Model = builder.build(model)
    _leave_out_absent_inputs(graph.graph)
    for value in list(graph.graph.initializers.values()):
        value.name = _module_name(value.name or "")
    passes.deduplicate_initializers(graph)
    fuse_attention(graph)
    passes.store_float16(graph)
    graph.graph.sort()
    # The builder declares a newer opset, whose operators compute the same.
    graph.opset_imports[""] = passes.OPSET
    passes.finish(graph, architecture)
    return graph


class _StoredModel:
    """Methods that stand in front of those of a class of the builder: they walk over a model in memory instead of its
    files, and make nodes for weights in our formats.

    The builder knows values by name. Values and nodes that are made here are named after modules (``path``).
    """

    norm_offset = 0

    def build(self: Any, model: Any) -> ir.Model:
        """The graph of ``model``."""
        self.paths = {id(module): name for name, module in model.named_modules()}
        self.tables: dict[int, str] = {}
        self.rotary = model.model.rotary_emb
        self.attention_attrs["use_rope_in_attn"] = False  # see make_attention_qk_rope
        # Gemma's norms multiply with 1 + weight: the sum is made in the graph, so that the weight stays as it is.
        self.norm_offset, self.layernorm_attrs["add_offset"] = self.layernorm_attrs["add_offset"], 0
        for kind in ("key", "value"):
            # The builder leaves the last dimension open, but then nobody could make an empty cache from the graph.
            self.input_shapes[f"past_key_values.{kind}"][-1] = self.head_size
            self.output_shapes[f"present.{kind}"][-1] = self.head_size
        self.make_inputs_and_outputs()
        self.make_preprocessing_nodes()
        self._embed(model.get_input_embeddings())
        layers = list(model.model.layers)
        for index, layer in enumerate(layers):
            self.make_layer(index, layer)
        simple = self.layernorm_attrs["simple"]
        self.make_layernorm(len(layers), model.model.norm, skip=True, simple=simple, location="final_norm")
        self._move_back()
        self._keep_last()
        before = set(self.values)
        self.make_lm_head(model.get_output_embeddings())
        self.make_postprocessing_nodes()
        self._declare_kept(self.values.keys() - before)
        self._make_rotary_tables()
        return self.model

    # --- padding -----------------------------------------------------------------------------------------------

    def make_attention_mask_reformatting_for_gqa(self: Any) -> None:
        """Move the new tokens of every text together, as ``padding/input_ids``, and add what GroupQueryAttention reads
        of the attention mask: ``seqlens_k`` int32 [batch], one less than the entries of each text's cache with the new
        ones, and ``total_seq_len`` int32, the length of the mask.

        Entries of new padding count in ``seqlens_k``: the operator puts new entries at its end. They stand behind the
        text's own, where none of these looks.
        """
        mask, one, first_axis = "attention_mask", "/model/constants/INT64/[1]", "/model/constants/INT64/[0]"
        ids, batch, tokens = ir.DataType.INT64, "batch_size", "sequence_length"
        self._node("Shape", ["input_ids"], "padding/new_tokens", [1], ids, start=1, end=2)
        self._node("Shape", [mask], "padding/all_tokens", [1], ids, start=1, end=2)
        self._node("Sub", ["padding/all_tokens", "padding/new_tokens"], "padding/past_tokens", [1], ids)
        past = [mask, first_axis, "padding/past_tokens", one]
        self._node("Slice", past, "padding/past_mask", [batch, "past_sequence_length"], ids)
        new = [mask, "padding/past_tokens", "padding/all_tokens", one]
        self._node("Slice", new, "padding/new_mask", [batch, tokens], ids)

        self._node("ReduceSum", ["padding/past_mask", one], "padding/own_past", [batch], ids, keepdims=0)
        self._node("Add", ["padding/own_past", "padding/new_tokens"], "padding/own_total", [batch], ids)
        self._node("Sub", ["padding/own_total", one], "padding/last", [batch], ids)
        self._node("Squeeze", ["padding/all_tokens"], "padding/total", [], ids)
        for name, value, shape in (("seqlens_k", "padding/last", [batch]), ("total_seq_len", "padding/total", [])):
            self.mask_attrs[name] = f"padding/{name}"
            self._node("Cast", [value], f"padding/{name}/output_0", shape, ir.DataType.INT32, to=ir.DataType.INT32)

        # Of equal values, the lower index comes first: ones in their order, then zeros.
        sorted_mask, order = "padding/sorted_mask", "padding/order"
        self.make_node("TopK", ["padding/new_mask", "padding/new_tokens"], [sorted_mask, order], name=order)
        for value in (sorted_mask, order):
            self.make_value(value, ids, [batch, tokens])
        self._node("GatherElements", ["input_ids", order], "padding/input_ids", [batch, tokens], ids, axis=1)

    def _move_back(self: Any) -> None:
        """Put the hidden states of every token where it came from; those of padding are the last token's before it."""
        hidden, zero, one = self.layernorm_attrs["output_0"], "/model/constants/INT64/0", "/model/constants/INT64/1"
        ids, shape = ir.DataType.INT64, ["batch_size", "sequence_length"]
        self._node("CumSum", ["padding/new_mask", one], "padding/counted", shape, ids)
        self._node("Sub", ["padding/counted", one], "padding/place_or_none", shape, ids)
        self._node("Max", ["padding/place_or_none", zero], "padding/place", shape, ids)
        self._node("Unsqueeze", ["padding/place", "/model/constants/INT64/[-1]"], "padding/index", [*shape, 1], ids)
        output = "padding/hidden_states"
        self._node("GatherND", [hidden, "padding/index"], output, self.make_hidden_state_shape(), batch_dims=1)
        self.layernorm_attrs["output_0"] = output

    def _keep_last(self: Any) -> None:
        """Leave out the hidden states whose logits nobody asks for. The input has a default, an initializer of its
        name."""
        self._initialize(LOGITS_TO_KEEP, torch.ones(1, dtype=torch.int64))
        self.model.graph.inputs.append(self.values[LOGITS_TO_KEEP])
        hidden, output = self.layernorm_attrs["output_0"], "kept/hidden_states"
        self._node("Neg", [LOGITS_TO_KEEP], "kept/first", [1], ir.DataType.INT64)
        end, axis = f"/model/constants/INT64/[{2**31 - 1}]", "/model/constants/INT64/[1]"
        self._node("Slice", [hidden, "kept/first", end, axis], output, ["batch_size", _KEPT, self.hidden_size])
        self.layernorm_attrs["output_0"] = output

    def _declare_kept(self: Any, names: Collection[str]) -> None:
        """Declare for how many tokens the output layer and what follows it (``names``) give values, in the place of the
        builder's all: ONNX Runtime lets values of equal shapes share memory.

        The logits are declared for one, by which onnxruntime-genai knows that it gets no others. ONNX Runtime warns of
        other numbers, and returns them.
        """
        for name in (*names, "logits"):
            value = self.values[name]
            if value.const_value is None and value.shape is not None and len(value.shape) == 3:
                value.shape = ir.Shape(["batch_size", 1 if name == "logits" else _KEPT, self.vocab_size])

    # --- initializers ------------------------------------------------------------------------------------------

    def make_initializer(self: Any, tensor: Any, /, name: str, *, to: Any = None, raw: bool = False) -> None:
        """Store what the builder itself asks for: weights of norms and biases, but no tables of rotary embeddings."""
        if name.startswith(("cos_cache", "sin_cache")):
            return
        if self.norm_offset and name.endswith("norm.weight"):
            offset = f"/model/constants/FLOAT/{float(self.norm_offset)}"
            self._initialize(f"{name}/stored", tensor)
            self._node("Add", [f"{name}/stored", offset], name, tensor.shape)
            # Another value of this name would stand in the way of the initializer's final one.
            self.values[name].name = f"{name}/plus_offset"
        else:
            self._initialize(name, tensor)

    def _initialize(self: Any, name: str, tensor: Tensor) -> None:
        """Add an initializer that refers to the tensor's own memory, if there is none of this name yet."""
        if name in self.model.graph.initializers:
            return
        stored = ir.Tensor(tensor.detach().cpu().numpy(), name=name)
        value = self.make_value(name, stored.dtype, stored.shape)
        value.const_value = stored
        self.model.graph.register_initializer(value)

    def _node(
        self: Any, kind: str, inputs: list[str], output: str, shape: Any, dtype: Any = ir.DataType.FLOAT, **kwargs: Any
    ) -> None:
        """Add a node with one output, after which it is named unless ``name`` is given."""
        self.make_node(kind, inputs, [output], **{"name": output, **kwargs})
        self.make_value(output, dtype, shape)

    def _cut(self: Any, value: str, output: str, width: int) -> None:
        """Add the first ``width`` features of each token, without what fills up the last block."""
        zero, end, axis = (f"/model/constants/INT64/[{number}]" for number in (0, width, -1))
        self._node("Slice", [value, zero, end, axis], output, self.make_hidden_state_shape(last_dim=width))

    # --- token table and linear layers -------------------------------------------------------------------------

    def _embed(self: Any, embedding: nn.Module) -> None:
        path = self.paths[id(embedding)]
        shape = self.make_hidden_state_shape()
        rows = f"{path}/rows"
        if isinstance(embedding, PackedEmbedding):
            inputs = self._streams(embedding)
            inputs.insert(0, "padding/input_ids")
            if embedding.row_bits is not None:
                inputs.append(self._row_bits(embedding))
            attributes = gather_attributes(embedding.layout)
            self._look_up(Q_GATHER, inputs, rows, embedding.layout.columns, name=path, domain=DOMAIN, **attributes)
        elif isinstance(embedding, NBitsEmbedding):
            codes, scales = self._nbits(path, embedding)
            inputs = [codes, "padding/input_ids", scales]
            attributes = {"bits": BITS, "block_size": embedding.block_size, "gather_axis": 0, "quantize_axis": 1}
            stored = padded_to_blocks(embedding.width, embedding.block_size)
            kind = "GatherBlockQuantized"
            self._look_up(kind, inputs, rows, stored, name=path, domain=_MICROSOFT, **attributes)
        else:
            self._gather_floats(path, embedding.weight, rows, shape)
        scale = getattr(embedding, "embed_scale", None)
        if scale is not None:
            self._initialize(f"{path}.embed_scale", scale.float())
            self._node("Mul", [rows, f"{path}.embed_scale"], f"{path}/scaled", shape)
            rows = f"{path}/scaled"
        self.layernorm_attrs["root_input"] = self.layernorm_attrs["skip_input"] = rows

    def _look_up(self: Any, kind: str, inputs: list[str], rows: str, stored: int, **kwargs: Any) -> None:
        """Add a node that looks up rows of ``stored`` values, and cut off what fills up their last block."""
        whole = stored == self.hidden_size
        filled = rows if whole else f"{rows}/filled"
        self._node(kind, inputs, filled, self.make_hidden_state_shape(last_dim=stored), **kwargs)
        if not whole:
            self._cut(filled, rows, self.hidden_size)

    def _gather_floats(self: Any, path: str, weight: Tensor, rows: str, shape: Any) -> None:
        """Look up rows before they are cast, so that ONNX Runtime does not hold the whole table as float32."""
        table = f"{path}.weight"
        self.tables[weight.data_ptr()] = table
        half = passes.as_float16(weight.detach().cpu().numpy())
        if half is None:
            self._initialize(table, weight)
            self._node("Gather", [table, "padding/input_ids"], rows, shape, name=path)
        else:
            self._initialize(table, torch.from_numpy(half))
            self._node("Gather", [table, "padding/input_ids"], f"{path}/stored", shape, ir.DataType.FLOAT16, name=path)
            self._node("Cast", [f"{path}/stored"], rows, shape, to=ir.DataType.FLOAT)

    def make_matmul(self: Any, matmul: nn.Module, basename: str, root_input: str, **kwargs: Any) -> str:
        """Add a linear layer without its bias, which the builder adds to the value called ``{result}/output_0``."""
        path: str = self.paths[id(matmul)]
        output = "logits" if kwargs.get("logits", False) else f"{path}/output_0"
        if isinstance(matmul, PackedLayer | PackedOutput):
            matrix = matmul.matrix if isinstance(matmul, PackedOutput) else matmul
            filled = self._filled(matrix, root_input, matmul.in_features, path)
            self._multiply(matrix, path, filled, output=output)
            return path
        assert isinstance(matmul, nn.Linear | NBitsLinear)
        shape = self.make_hidden_state_shape(last_dim=matmul.out_features)
        if isinstance(matmul, NBitsLinear):
            inputs = [root_input, *self._nbits(path, matmul)]
            self._node("MatMulNBits", inputs, output, shape, name=path, domain=_MICROSOFT, **matmul.attributes)
        else:
            self._node("MatMul", [root_input, self._transposed(path, matmul.weight)], output, shape, name=path)
        return path

    def is_qkv_projection_packable(self: Any, layer_id: int, attention: Any) -> bool:
        """Whether queries, keys and values of a layer can be one product: if they are stored alike."""
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        return all(isinstance(layer, PackedLayer) for layer in layers) and _stackable(layers)

    def make_packed_matmul(
        self: Any, q: PackedLayer, k: PackedLayer, v: PackedLayer, basename: str, root_input: str, **kwargs: Any
    ) -> str:
        """Add one product for queries, keys and values, in this order, as one node takes less time than three."""
        path = f"{self.paths[id(q)].rpartition('.')[0]}.qkv_proj"
        stacked = stack_rows([layer.stored for layer in (q, k, v)])
        filled = self._filled(q, root_input, q.in_features, path)
        streams = {part: torch.from_numpy(getattr(stacked, part)) for part in ("codes", "scales")}
        inputs = [filled, *self._store(path, streams)]
        attributes = node_attributes(stacked.layout, True, q.accuracy_level)
        # The builder leaves the names of the layer before, and splits only what norms follow.
        self.attention_attrs["k_path"] = self.attention_attrs["v_path"] = ""
        self._product(stacked.layout, inputs, path, f"{path}/output_0", attributes)
        return path

    def _nbits(self: Any, path: str, stored: NBitsLinear | NBitsEmbedding) -> list[str]:
        """Add codes and scales of the baseline. A tied output layer reads the scales of the token table. Its codes have
        a name of their own: onnxruntime packs the codes of MatMulNBits anew and releases what it read, unless another
        node refers to it. Files store equal bytes in one place."""
        name = self.tables.setdefault(stored.scales.data_ptr(), f"{path}.scales")
        self._initialize(f"{path}.codes", stored.codes)
        self._initialize(name, stored.scales)
        return [f"{path}.codes", name]

    def _transposed(self: Any, path: str, weight: Tensor) -> str:
        """Add a float32 value [in, out] for the weight [out, in] of a linear layer. Returns its name."""
        table = self.tables.get(weight.data_ptr())
        if table is None:
            self._initialize(f"{path}.weight", weight.T)
            return f"{path}.weight"
        floats = table
        if self.values[table].dtype == ir.DataType.FLOAT16:
            floats = f"{path}/weight"
            self._node("Cast", [table], floats, weight.shape, to=ir.DataType.FLOAT)
        self._node("Transpose", [floats], f"{path}/transposed", weight.shape[::-1], perm=[1, 0])
        return f"{path}/transposed"

    # --- packed MLPs -------------------------------------------------------------------------------------------

    def make_mlp(self: Any, layer_id: int, mlp: nn.Module, root_input: str) -> None:
        """Add a packed MLP: ``t = x U``, ``a = act(gate(t)) * up(t)``, ``down(a) U + b``; or, without a basis,
        ``down(act(gate(x)) * up(x)) + b``."""
        if not isinstance(mlp, PackedMLPModule):
            super().make_mlp(layer_id, mlp, root_input)  # type: ignore[misc]
            return
        gate, up, down = (_projection(mlp, name) for name in _GATED)
        basis = mlp.basis
        reads = gate if basis is None else basis
        t = root_input = self._filled(reads, root_input, self.hidden_size, mlp.path)
        if basis is not None:
            t = self._multiply(basis, input_node(mlp.path), root_input)
        activated = self.make_activation(layer_id, self._project(gate, t))
        width = self.make_hidden_state_shape(last_dim=gate.layout.rows)
        product = f"{mlp.path}/product"
        self._node("Mul", [f"{activated}/output_0", self._project(up, t)], product, width)
        if basis is None:
            output = self._project(down, product)
        else:
            reduced = self._multiply(down, linear_node(mlp.path, _GATED[-1]), product)
            output = self._multiply(basis, mlp.output_node, reduced, trans_b=False, bias=self._bias(down))
            if basis.filling(self.hidden_size):
                written, output = output, f"{mlp.path}/cut"
                self._cut(written, output, self.hidden_size)
        self.mlp_attrs["output_0"] = self.layernorm_attrs["skip_input"] = output

    def _project(self: Any, projection: PackedProjection, root_input: str) -> str:
        path, child = self.paths[id(projection)].rsplit(".", 1)
        return self._multiply(projection, linear_node(path, child), root_input, bias=self._bias(projection))

    def _bias(self: Any, projection: PackedProjection) -> str | None:
        if projection.bias is None:
            return None
        name = f"{self.paths[id(projection)]}.bias"
        self._initialize(name, projection.bias)
        return name

    def _multiply(
        self: Any,
        matrix: PackedMatrix,
        node: str,
        root_input: str,
        *,
        trans_b: bool = True,
        bias: str | None = None,
        output: str | None = None,
    ) -> str:
        """Add a QMatMul, SparseQMatMul or BitmapQMatMul. Returns the name of its output."""
        inputs = [root_input, *self._streams(matrix)]
        if bias is not None or matrix.row_bits is not None:
            inputs.append(bias or "")
        if matrix.row_bits is not None:
            inputs.append(self._row_bits(matrix))
        output = output or f"{node}/output"
        attributes = node_attributes(matrix.layout, trans_b, matrix.accuracy_level)
        self._product(matrix.layout, inputs, node, output, attributes)
        return output

    def _product(
        self: Any, layout: Layout, inputs: list[str], node: str, output: str, attributes: dict[str, int]
    ) -> None:
        shape = self.make_hidden_state_shape(last_dim=attributes["N"])
        self._node(op_type(layout), inputs, output, shape, name=node, domain=DOMAIN, **attributes)

    def _streams(self: Any, matrix: PackedMatrix) -> list[str]:
        """Add codes, pattern and scales of a packed matrix, unless they are there. Returns their names."""
        streams = {"codes": matrix.codes, "pattern": matrix.pattern, "scales": matrix.scales}
        present = {part: stream for part, stream in streams.items() if stream is not None}
        names: list[str] = self._store(self.paths[id(matrix)], present)
        return names

    def _row_bits(self: Any, matrix: PackedMatrix) -> str:
        (name,) = self._store(self.paths[id(matrix)], {"row_bits": matrix.row_bits})
        return str(name)

    def _store(self: Any, path: str, streams: dict[str, Tensor]) -> list[str]:
        """Add initializers ``{path}.{part}``, unless they are there. Returns their names."""
        for part, stream in streams.items():
            self._initialize(f"{path}.{part}", stream)
        return [f"{path}.{part}" for part in streams]

    def _filled(self: Any, matrix: PackedMatrix, root_input: str, features: int, path: str) -> str:
        """Fill up the ``features`` of each token to the length of the rows of ``matrix``, if they are longer."""
        filling = matrix.filling(features)
        if not filling:
            return root_input
        filled, pads = f"{path}/filled", f"/model/constants/INT64/[0, 0, 0, 0, 0, {filling}]"
        self._node("Pad", [root_input, pads], filled, self.make_hidden_state_shape(last_dim=matrix.layout.columns))
        return filled

    # --- rotary embeddings -------------------------------------------------------------------------------------

    def make_attention_qk_rope(self: Any, layer_id: int, **kwargs: Any) -> tuple[str, str]:
        """Rotate queries and keys before GroupQueryAttention, which would do so with tables for all positions of the
        longest text: 17 MB of memory for Gemma 3 and 8,192 tokens. Returns the names of no tables."""
        paths = self.attention_attrs
        if not paths["k_path"]:  # one product, whose parts GroupQueryAttention would have taken apart
            self._split_qkv(layer_id)
        for part in ("q", "k"):
            name = f"/model/layers.{layer_id}/attn/{part}_rotary/RotaryEmbedding"
            self.make_rotary_embedding_op(name, root_input=paths[f"{part}_path"], position_ids="rotary/rows")
            paths[f"{part}_path"] = f"{name}/output_0"
        return "", ""

    def _split_qkv(self: Any, layer_id: int) -> None:
        name = f"/model/layers.{layer_id}/attn/qkv_proj/Split"
        widths = [self.q_size, self.kv_size, self.kv_size]
        outputs = [f"{name}/output_{index}" for index in range(len(widths))]
        shapes = [self.make_hidden_state_shape(last_dim=width) for width in widths]
        inputs = [self.attention_attrs["q_path"], f"/model/constants/INT64/{widths}"]
        self.make_split(name, inputs, outputs, [self.io_dtype] * len(widths), shapes)
        for part, output in zip("qkv", outputs, strict=True):
            self.attention_attrs[f"{part}_path"] = output

    def make_rotary_embedding_caches_from_scratch(self: Any) -> tuple[Tensor, Tensor]:
        """Return placeholders, which the builder hands to :meth:`make_initializer`, which drops them."""
        empty = torch.zeros(2, self.head_size)
        return empty, empty

    def _make_rotary_tables(self: Any) -> None:
        """Add nodes that compute tables of cosines and sines [batch * tokens, head size / 2] from the model's own
        frequencies, with a row for every new token, and ``rotary/rows`` int64 [batch, tokens], which says where it is.

        Positions count the tokens of a text, without padding. Beyond the longest text there is none to look up, which
        is ONNX Runtime's error. Raises ValueError for frequencies that depend on the length of the text.
        """
        ids, shape, one = ir.DataType.INT64, ["batch_size", "sequence_length"], "/model/constants/INT64/[1]"
        first, step = "/model/constants/INT64/0", "/model/constants/INT64/1"
        self._node("Squeeze", ["padding/new_tokens"], "rotary/new_tokens", [], ids)
        self._node("Range", [first, "rotary/new_tokens", step], "rotary/steps", ["sequence_length"], ids)
        self._node("Unsqueeze", ["padding/own_past", one], "rotary/own_past", ["batch_size", 1], ids)
        self._node("Add", ["rotary/own_past", "rotary/steps"], "rotary/places", shape, ids)
        self._node("Shape", ["rotary/places"], "rotary/shape", [2], ids)
        self._node("Size", ["rotary/places"], "rotary/size", [], ids)
        self._node("Range", [first, "rotary/size", step], "rotary/all_rows", [None], ids)
        self._node("Reshape", ["rotary/all_rows", "rotary/shape"], "rotary/rows", shape, ids)
        length = self.rope_attrs["cache_length"]
        limits = [f"/model/constants/FLOAT/{number}" for number in (0.0, float(length), 1.0)]
        self._node("Range", limits, "rotary/positions", [length])
        self._node("Gather", ["rotary/positions", "rotary/places"], OWN_POSITIONS, shape)
        self._node("Reshape", [OWN_POSITIONS, "/model/constants/INT64/[-1, 1]"], "rotary/column", [None, 1])
        for suffix, layer_type in (("", ""), ("_global", "full_attention_"), ("_local", "sliding_attention_")):
            names = {kind: f"{kind.lower()}_cache{suffix}" for kind in ("Cos", "Sin")}
            if names["Cos"] not in self.values:
                continue
            frequencies = getattr(self.rotary, f"{layer_type}inv_freq")
            rope_type = self.rotary.rope_type
            kind = rope_type[layer_type.removesuffix("_")] if isinstance(rope_type, dict) else rope_type
            if kind not in STATIC_ROPE:
                raise ValueError(f"cannot export rotary embeddings of type {kind!r}, only {', '.join(STATIC_ROPE)}")
            stored = f"model.rotary_emb.{layer_type}inv_freq"
            self._initialize(stored, frequencies.float())
            table = [None, len(frequencies)]
            self._node("Mul", ["rotary/column", stored], f"rotary/angles{suffix}", table)
            scaling = float(getattr(self.rotary, f"{layer_type}attention_scaling"))
            for op, name in names.items():
                if scaling == 1.0:
                    self._node(op, [f"rotary/angles{suffix}"], name, table)
                else:
                    self._node(op, [f"rotary/angles{suffix}"], f"{name}/unscaled", table)
                    self._node("Mul", [f"{name}/unscaled", f"/model/constants/FLOAT/{scaling}"], name, table)


def _leave_out_absent_inputs(graph: ir.Graph) -> None:
    """Put None in the place of inputs without a name, by which the builder says that there are none."""
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is not None and not value.name:
                node.replace_input_with(index, None)


def _stackable(layers: Sequence[PackedLayer]) -> bool:
    """Whether layers are stored alike but for how many rows they have, all of one width."""
    layouts = [layer.layout for layer in layers]
    widths = {bits for layout in layouts for bits, _, _ in layout.submatrices()}
    return len(widths) == 1 and len({(layout.columns, layout.block_size) for layout in layouts}) == 1


def _projection(mlp: PackedMLPModule, name: str) -> PackedProjection:
    projection = mlp.get_submodule(name)
    assert isinstance(projection, PackedProjection)
    return projection


def _module_name(name: str) -> str:
    """Name of the model's parameter that the builder stores as the initializer ``name``."""
    name = re.sub(r"^model\.layers\.\d+\.final_norm_layernorm\.", "model.norm.", name.removesuffix("/stored"))
    return name.replace(".attn.", ".self_attn.").replace("_norm.layernorm.", "_norm.").replace(".Add.bias", ".bias")
