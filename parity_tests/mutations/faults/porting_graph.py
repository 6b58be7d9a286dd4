"""Faults in icenet/core/porting/graph and icenet/core/porting/layers."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/core/porting/graph/collapse.py": [
        Fault(
            "a size that a layer computes is lost",
            "            nodes.extend(_shared_sizes(call, uses))\n",
            "",
            ["porting/test_idioms.py::test_a_size_of_one_module_is_known_in_another"],
        ),
    ],
    "icenet/core/porting/graph/dtypes.py": [
        Fault(
            "new arrays of float32 have the dtype of the port",
            " and not _FLOAT32.search(node.place.code)",
            "",
            [
                "porting/test_as_users_write.py::test_new_arrays_of_a_port_in_half_precision_have_the_dtype_of_the_original"
            ],
        ),
    ],
    "icenet/core/porting/graph/formulas.py": [
        Fault(
            "a formula is an activation although a part of it is used elsewhere",
            "tensors.get(x) != node.out or is_used_elsewhere",
            "tensors.get(x) != node.out",
            ["porting/test_formulas.py::test_a_formula_of_an_activation_is_the_function_of_mlx"],
        ),
    ],
    "icenet/core/porting/graph/functional.py": [
        Fault(
            "an update of every other column changes all",
            '        and node.args.get("step") in (None, 1)\n',
            "",
            ["porting/test_source.py::test_an_update_of_every_other_column_leaves_the_others"],
        ),
        Fault(
            "only a choice by where drops gradients that are not finite",
            '("where", "masked_fill") else node',
            '("where",) else node',
            ["porting/test_special.py::test_a_row_that_is_masked_as_a_whole_has_the_gradient_of_pytorch"],
        ),
        Fault(
            "a part that is read after a write into another part is what was written",
            'if scatter.args["view"] != new.op or scatter.args["args"] != {',
            'if scatter.args["view"] != new.op and scatter.args["args"] != {',
            ["porting/test_turns.py::test_values_are_written_as_in_the_original"],
        ),
    ],
    "icenet/core/porting/graph/indices.py": [
        Fault(
            "an index computed from an input has a gradient",
            "    follows |= {ref.name for ref in graph.inputs}",
            "    pass",
            ["porting/test_indices.py::test_indices_computed_from_an_input_have_no_gradient_by_it"],
        ),
        Fault(
            "an index that is a mask is taken for a choice",
            "alone and bool(values) and",
            "alone and bool(values) or",
            ["porting/test_indices.py::test_indices_computed_from_floats_have_no_gradient"],
        ),
    ],
    "icenet/core/porting/graph/masks.py": [
        Fault(
            "a mask that an input adds to the scores leaves each query a key",
            "    return given & infinite\n",
            "    return set()\n",
            ["porting/test_attention.py::test_a_row_of_minus_infinity"],
        ),
        Fault(
            "a window is searched for queries without a key",
            "    return given & infinite\n",
            "    return infinite\n",
            ["porting/test_attention.py::test_only_masks_of_inputs_are_checked_for_empty_rows"],
        ),
    ],
    "icenet/core/porting/graph/norms.py": [
        Fault(
            "means without their axis are those of an RMS norm",
            ' or not mean.args.get("keepdim")',
            "",
            ["porting/test_norms.py::test_another_formula_is_no_rms_norm_and_another_product_no_weight"],
        ),
        Fault(
            "any factor of an RMS norm is its weight",
            "self.tensors.get(weight) == Tensor(norm.out.shape[-1:], norm.out.dtype)",
            "isinstance(self.tensors.get(weight), Tensor)",
            ["porting/test_norms.py::test_another_formula_is_no_rms_norm_and_another_product_no_weight"],
        ),
        Fault(
            "an RMS norm with a factor of eps has eps",
            ' or total.args.get("alpha", 1) != 1',
            "",
            ["porting/test_norms.py::test_another_formula_is_no_rms_norm_and_another_product_no_weight"],
        ),
        Fault(
            "a quotient by the root of other squares is an RMS norm",
            " or _given(square) != x",
            "",
            ["porting/test_norms.py::test_another_formula_is_no_rms_norm_and_another_product_no_weight"],
        ),
        Fault(
            "an RMS norm that is used twice has the weight of one use",
            "if len(users) == 1 and norm.name not in self.results else None",
            "if users else None",
            ["porting/test_norms.py::test_another_formula_is_no_rms_norm_and_another_product_no_weight"],
        ),
        Fault(
            "a rounded quotient is an RMS norm",
            '    if not node.args.get("rounding_mode"):\n        yield',
            "    if True:\n        yield",
            ["porting/test_norms.py::test_another_formula_is_no_rms_norm_and_another_product_no_weight"],
        ),
    ],
    "icenet/core/porting/graph/plain_masks.py": [
        Fault(
            "indices of ranges in another order are whole axes",
            "if places != sorted({*places}) or len",
            "if len",
            ["porting/test_plain_masks.py::test_other_indices_stay"],
        ),
    ],
    "icenet/core/porting/layers/attention.py": [
        Fault(
            "two calls of an attention with masks of two kinds have one class",
            "if len({name for name, _, _ in kinds}) < len(kinds) or",
            "if",
            ["porting/test_attention.py::test_two_calls_of_one_attention"],
        ),
        Fault(
            "an attention that gives 0 without a key in one call and NaN in another has one class",
            ' or len(hidden - {""}) > 1:',
            ":",
            ["porting/test_attention.py::test_two_calls_of_one_attention"],
        ),
        Fault(
            "a mask that only some calls give is before one that all give",
            "return sorted(self.layer.given, key=lambda key: key not in self.layer.always)",
            "return self.layer.given",
            ["porting/test_attention.py::test_two_calls_of_one_attention"],
        ),
        Fault(
            "an attention that is called with other keys attends to its queries",
            "is_self=all(layer.is_self for layer in layers)",
            "is_self=layers[0].is_self",
            ["porting/test_attention.py::test_two_calls_of_one_attention"],
        ),
        Fault(
            "a query without a key attends to all in training",
            '"weights = mx.where(empty, 0, mx.softmax(scores, axis=-1))",',
            '"weights = mx.softmax(scores, axis=-1)",',
            ["porting/test_attention.py::test_options"],
        ),
    ],
    "icenet/core/porting/layers/embeddings.py": [
        Fault(
            "a padding gets a gradient by its lookup",
            "mx.stop_gradient(x), x)",
            "x, x)",
            ["porting/test_layers.py::test_a_padding_gets_its_gradient_by_the_head_only"],
        ),
    ],
    "icenet/core/porting/layers/recurrent.py": [
        Fault(
            "dropout of a recurrent layer in a port follows its last layer",
            '"if layer + 1 < self.num_layers:"',
            '"if layer < self.num_layers:"',
            ["porting/test_source.py::test_a_recurrent_layer_is_a_class_with_its_options"],
        ),
        Fault(
            "both directions of a recurrent layer in a port begin with one state",
            "{' + 1' * direction}",
            "",
            ["porting/test_source.py::test_a_recurrent_layer_takes_an_initial_state"],
        ),
        Fault(
            "calls of a recurrent layer with and without a batch have one class",
            "if len({layer.options for layer in layers}) != 1:",
            "if False:",
            ["porting/test_source.py::test_a_recurrent_layer_serves_calls_with_and_without_a_batch"],
        ),
    ],
}
