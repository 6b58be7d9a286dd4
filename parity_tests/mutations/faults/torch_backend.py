"""Faults below icenet_torch, except for those in its folder nn."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet_torch/engine/capture.py": [
        Fault(
            "a graph of CUDA calls no hooks",
            " or self._has_hooks():",
            ":",
            ["engine/test_capture.py::test_hooks_are_called"],
        ),
        Fault(
            "each shape of batches is captured",
            "len(self._graphs) == MAX_GRAPHS or ",
            "",
            ["engine/test_capture.py::test_the_number_of_graphs_is_limited"],
        ),
    ],
    "icenet_torch/generation/cache.py": [
        Fault(
            "a row of an own position is written at the longest one, PyTorch",
            "first = length if len(columns) == 1 else None",
            "first = length",
            ["core/generation/test_batching.py::test_rows_of_a_cache_are_moved"],
        ),
        Fault(
            "positions begin at one after the cache",
            "        columns = self.position[:, None]  # [1, T] or [B, T]\n",
            "        columns = (self.position + (self.position > 0))[:, None]\n",
            ["models/test_models.py::test_a_sequence_in_pieces_through_the_cache_equals_the_whole"],
        ),
        Fault(
            "a decoding step reads the length on the host",
            "        columns = self.position[:, None]  # [1, T] or [B, T]\n",
            "        columns = torch.full_like(self.position[:, None], int(self.position[0]))\n",
            ["models/test_compile.py::test_a_decoding_step_depends_on_its_arrays_only"],
        ),
    ],
    "icenet_torch/generation/capture.py": [
        Fault(
            "the memory of kept steps is not bounded",
            "    if step.nbytes > most:\n",
            "    if False:\n",
            ["models/test_kept_steps.py::test_the_memory_of_kept_steps_is_bounded"],
        ),
    ],
    "icenet_torch/generation/decoder.py": [
        Fault(
            "a CUDA graph stays with the model while a request uses it",
            "steps.pop(key, None)",
            "steps.get(key)",
            ["models/test_kept_steps.py::test_steps_with_memory_of_their_own_serve_one_request_at_a_time"],
        ),
        Fault(
            "a prompt cache has the buffers of a kept step",
            "        if self.prompt_cache is not None:  # it keeps the buffers",
            "        if False:  # it keeps the buffers",
            ["models/test_kept_steps.py::test_a_prompt_cache_and_a_draft_with_kept_steps"],
        ),
    ],
    "icenet_torch/generation/sampling.py": [
        Fault(
            "top-k keeps one more token",
            "torch.topk(logits, top_k, dim=-1)",
            "torch.topk(logits, top_k + 1, dim=-1)",
            ["core/generation/test_generation.py::test_scores_equal_the_reference"],
        ),
    ],
    "icenet_torch/models/fused.py": [
        Fault(
            "a fused block of parallel branches reads the sum",
            "x if self.parallel else y, second, y)",
            "y, second, y)",
            ["models/test_fused.py::test_a_fused_block_computes_what_the_block_does"],
        ),
        Fault(
            "a fused block does not call hooks",
            "type(attention) is not Attention or _has_hooks(attention)",
            "type(attention) is not Attention",
            ["models/test_fused.py::test_layers_of_a_user_and_hooks_are_called"],
        ),
    ],
    "icenet_torch/models/transformer.py": [
        Fault(
            "post-norm adds the residual after the norm",
            "x = normed = self.attention_norm(x + self.attention(x, mask, angles, cache))",
            "x = normed = x + self.attention_norm(self.attention(x, mask, angles, cache))",
            ["parity/test_parity.py::test_the_mirror_equals_torchs_encoder_layer"],
        ),
        Fault(
            "one backend renames an attribute",
            "        self.embedding_dropout = ops.Dropout(config.dropout)\n",
            "        self.input_dropout = self.embedding_dropout = ops.Dropout(config.dropout)\n",
            ["architecture/test_mirror.py::test_models_have_the_same_methods_arguments_and_attributes"],
        ),
        Fault(
            "one backend changes a line of a model",
            "x = x + (self.feed_forward_post_norm(inner)",
            "x = x + 1.0 * (self.feed_forward_post_norm(inner)",
            ["architecture/test_mirror.py::test_model_files_differ_in_framework_words_only"],
        ),
    ],
    "icenet_torch/tools/calls.py": [
        Fault(
            "complex buffers are real in the reference",
            "wide = torch.complex128 if item.is_complex() else torch.float64 if",
            "wide = torch.float64 if item.is_complex() else torch.float64 if",
            ["parity/test_unfamiliar_models.py::test_buffers_of_complex_numbers"],
        ),
        Fault(
            "the gradient by a result that a module passes on is that by all its uses",
            "        tensor = tensor.view_as(tensor) if is_passed_on else tensor\n",
            "",
            ["parity/test_backward.py::test_a_module_that_returns_its_argument_has_the_gradient_by_its_own_use"],
        ),
        Fault(
            "the reference casts to fp32",
            "            return args[0].to(torch.float64)\n",
            "            return func(*args)\n",
            ["parity/test_compare.py::test_the_reference_computes_in_float64_where_code_names_fp32"],
        ),
    ],
    "icenet_torch/tools/pointwise.py": [
        Fault(
            "a convolution with a padding is a matrix",
            " and set(padding) == {0}",
            "",
            ["parity/test_pointwise.py::test_a_convolution_that_is_no_matrix_is_a_difference"],
        ),
    ],
    "icenet_torch/tools/recurrent_parts.py": [
        Fault(
            "a recurrent layer is divided without its hooks",
            " and not has_hooks",
            "",
            ["parity/test_directions.py::test_a_layer_with_hooks_is_not_divided"],
        ),
        Fault(
            "the reverse direction of a recurrent layer reads forward",
            "given = input.flip(time) if direction else input",
            "given = input",
            ["parity/test_directions.py::test_the_parts_compute_what_the_layer_does"],
        ),
    ],
    "icenet_torch/tools/state_dict.py": [
        Fault(
            "Ctrl-C while PyTorch writes a file is an error of PyTorch",
            "is not None and not isinstance(cause, RuntimeError)",
            "is not None and isinstance(cause, OSError)",
            ["core/weights/test_convert.py::test_a_stop_while_a_state_dict_is_written_stays_one"],
        ),
        Fault(
            "a file of torch.save is opened by its name",
            ' or path.suffix == ".safetensors"',
            "",
            ["core/weights/test_convert.py::test_a_state_dict_whose_name_ends_in_safetensors"],
        ),
    ],
    "icenet_torch/tools/sums.py": [
        Fault(
            "sums term by term are those of PyTorch",
            "        with _InOrder(), _attention_by_operations():\n            yield\n",
            "        yield\n",
            ["parity/test_modules.py::test_sums_of_a_plain_batch_norm_are_less_exact"],
        ),
        Fault(
            "the norm of a vector is summed as PyTorch sums it",
            "        aten.linalg_vector_norm,\n",
            "",
            ["parity/test_modules.py::test_sums_term_by_term_are_less_exact_in_each_function[norm]"],
        ),
        Fault(
            "the sums of all samples begin at the same term",
            "np.roll(array, _first_term(len(array)), axis=0)",
            "array",
            ["parity/test_modules.py::test_each_sample_sums_in_another_order"],
        ),
    ],
    "icenet_torch/tools/variants/casts.py": [
        Fault(
            "integers stay integers without a cast to fp32",
            "            return args[0].to(half)\n",
            "            return args[0]\n",
            ["parity/test_causes.py::test_a_missing_cast"],
        ),
    ],
    "icenet_torch/tools/variants/numbers.py": [
        Fault(
            "a number of a call is replaced by any whole one",
            "float(new).is_integer()",
            "new == int(new)",
            ["parity/test_value_causes.py::test_a_number_may_be_replaced_by_an_infinite_one"],
        ),
    ],
    "icenet_torch/tools/variants/terms.py": [
        Fault(
            "a factor of one term is that of the other one",
            "            if known and one is known[0][0]:\n",
            "            if known and other is known[0][0]:\n",
            ["parity/test_port_causes.py::test_functions"],
        ),
    ],
}
