"""Faults in icenet/core/porting, icenet/porting, icenet/porting/functions and icenet_torch/porting."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/core/porting/names.py": [
        Fault(
            "an attribute keeps its underscore, so its weights are not trained",
            'if not leaf.startswith("_") or is_item:',
            "if True:",
            ["porting/test_idioms.py::test_weights_below_an_underscore_are_trained_saved_and_moved_back"],
        ),
    ],
    "icenet/core/porting/signature.py": [
        Fault(
            "a constant of the example is not checked",
            '            lines += [f"if {name} {test} {item.value!r}:", f"    raise ValueError({message!r})"]\n',
            "",
            ["porting/test_idioms.py::test_a_port_has_the_signature_of_the_original"],
        ),
    ],
    "icenet/porting/convolution.py": [
        Fault(
            "a convolution of a port has no dilation on a CPU",
            "range(0, step * width, step)",
            "range(width)",
            ["porting/test_accelerated.py::test_convolutions_of_sequences_and_volumes"],
        ),
    ],
    "icenet/porting/functions/digits.py": [
        Fault(
            "rounding to a quantization has a gradient above its range",
            "inside = (q >= low) & (q <= high)",
            "inside = q >= low",
            ["porting/test_quantization.py::test_values_are_rounded_and_gradients_pass_within_the_range"],
        ),
    ],
    "icenet/porting/functions/indexing.py": [
        Fault(
            "a factor that is written to a place is in its own gradient",
            "product / mx.where(value == 0, 1, value), 0)",
            "product, 0)",
            ["porting/test_operations.py::test_an_operation"],
        ),
    ],
    "icenet/porting/functions/linear_algebra.py": [
        Fault(
            "a row of an attention whose mask is -inf is not zero",
            "mask=mx.where(empty, 0, mask))\n    return mx.where(empty, 0, y)\n",
            "mask=mx.where(empty, 0, mask))\n    return y\n",
            ["porting/test_attention.py::test_a_row_of_minus_infinity"],
        ),
        Fault(
            "a masked row of an attention is not zero",
            "mask=mask | empty)\n    return mx.where(empty, 0, y)\n",
            "mask=mask | empty)\n    return y\n",
            ["porting/test_formulas.py::test_attention_with_a_mask_is_fused"],
        ),
    ],
    "icenet/porting/functions/normalization.py": [
        Fault(
            "the running variance of an instance norm is not the mean of its instances",
            "momentum * new.mean(0)",
            "momentum * new.max(0)",
            ["porting/test_operations.py::test_losses_that_torch_cannot_export"],
        ),
        Fault(
            "the gradient of a CTC loss lacks the probabilities",
            "    loss = loss + (total - mx.stop_gradient(total))\n",
            "",
            ["porting/test_operations.py::test_an_operation"],
        ),
    ],
    "icenet/porting/layers.py": [
        Fault(
            "a convolution that IceNet computes has the stride of one axis for both",
            "is_square = kernel == width and stride == stride_2 and padding == padding_2\n        is_plain",
            "is_square = kernel == width and padding == padding_2\n        is_plain",
            ["porting/test_accelerated.py::test_layers"],
        ),
    ],
    "icenet/porting/load.py": [
        Fault(
            "the gradients of a port begin with the buffers that its call updated",
            "before = tree_map(mx.array, model.parameters())",
            "before = {}",
            ["porting/test_proof.py::test_a_module_is_compared_and_stays_as_it_is"],
        ),
    ],
    "icenet_torch/porting/attentions.py": [
        Fault(
            "heads that are repeated as a whole are taken for heads repeated one by one",
            "wide.args[1] not in (2, -3)",
            "wide.args[1] not in (1, 2, -3)",
            ["porting/test_fused_attention.py::test_heads_in_another_order_stay"],
        ),
        Fault(
            "a mask is not tried beyond a place that is a product of its numbers",
            "return summands * factor",
            "return summands",
            ["porting/test_fused_attention.py::test_masks_that_hide_keys_far_beyond_the_example_stay"],
        ),
        Fault(
            "a mask that lowers the scores of later keys is causal",
            "return values <= torch.finfo(values.dtype).min",
            "return values < 0",
            ["porting/test_fused_attention.py::test_other_masks_stay"],
        ),
        Fault(
            "the place where a mask changes by a fraction is taken for a whole number",
            "    if number != int(number):\n        raise _NotOfSizes\n",
            "",
            ["porting/test_fused_attention.py::test_masks_that_hide_keys_far_beyond_the_example_stay"],
        ),
    ],
    "icenet_torch/porting/repeated.py": [
        Fault(
            "each class whose arguments are tensors has them apart",
            "any(len(firsts) > 1",
            "any(len(firsts) > 0",
            ["porting/test_repeated.py::test_a_class_that_always_has_one_array_takes_one"],
        ),
    ],
    "icenet_torch/porting/run.py": [
        Fault(
            "trying the sizes of a port updates the original's buffers",
            (
                """with torch.no_grad(), inputs.unchanged(_state(program)):
            program"""
            ),
            (
                """with torch.no_grad():
            program"""
            ),
            ["porting/test_proof.py::test_a_module_is_compared_and_stays_as_it_is"],
        ),
        Fault(
            "the reference in float64 computes in float32 where the module names it",
            "return self.dtypes.get(item, item) if isinstance(item, torch.dtype) else item",
            "return item",
            ["porting/test_proof.py::test_a_module_is_compared_and_stays_as_it_is"],
        ),
        Fault(
            "the comparison in training mode leaves dropout between recurrent layers on",
            "run(*args[:5], 0.0, *args[6:])",
            "run(*args)",
            ["porting/test_idioms.py::test_layers_with_dropout_between_them_are_compared_in_training_mode"],
        ),
    ],
    "icenet_torch/porting/sizes.py": [
        Fault(
            "the root of a size is that of the example",
            "is_open = isinstance(value, (torch.SymInt, torch.SymFloat))",
            "is_open = False",
            ["porting/test_sizes.py::test_the_root_of_a_size_is_open"],
        ),
    ],
    "icenet_torch/porting/steps.py": [
        Fault(
            "inputs of one loop have lengths of their own",
            "            torch._check(self.unread == size)",
            "            torch._check(True)",
            ["porting/test_open_loops.py::test_inputs_of_one_loop_have_one_length"],
        ),
    ],
    "icenet_torch/porting/traceable.py": [
        Fault(
            "a batch norm without momentum keeps its first batch",
            "factor * (mean - self.running_mean)",
            "0.1 * (mean - self.running_mean)",
            ["porting/test_idioms.py::test_a_batch_norm_without_momentum_averages_its_batches"],
        ),
    ],
    "icenet_torch/porting/vectorized.py": [
        Fault(
            "arrays that a function of vmap has from its surroundings are constants",
            "make_fx(flat)(*tensors, *enclosed)",
            "make_fx(flat)(*tensors)",
            ["porting/test_vectorized.py::test_an_ensemble_of_networks_is_one_product_of_stacked_weights"],
        ),
    ],
}
