"""Faults in icenet/nn, icenet/nn/cuda and icenet/nn/training_kernels."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/nn/activations.py": [
        Fault(
            "a leaky ReLU keeps MLX's gradient at 0",
            "return mx.where(x > 0, x, slope * x)",
            "return mx.maximum(slope * x, x)",
            ["models/test_twins.py::test_activations_at_zero"],
        ),
    ],
    "icenet/nn/arithmetic.py": [
        Fault(
            "MLX's TF32 is accepted where the config wants full fp32",
            "    if used and not allow:\n",
            "    if False:\n",
            ["engine/test_arithmetic.py::test_full_fp32_in_a_process_that_computes_in_tf32_is_an_error"],
        ),
        Fault(
            "the environment of the process keeps the config's TF32",
            "            del os.environ[VARIABLE]\n",
            "            pass\n",
            ["engine/test_arithmetic.py::test_the_first_model_on_a_gpu_decides"],
        ),
    ],
    "icenet/nn/arrays.py": [
        Fault(
            "arrays anywhere in memory are parts of one",
            "    if starts[1:] != ends[:-1]:\n",
            "    if False:\n",
            ["nn/test_filled_arrays.py::test_parts_that_do_not_follow_one_another_are_no_parts_of_one"],
        ),
        Fault(
            "an error of a thread that writes an array of MLX is lost",
            "    if errors:",
            "    if False:",
            ["nn/test_filled_arrays.py::test_an_error_while_an_array_is_written_is_raised"],
        ),
    ],
    "icenet/nn/attention.py": [
        Fault(
            "causal attention of a part of a sequence lacks its last keys",
            "        seen = before + end\n",
            "        seen = end\n",
            ["nn/test_layer_formulas.py::test_attention"],
        ),
        Fault(
            "the causal mask with padding hides the token itself",
            "mask = mask & (keys <= queries)\n",
            "mask = mask & (keys < queries - 1)\n",
            [
                "models/test_models.py::test_padding_changes_nothing_for_real_positions",
                "parity/test_parity.py::test_padding",
            ],
        ),
        Fault(
            "attention scores are not scaled",
            "scale = q.shape[-1] ** -0.5",
            "scale = 1.0",
            ["parity/test_parity.py::test_fp32"],
        ),
        Fault(
            "positions count padding on the left",
            "return mx.maximum(counted - 1, 0), masks",
            "return columns, masks",
            ["models/test_models.py::test_padding_changes_nothing_for_real_positions"],
        ),
        Fault(
            "a compiled rotation mixes up heads and tokens",
            "(x.swapaxes(1, 2), angles).swapaxes(1, 2)",
            "(x.swapaxes(1, 2), angles).reshape(x.shape)",
            ["models/test_prefill.py::test_a_compiled_rotation_is_that_of_pytorch"],
        ),
        Fault(
            "a causal mask with a softcap is aligned to the first key on MLX",
            "mask = columns <= columns[-q.shape[2] :, None]",
            "mask = columns <= columns[: q.shape[2], None]",
            ["nn/test_layer_formulas.py::test_attention"],
        ),
        Fault(
            "heads of keys are repeated in turn on MLX",
            "keys, values = mx.repeat(keys, groups, axis=1), mx.repeat(values, groups, axis=1)",
            "keys, values = mx.tile(keys, (1, groups, 1, 1)), mx.tile(values, (1, groups, 1, 1))",
            ["nn/test_layer_formulas.py::test_attention"],
        ),
        Fault(
            "distances are counted from the key to the query on MLX",
            "table[columns - columns[:, None] + table.shape[0] // 2]",
            "table[columns[:, None] - columns + table.shape[0] // 2]",
            ["nn/test_layer_formulas.py::test_a_table_of_distances"],
        ),
    ],
    "icenet/nn/checkpointing.py": [
        Fault(
            "the backward pass of checkpointing draws the masks of later calls",
            "with repeated_calls(dropouts, calls), keep_buffers(block):",
            "with keep_buffers(block):",
            ["models/test_models.py::test_checkpointing_repeats_the_masks_of_each_call"],
        ),
    ],
    "icenet/nn/conv.py": [
        Fault(
            "max-pooling gives the gradient to the last of equal values",
            "mx.where(value > best, value, best)",
            "mx.where(value >= best, value, best)",
            ["models/test_cnn.py::test_max_pooling_gives_the_gradient_to_the_first_maximum"],
        ),
        Fault(
            "the weight gradient of a convolution reads pixels that the stride leaves over",
            "length + min(more, 0) for",
            "length for",
            ["nn/test_training_kernels.py::test_convolution_with_cudnns_gradient"],
        ),
    ],
    "icenet/nn/cpu_products.py": [
        Fault(
            "the last part of a weight of half precision is left out",
            "for first in range(0, outputs, rows)]",
            "for first in range(0, outputs - rows + 1, rows)]",
            ["nn/test_cpu_products.py::test_products_of_half_precision_are_rounded_once"],
        ),
        Fault(
            "a weight of another half precision than the input is multiplied as it is",
            "x.dtype == weight.dtype and is_half(x)",
            "is_half(weight) and is_half(x)",
            ["nn/test_cpu_products.py::test_other_products_of_half_precision_are_cast"],
        ),
        Fault(
            "the two parts of an output of one row are not those of one half each",
            "y = parts[:, 0] + parts[:, 3]",
            "y = parts[:, 0] + parts[:, 2]",
            ["nn/test_cpu_products.py::test_a_product_of_mlx_is_that_of_float64"],
        ),
    ],
    "icenet/nn/cuda/attention.cuh": [
        Fault(
            "a group of threads forgets the columns before",
            "    sum[i] *= keep;\n    sum[i] +=",
            "    sum[i] +=",
            ["nn/test_cached_attention.py::test_it_is_attention_to_the_tokens_of_a_row"],
        ),
    ],
    "icenet/nn/cuda/linear.cuh": [
        Fault(
            "packed numbers are not centered",
            " + w.scale[r] * MIDDLE;",
            ";",
            ["nn/test_linear_kernels.py::test_one_kernel_rounds_as_separate_operations"],
        ),
        Fault(
            "warps do not share the inputs",
            "for (int step = part; step < steps; step += parts) {",
            "for (int step = 0; step < steps; step += parts) {",
            ["nn/test_linear_kernels.py::test_one_kernel_rounds_as_separate_operations"],
        ),
    ],
    "icenet/nn/cuda/tensor_linear.cuh": [
        Fault(
            "the constants in packed numbers of tensor cores stay in the sums",
            " - factor * ADDED;",
            ";",
            ["nn/test_linear_kernels.py::test_one_kernel_rounds_as_separate_operations"],
        ),
        Fault(
            "tensor cores mix groups of different scales",
            "BITS ? g != column % 8 : g >= ROWS",
            "BITS ? g != 0 : g >= ROWS",
            ["nn/test_linear_kernels.py::test_one_kernel_rounds_as_separate_operations"],
        ),
    ],
    "icenet/nn/dropout.py": [
        Fault(
            "MLX's own Dropout2d is not keyed",
            "nn.Dropout2d: Dropout2d, ",
            "",
            ["nn/test_dropout.py::test_channel_dropout_drops_whole_channels"],
        ),
        Fault(
            "dropout keeps the values it should drop",
            "(words >= mx.array(rng.dropout_threshold(p), mx.uint32))",
            "(words < mx.array(rng.dropout_threshold(p), mx.uint32))",
            ["core/test_rng.py::test_dropout_masks_agree"],
        ),
    ],
    "icenet/nn/embedding.py": [
        Fault(
            "MLX reads other memory for an id that the host has not read",
            "super().__call__(mx.minimum(ids, rows - 1))",
            "super().__call__(mx.minimum(ids, rows + 7))",
            ["nn/test_embedding.py::test_ids_that_the_host_does_not_read_give_nan"],
        ),
    ],
    "icenet/nn/experts.py": [
        Fault(
            "the rows of experts stay sorted in MLX",
            "rows = rows[self._inverse] if self._is_sorted else rows",
            "rows = rows",
            ["nn/test_experts.py::test_output_and_gradients_are_those_of_the_formula"],
        ),
    ],
    "icenet/nn/linear.py": [
        Fault(
            "layers that are quantized in other ways are joined",
            """"bias" in layer, quantization_of(layer))""",
            """"bias" in layer)""",
            ["nn/test_quantized_layers.py::test_layers_with_other_settings_are_not_joined"],
        ),
    ],
    "icenet/nn/loss.py": [
        Fault(
            "the loss is the mean over padding, too",
            "counted / mx.maximum(count, 1)",
            "counted / counted.size",
            [
                "core/data/test_data.py::test_padding_changes_nothing",
                "core/training/test_training.py::test_the_mean_is_over_labels_and_not_over_micro_batches",
            ],
        ),
        Fault(
            "MLX is imported before the BLAS is chosen",
            "import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)\n\n",
            "",
            ["architecture/test_imports.py::test_a_fast_blas_is_loaded_before_mlx"],
        ),
        Fault(
            "MLX keeps the weight gradient of the last chunk of a loss",
            "return mx.addmm(total, a, b) if a.dtype == dtype else total + (a @ b).astype(dtype)",
            "return mx.addmm(total * 0, a, b) if a.dtype == dtype else (a @ b).astype(dtype)",
            ["nn/test_loss.py::test_loss_and_gradients_are_those_of_all_logits"],
        ),
        Fault(
            "the softcap has no gradient",
            "gradient = gradient * (1 - mx.square(bounded))",
            "pass",
            ["nn/test_loss.py::test_loss_and_gradients_are_those_of_all_logits"],
        ),
        Fault(
            "logits of a chunked loss are not rounded on MLX",
            "logits = logits.astype(x.dtype).astype(w.dtype)",
            "logits = logits",
            ["nn/test_loss.py::test_the_loss_is_that_of_logits_in_the_dtype_of_the_layer"],
        ),
    ],
    "icenet/nn/one_row.py": [
        Fault(
            "generation keeps the weights of before a change in place",
            "layer[name] = copy.copy(layer[name])",
            "pass",
            ["nn/test_one_row.py::test_the_tokens_are_those_without_it_also_after_a_change_in_place"],
        ),
        Fault(
            "a norm of one row divides by the sum of squares",
            "alpha=1 / x.shape[-1]",
            "alpha=1",
            ["nn/test_one_row.py::test_a_norm_of_one_row_is_that_of_float64"],
        ),
    ],
    "icenet/nn/norm.py": [
        Fault(
            "a buffer that forward changes stays changed",
            "copies = {id(value): mx.array(value) for",
            "copies = {id(value): value for",
            ["models/test_twins.py::test_a_buffer_that_forward_changes"],
        ),
        Fault(
            "the epsilon of layer norm is 1e-6",
            "LayerNorm(dims, plan.eps)",
            "LayerNorm(dims, 0.1 * plan.eps)",
            [
                "parity/test_parity.py::test_the_mirror_equals_torchs_encoder_layer",
                "parity/test_parity.py::test_fp32",
            ],
        ),
        Fault(
            "the running variance of batch norm is biased",
            "m * (var * (count / (count - 1)))",
            "m * var",
            ["models/test_cnn.py::test_batch_norm_equals_pytorchs"],
        ),
        Fault(
            "the running statistics have momentum 0.9",
            "keep, m = 1 - self.momentum, self.momentum",
            "m, keep = 1 - self.momentum, self.momentum",
            ["models/test_cnn.py::test_batch_norm_equals_pytorchs"],
        ),
        Fault(
            "running statistics of bf16 weights are computed in bf16",
            "mx.float32 if is_half(self.weight) else self.weight.dtype",
            "self.weight.dtype",
            ["models/test_dtype.py::test_batch_norm_of_half_weights_rounds_once"],
        ),
        Fault(
            "a layer norm of half precision is rounded after each operation on a CPU",
            "mx.float32 if is_half(weight) and on_cpu() else weight.dtype",
            "weight.dtype",
            ["nn/test_layer_formulas.py::test_norms"],
        ),
        Fault(
            "an RMS norm on a CPU forgets the 1 that is added to its weight",
            "        weight = 1 + weight if self.offset else weight\n        if on_cpu():",
            "        if on_cpu():",
            ["nn/test_layer_formulas.py::test_norms"],
        ),
    ],
    "icenet/nn/quantized.py": [
        Fault(
            "products with packed numbers are compiled on CUDA, MLX",
            "(rows > 1 or max(inputs, outputs) > _MOST_FEATURES)",
            "max(inputs, outputs) > _MOST_FEATURES",
            ["nn/test_quantized_layers.py::test_cuda_compiles_no_product_of_several_rows"],
        ),
    ],
    "icenet/nn/recurrence/host.py": [
        Fault(
            "the forget and input gates of MLX's LSTM on a CPU are swapped",
            "        i, f, g, o = each[step]  # [B, H] each",
            "        f, i, g, o = each[step]  # [B, H] each",
            ["models/test_rnn.py::test_fp32", "nn/test_recurrent_kernels.py::test_on_a_cpu"],
        ),
        Fault(
            "padding moves the state of MLX's LSTM on a CPU",
            "        hs[step] = _where(seen, step, o * tanh_cs[step], h)",
            "        hs[step] = o * tanh_cs[step]",
            ["models/test_rnn.py::test_padding", "nn/test_recurrent_kernels.py::test_on_a_cpu"],
        ),
    ],
    "icenet/nn/recurrence/loops.py": [
        Fault(
            "the forget and input gates of MLX's LSTM are swapped",
            "        i, f, g, o = mx.split(gates[-1], 4, axis=-1)  # [B, H] each",
            "        f, i, g, o = mx.split(gates[-1], 4, axis=-1)  # [B, H] each",
            ["nn/test_recurrent_kernels.py::test_on_a_cpu"],
        ),
        Fault(
            "derivatives of forward mode of MLX's recurrent layers are zero",
            "            function.jvp(derivative_of(loop))\n",
            "            pass\n",
            ["nn/test_recurrent_kernels.py::test_functions_that_mlx_transforms"],
        ),
        Fault(
            "the reset and update gates of MLX's GRU are swapped",
            "        r, z = mx.split(gates[-1], 2, axis=-1)  # [B, H] each",
            "        z, r = mx.split(gates[-1], 2, axis=-1)  # [B, H] each",
            ["nn/test_recurrent_kernels.py::test_on_a_cpu"],
        ),
        Fault(
            "an LSTM's gradient does not pass the cell state on",
            "dc = dc * carried_c[step]",
            "dc = dc * 0",
            ["nn/test_recurrent_kernels.py::test_on_a_cpu"],
        ),
        Fault(
            "padding moves the state of MLX's LSTM",
            "h = where(step_mask, o * tanh_cs[-1], h)",
            "h = o * tanh_cs[-1]",
            ["nn/test_recurrent_kernels.py::test_on_a_cpu"],
        ),
        Fault(
            "gradients of gradients of MLX's recurrent layers take the gates as constants",
            "        gradient.vjp(second)\n",
            "",
            ["nn/test_recurrent_kernels.py::test_a_gradient_of_a_gradient"],
        ),
    ],
    "icenet/nn/recurrence/source.py": [
        Fault(
            "the blocks of MLX's recurrent kernels do not wait for each other",
            "          wait_for(counter, (unsigned)(unit_blocks * (count + 1)));\n",
            "",
            ["nn/test_recurrent_kernels.py::test_emulated"],
        ),
        Fault(
            "the input and forget gates of MLX's LSTM kernel are swapped",
            "const float i = SIGMOID(own[o][0] + product[0]), f = SIGMOID(own[o][1] + product[1]);",
            "const float f = SIGMOID(own[o][0] + product[0]), i = SIGMOID(own[o][1] + product[1]);",
            ["nn/test_recurrent_kernels.py::test_emulated"],
        ),
    ],
    "icenet/nn/scheduling.py": [
        Fault(
            "MLX dequantizes weights in each of many short passes over a prompt",
            "model.compute_dtype != mx.float32 or model.quantized_layers()",
            "model.compute_dtype != mx.float32",
            ["models/test_prefill.py::test_the_passes_over_a_prompt"],
        ),
        Fault(
            "MLX reads prompts of half precision in short passes on a CPU",
            "model.compute_dtype != mx.float32 or model.quantized_layers()",
            "model.quantized_layers()",
            ["models/test_prefill.py::test_the_passes_over_a_prompt"],
        ),
        Fault(
            "a function that MLX transforms starts blocks",
            "contextlib.suppress(ValueError)",
            "contextlib.nullcontext()",
            ["models/test_prefill.py::test_blocks_start_early_only_where_nothing_is_transformed"],
        ),
    ],
    "icenet/nn/snapshot.py": [
        Fault(
            "a change in place of a joined weight is not noticed",
            "return _addresses(self._others) == (self._known or _addresses(self._before))",
            "return True",
            ["core/generation/test_generation_copies.py::test_a_changed_weight_changes_what_is_generated"],
        ),
        Fault(
            "a captured step keeps a weight that has changed in place",
            "for value in _values(holder)} if on_cpu() else set()",
            "for value in _values(holder)}",
            ["models/test_kept_steps.py::test_a_changed_weight_or_attribute_is_seen"],
        ),
        Fault(
            "a new array of a module is not noticed",
            "or not all(map(operator.is_, values, before))",
            "",
            ["core/generation/test_generation_copies.py::test_a_changed_weight_changes_what_is_generated"],
        ),
    ],
    "icenet/nn/training_kernels/losses.py": [
        Fault(
            "ignored labels have gradients in the kernel of the loss",
            "const float weight = label >= 0 ? 1.f / (float)count[0] : 0.f;",
            "const float weight = 1.f / (float)count[0];",
            ["nn/test_training_kernels.py::test_cross_entropy"],
        ),
    ],
    "icenet/nn/training_kernels/norms.py": [
        Fault(
            "the kernel of batch norm keeps the biased variance",
            "(variance * (rows / (rows - 1.f)))",
            "variance",
            ["nn/test_training_kernels.py::test_batch_norm"],
        ),
        Fault(
            "the kernel of batch norm sums values without their first row",
            "if (KIND == 1) center[i] = (float)x[column + i];",
            "",
            ["nn/test_training_kernels.py::test_batch_norm"],
        ),
        Fault(
            "the kernel of batch norm takes the gradient of ReLU for one",
            "if (RELU && (float)(T)(difference * a[i] + shift[i]) <= 0.f) g = 0.f;",
            "",
            ["nn/test_training_kernels.py::test_batch_norm_with_what_follows"],
        ),
        Fault(
            "the kernel of batch norm gives the residual the gradient after ReLU",
            "*([dy] if residual else [])]",
            "*([cotangents[0]] if residual else [])]",
            ["nn/test_training_kernels.py::test_batch_norm_with_what_follows"],
        ),
    ],
    "icenet/nn/training_kernels/pooling.py": [
        Fault(
            "the last of equal maxima receives the gradient",
            "value > best ||",
            "value >= best ||",
            ["nn/test_training_kernels.py::test_max_pool"],
        ),
    ],
    "icenet/nn/training_kernels/updates.py": [
        Fault(
            "the kernel of Adam does not clip",
            "d * scale +",
            "d +",
            ["nn/test_training_kernels.py::test_adam"],
        ),
    ],
    "icenet/nn/tree.py": [
        Fault(
            "weights that generation joins are read one by one",
            "for path in group} if on_cpu() else {}",
            "for path in group} if False else {}",
            ["nn/test_filled_arrays.py::test_weights_that_generation_joins_are_read_into_one_array"],
        ),
        Fault(
            "weights that are read joined stay in memory next to their copy",
            "            release(array)\n",
            "            pass\n",
            ["models/test_dtype.py::test_loading_keeps_no_second_copy"],
        ),
        Fault(
            "a new bias of a frozen layer is trained",
            'if "weight" in layer._no_grad:',
            "if False:",
            ["core/weights/test_twin_names.py::test_transformer_layers_with_biases_are_trained_like_pytorchs"],
        ),
        Fault(
            "the parts of nn.Sequential have MLX's names",
            "path=node.path if inline else _join(node.path, name),",
            "path=_join(node.path, name),",
            ["models/test_twins.py::test_names_of_containers"],
        ),
        Fault(
            "a shared array is written at its first place only",
            "            for place in self._places[path]:\n",
            "            for place in self._places[path][:1]:\n",
            ["models/test_twins.py::test_against_plain_pytorch_with_its_own_optimizer"],
        ),
        Fault(
            "frozen arrays are trained on MLX",
            "is_frozen = node.is_frozen or key in node.module._no_grad",
            "is_frozen = node.is_frozen",
            ["models/test_twins.py::test_both_backends_start_train_and_continue_equal"],
        ),
    ],
}
