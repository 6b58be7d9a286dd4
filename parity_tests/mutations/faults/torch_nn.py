"""Faults in icenet_torch/nn."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet_torch/nn/arithmetic.py": [
        Fault(
            "PyTorch's switches keep the values of the last model",
            "        _restore(older, newer)\n",
            "        pass\n",
            [
                "engine/test_arithmetic.py::test_the_switches_are_set_inside_the_context_and_restored_after_it",
                "engine/test_arithmetic.py::test_two_pytorch_models_keep_their_own_arithmetic",
            ],
        ),
    ],
    "icenet_torch/nn/attention.py": [
        Fault(
            "the causal mask with padding shows the next token",
            "keys <= queries)",
            "keys <= queries + 1)",
            [
                "models/test_models.py::test_padding_changes_nothing_for_real_positions",
                "parity/test_parity.py::test_padding",
            ],
        ),
        Fault(
            "a causal mask with a softcap is aligned to the first key on PyTorch",
            "columns <= columns[-q.shape[2] :, None]",
            "columns <= columns[: q.shape[2], None]",
            ["nn/test_layer_formulas.py::test_attention"],
        ),
        Fault(
            "heads of keys are repeated in turn on PyTorch",
            "keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)",
            "keys, values = keys.repeat(1, groups, 1, 1), values.repeat(1, groups, 1, 1)",
            ["nn/test_layer_formulas.py::test_attention"],
        ),
        Fault(
            "distances are counted from the key to the query on PyTorch",
            "table[columns - columns[:, None] + table.shape[0] // 2]",
            "table[columns[:, None] - columns + table.shape[0] // 2]",
            ["nn/test_layer_formulas.py::test_a_table_of_distances"],
        ),
        Fault(
            "a window has one token more on PyTorch",
            "mask & (keys > queries - window)",
            "mask & (keys >= queries - window)",
            ["nn/test_layer_formulas.py::test_masks_of_windows"],
        ),
        Fault(
            "positions of PyTorch are counted from one",
            "torch.clamp(counted - 1, min=0)",
            "torch.clamp(counted, min=0)",
            ["nn/test_layer_formulas.py::test_masks_of_windows"],
        ),
        Fault(
            "padding attends to nothing on PyTorch",
            "return mask | (keys == queries)",
            "return mask",
            ["nn/test_layer_formulas.py::test_masks_of_windows"],
        ),
        Fault(
            "the part of a head that is not rotated stands first",
            "torch.cat([rotated, x[..., size:]], dim=-1)",
            "torch.cat([x[..., size:], rotated], dim=-1)",
            ["nn/test_layer_formulas.py::test_rotations"],
        ),
    ],
    "icenet_torch/nn/checkpointing.py": [
        Fault(
            "the backward pass of checkpointing updates buffers again",
            "repeated_calls(dropouts, calls), keep_buffers(block):",
            "repeated_calls(dropouts, calls):",
            ["models/test_models.py::test_checkpointing_updates_buffers_once"],
        ),
    ],
    "icenet_torch/nn/cpu_products.py": [
        Fault(
            "products without a backward pass are used where there is one",
            "or not on_cpu(x) or torch.is_grad_enabled():",
            "or not on_cpu(x):",
            ["nn/test_cpu_products.py::test_other_products_of_half_precision_are_cast"],
        ),
    ],
    "icenet_torch/nn/dropout.py": [
        Fault(
            "an input that may have channels first is taken for one that has not",
            "if self.images is None and keys is not None and x.ndim in self._image_layers:",
            "if self.images is None and keys is not None and x.ndim > 9:",
            ["nn/test_dropout.py::test_an_input_that_may_have_channels_first"],
        ),
        Fault(
            "a dropout in place leaves its input as it is",
            (
                "        y = _apply_mask(x, keep, self.scale)\n"
                "        return x.copy_(y) if self.inplace else y\n\n\nclass _Channel"
            ),
            "        return _apply_mask(x, keep, self.scale)\n\n\nclass _Channel",
            ["nn/test_dropout.py::test_a_dropout_of_pytorch_in_place_changes_its_input"],
        ),
        Fault(
            "a mask without keys keeps values with the rate of dropping",
            "torch.rand(shape, device=device) >= p",
            "torch.rand(shape, device=device) >= 1 - p",
            ["nn/test_dropout.py::test_the_rate_of_a_layer_without_keys"],
        ),
        Fault(
            "a subclass of a convolution is no layer of images",
            "for cls in type(module).__mro__:",
            "for cls in type(module).__mro__[:1]:",
            ["nn/test_dropout.py::test_a_subclass_of_a_convolution_takes_images_too"],
        ),
    ],
    "icenet_torch/nn/experts.py": [
        Fault(
            "the weights of experts add up to 1 where they should not",
            "    if plan.normalize:",
            "    if not plan.normalize:",
            ["nn/test_experts.py::test_output_and_gradients_are_those_of_the_formula"],
        ),
        Fault(
            "of equal scores any expert is chosen in PyTorch",
            "scores.detach().sort(dim=-1, descending=True, stable=True)[1]",
            "scores.detach().flip(-1).sort(dim=-1, descending=True, stable=True)[1].sub(scores.shape[-1] - 1).neg()",
            ["nn/test_experts.py::test_of_equal_scores_the_first_expert_is_chosen"],
        ),
        Fault(
            "the loss that balances experts counts the probabilities of padding",
            "(rows.softmax(-1) * counted).sum(0) / total",
            "rows.softmax(-1).sum(0) / total",
            ["nn/test_experts.py::test_the_loss_that_balances_experts_is_that_of_the_paper"],
        ),
    ],
    "icenet_torch/nn/linear.py": [
        Fault(
            "joined weights are a second copy",
            "                array.data = part\n",
            "                pass\n",
            ["core/generation/test_generation_copies.py::test_a_copy_is_kept_and_joined_weights_are_in_memory_once"],
        ),
    ],
    "icenet_torch/nn/loss.py": [
        Fault(
            "PyTorch keeps the weight gradient of the last chunk of a loss",
            "is_first=start == 0",
            "is_first=True",
            ["nn/test_loss.py::test_loss_and_gradients_are_those_of_all_logits"],
        ),
        Fault(
            "the weight of a chunked loss has no gradient if its input has none",
            "(x.requires_grad or weight.requires_grad)",
            "x.requires_grad",
            ["nn/test_loss.py::test_the_weight_alone_has_a_gradient"],
        ),
        Fault(
            "logits of a chunked loss are not rounded on PyTorch",
            "logits = logits.to(x.dtype).to(w.dtype)",
            "logits = logits",
            ["nn/test_loss.py::test_the_loss_is_that_of_logits_in_the_dtype_of_the_layer"],
        ),
    ],
    "icenet_torch/nn/norm.py": [
        Fault(
            "batch norm uses the batch's statistics in evaluation",
            "y = F.batch_norm(y, mean, var, weight, bias, self.training,",
            "y = F.batch_norm(y, mean, var, weight, bias, True,",
            [
                "models/test_cnn.py::test_batch_norm_equals_pytorchs",
                "models/test_cnn.py::test_only_training_changes_the_running_statistics",
            ],
        ),
        Fault(
            "a skipped step changes PyTorch's counter of batches",
            'names = STATISTICS | LEFT_OUT["batch_norm"]',
            "names = STATISTICS",
            ["models/test_cnn.py::test_statistics_are_restored_with_pytorchs_counter_of_batches"],
        ),
        Fault(
            "PyTorch's RMS norm forgets the 1 that is added to its weight",
            "1 + weight if self.offset else weight, self.eps).to(x.dtype)",
            "weight, self.eps).to(x.dtype)",
            ["nn/test_layer_formulas.py::test_norms"],
        ),
        Fault(
            "PyTorch's running statistics of half precision are not updated",
            "            self.running_mean.copy_(mean)\n            self.running_var.copy_(var)\n",
            "            pass\n",
            ["nn/test_layer_formulas.py::test_running_statistics_of_a_batch"],
        ),
        Fault(
            "the running variance of half precision is the mean",
            "self.running_var.copy_(var)",
            "self.running_var.copy_(mean)",
            ["nn/test_layer_formulas.py::test_running_statistics_of_a_batch"],
        ),
    ],
    "icenet_torch/nn/quantized.py": [
        Fault(
            "PyTorch's product with 4 bits has another zero",
            "+ 8 * scales",
            "+ 7 * scales",
            ["nn/test_quantized_layers.py::test_pytorch_has_a_product_with_four_bits"],
        ),
    ],
    "icenet_torch/nn/recurrent.py": [
        Fault(
            "each PyTorch process imports the compiler",
            '_call_untraced if "torch._dynamo" in sys.modules else _call',
            "_call_untraced",
            ["architecture/test_imports.py::test_each_backend_works_without_the_other"],
        ),
    ],
    "icenet_torch/nn/scheduling.py": [
        Fault(
            "PyTorch reads prompts of fp32 in the passes of half precision on a CPU",
            "return 512 if model.compute_dtype == torch.float32 else 2048",
            "return 2048",
            ["models/test_prefill.py::test_the_passes_over_a_prompt"],
        ),
    ],
    "icenet_torch/nn/snapshot.py": [
        Fault(
            "a changed attribute of a module is not noticed",
            "holders += [vars(module) for module in modules if module is not model]",
            "holders += []",
            ["models/test_kept_steps.py::test_a_changed_weight_or_attribute_is_seen"],
        ),
    ],
    "icenet_torch/nn/tree.py": [
        Fault(
            "a module is changed in part",
            "        _check_expanded(tensors, values)\n",
            "",
            ["core/weights/test_copy_errors.py::test_an_expanded_buffer_is_checked_before_anything_is_written"],
        ),
        Fault(
            "an expanded buffer is written to",
            "elif not _is_expanded(own):",
            "else:",
            ["models/custom/test_custom_files.py::test_an_expanded_buffer"],
        ),
        Fault(
            "a layer with parts that is used twice has no name in MLX",
            "for name in module._modules:",
            "for name, _ in module.named_children():",
            ["models/test_twins.py::test_both_backends_start_train_and_continue_equal"],
        ),
        Fault(
            "a layer used twice is unknown at its second place in PyTorch",
            "return model.named_modules(remove_duplicate=False)",
            "return model.named_modules()",
            ["models/test_twins.py::test_both_backends_start_train_and_continue_equal"],
        ),
        Fault(
            "initial values that are drawn in place leave the parameter's version",
            "            torch.autograd.graph.increment_version(own)\n",
            "            pass\n",
            ["core/test_rng.py::test_pytorchs_initial_values_are_drawn_into_its_parameters"],
        ),
        Fault(
            "initial values are drawn into memory that nobody reads",
            "path: array.numpy()\n",
            "path: array.numpy().copy()\n",
            ["core/test_rng.py::test_pytorchs_initial_values_are_drawn_into_its_parameters"],
        ),
        Fault(
            "the transpose of a weight is copied onto itself",
            "source.clone() if is_view else source",
            "source",
            ["core/weights/test_arrays.py::test_views_of_a_module_of_torch_are_its_new_weights"],
        ),
        Fault(
            "parameters that are frozen do not count as cast",
            "for array in model.parameters() if array.is_floating_point()]",
            "for array in model.parameters() if array.requires_grad]",
            [
                "core/generation/test_generation_copies.py::test_a_changed_weight_that_is_frozen_and_cast_changes_the_copy"
            ],
        ),
    ],
}
