"""Faults in icenet/parity/causes, icenet/parity/ports, icenet/parity/recordings and icenet/parity/stages."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/parity/causes/calls.py": [
        Fault(
            "a module that one side calls is named untried",
            "            if new and trial.explains(trial.exact):",
            "            if new:",
            ["parity/test_compare_idioms.py::test_only_a_module_whose_call_makes_the_difference_is_a_cause"],
        ),
    ],
    "icenet/parity/causes/constants.py": [
        Fault(
            "exchanged parameters are not tried",
            "with_weights(trial, {first: y, second: x})",
            "with_weights(trial, {first: x, second: y})",
            ["parity/test_value_causes.py::test_held_arrays"],
        ),
    ],
    "icenet/parity/causes/norms.py": [
        Fault(
            "norms over all heads are tried over one axis",
            "gain * normed(inner, (axis, last)) + bias",
            "gain * normed(inner, (axis,)) + bias",
            ["parity/test_norm_causes.py::test_norms_of_queries_and_keys"],
        ),
    ],
    "icenet/parity/causes/numbers.py": [
        Fault(
            "a number that was tried as a cause keeps its new value",
            "        vars(module)[name] = before\n",
            "        pass\n",
            ["parity/test_causes.py::test_a_number_that_is_no_cause_does_not_hide_one"],
        ),
        Fault(
            "the rate of a dropout whose class a user derives is not compared",
            'if "_p_1" in found:',
            "if False:",
            ["parity/test_compare_idioms.py::test_numbers_without_an_effect_are_said"],
        ),
        Fault(
            "two numbers of a module are no cause",
            "if len(found) > 1 and trial.explains",
            "if False and trial.explains",
            ["parity/test_causes.py::test_two_numbers_of_a_module"],
        ),
        Fault(
            "a number and a tuple of equal numbers differ",
            "wide = [v if isinstance(v, tuple) else (v,) * size for v in values]",
            "wide = values",
            ["parity/test_causes.py::test_numbers_of_layers_whose_shapes_differ"],
        ),
    ],
    "icenet/parity/causes/rotary.py": [
        Fault(
            "queries are turned, but not keys",
            "                for index in indices:\n                    values[index] = _turned(",
            "                for index in indices[:1]:\n                    values[index] = _turned(",
            ["parity/test_causes.py::test_rotary_tables_that_the_model_hands_to_its_layers"],
        ),
    ],
    "icenet/parity/causes/trial.py": [
        Fault(
            "a change whose values overflow explains a difference",
            "if _overflows(found, exact, ours.array, self.c.dtype):",
            "if False:",
            ["parity/test_unfamiliar_models.py::test_a_change_that_overflows_explains_nothing"],
        ),
        Fault(
            "a cause need not remove the difference",
            "return found <= ACCEPTED and found < self.before / 4",
            "return True",
            ["parity/test_compare.py::test_a_fault_is_found_in_its_module_with_its_cause[diffusion-normalize]"],
        ),
    ],
    "icenet/parity/ports/inputs.py": [
        Fault(
            "a port is compared on no batch of 1",
            "for ways in (larger, *unusual):",
            "for ways in (larger, *unusual[:1]):",
            ["porting/test_proof.py::test_unusual_sizes_are_compared"],
        ),
    ],
    "icenet/parity/ports/inner_arguments.py": [
        Fault(
            "a class of a port agrees with other arguments if none was tried",
            "return True if tried else None",
            "return True",
            ["porting/test_other_arguments.py::test_arguments_of_a_class_that_are_not_tried_are_in_the_notes"],
        ),
    ],
    "icenet/parity/ports/port.py": [
        Fault(
            "a port with another fixed size is called",
            "    if report.fixed or report.limits or report.guards:",
            "    if False:",
            ["porting/test_proof_messages.py::test_a_fixed_size_is_said_and_another_one_is_an_error"],
        ),
    ],
    "icenet/parity/ports/pair.py": [
        Fault(
            "the dtypes of a port are not compared",
            'return f"{ours.dtype} instead of {theirs.dtype}" if ours.dtype != theirs.dtype else ""',
            'return ""',
            ["porting/test_proof.py::test_dtypes_are_compared"],
        ),
        Fault(
            "the buffers of a port are not compared",
            'kind = "buffer" if kind == "array" else kind',
            "pass",
            ["porting/test_proof.py::test_buffers_after_a_training_step_are_compared"],
        ),
    ],
    "icenet/parity/ports/proof.py": [
        Fault(
            "a port takes images smaller than a kernel",
            "(low or 1) < least",
            "False",
            ["porting/test_sizes.py::test_images_smaller_than_a_kernel_are_an_error_as_in_pytorch"],
        ),
        Fault(
            "a jump of a port may be at another place",
            "if place := proof_places.jump_that_differs(self.plan, self.program, self.module, self.example):",
            "if place := '':",
            ["porting/test_proof.py::test_a_jump_is_equal_on_equal_inputs"],
        ),
    ],
    "icenet/parity/recordings/cuts.py": [
        Fault(
            "a trace has replays without calls, or without all of them",
            "candidates = [pair.children, expanded, weighted(pair.children), weighted(expanded)]",
            "candidates = [pair.children, expanded]",
            ["parity/test_recording.py::test_a_module_whose_layers_are_functions_here_is_the_culprit"],
        ),
    ],
    "icenet/parity/recordings/trace_files.py": [
        Fault(
            "an array of a trace may have any dtype",
            "if dtype not in _DTYPES or len(shape) > 32:",
            "if len(shape) > 32:",
            ["parity/test_recording.py::test_a_damaged_trace_is_one_line"],
        ),
    ],
    "icenet/parity/stages/forward.py": [
        Fault(
            "numbers among the outputs are not compared",
            " or _numbers_differ(c, stage, pairs[0])",
            "",
            ["parity/test_false_passes.py::test_numbers_among_the_outputs_are_compared"],
        ),
        Fault(
            "repeated updates of running statistics are not compared",
            "_updates_differ(c, stage, pairs, found) or ",
            "",
            ["parity/test_false_passes.py::test_each_call_of_a_batch_norm_updates_its_statistics"],
        ),
    ],
    "icenet/parity/stages/gradients.py": [
        Fault(
            "what has no gradient in the reference may have one",
            "    if _cut_off(c, stage, run):\n",
            "    if False:\n",
            ["parity/test_false_passes.py::test_what_has_no_gradient_in_the_reference_has_none"],
        ),
        Fault(
            "rows of gradients are in the order of the forward pass",
            "for pair in reversed(run.pairs):",
            "for pair in run.pairs:",
            [
                "parity/test_backward.py::test_rows_are_in_the_order_of_the_backward_pass_and_say_where_it_begins_to_differ"
            ],
        ),
        Fault(
            "the gradient of a parameter of a wrong module inherits the difference",
            "if path in differing and not item.passed:",
            "if False:",
            [
                "parity/test_backward.py::test_rows_are_in_the_order_of_the_backward_pass_and_say_where_it_begins_to_differ"
            ],
        ),
    ],
    "icenet/parity/stages/order.py": [
        Fault(
            "running statistics that are not used are not found",
            " | larger.replay_statistics(c, pairs)",
            "",
            ["parity/test_false_passes.py::test_running_statistics_that_are_still_0_and_1_are_used"],
        ),
        Fault(
            "norms are not compared in evaluation mode",
            "norms = _evaluate_norms(c, trained[0], first) if depends else []",
            "norms: list[Row] = []",
            ["parity/test_fewer_runs.py::test_a_model_of_batch_norms_runs_in_training_mode"],
        ),
        Fault(
            "the modes of the modules are not compared",
            "if first and forward.modes_differ(c, stage):",
            "if first and False:",
            ["parity/test_compare_idioms.py::test_modes_that_differ_are_a_difference"],
        ),
    ],
    "icenet/parity/stages/structure.py": [
        Fault(
            "booleans may be floats of 0 and 1",
            "        if ours.is_float != theirs.is_float:\n",
            "        if False:\n",
            ["parity/test_outputs.py::test_unequal_outputs_of_any_kind_are_found[a boolean for a float]"],
        ),
    ],
    "icenet/parity/stages/training.py": [
        Fault(
            "AMSGrad is not compared",
            "    if ams_grad_differs(c, optimizers):\n",
            "    if False:\n",
            ["parity/test_false_passes.py::test_ams_grad_is_a_difference_before_it_has_an_effect"],
        ),
        Fault(
            "frozen layers with other parameters are not compared",
            ", *_frozen_layers(c)]",
            "]",
            ["parity/test_false_passes.py::test_frozen_parameters_of_a_layer_with_other_parts_are_named"],
        ),
        Fault(
            "gradients of the first step count as compared if their stage did not run",
            'is_judged = c.stages["gradients"].status == states.PASSED',
            "is_judged = True",
            ["parity/test_training_steps.py::test_gradients_that_no_stage_compared_are_compared_in_the_steps"],
        ),
        Fault(
            "gradients of training steps with equal updates are not compared",
            "agrees = all(c.gradients_agree(inputs, *pair) for pair in zip(*modules, strict=True))",
            "agrees = True",
            ["parity/test_training_steps.py::test_a_step_that_is_wrong_is_found_in_a_model_with_ties"],
        ),
    ],
    "icenet/parity/stages/weights.py": [
        Fault(
            "weights of layers with other parameters are not compared",
            "in [*pairs, *_converted_weights(c)]:",
            "in pairs:",
            ["parity/test_compare_idioms.py::test_weights_of_layers_with_other_parameters_are_compared"],
        ),
        Fault(
            "one array that differs counts as never copied",
            "return 2 * sum(related) < len(related)",
            "return sum(related) < len(related)",
            ["parity/test_compare.py::test_an_unrelated_array_is_found"],
        ),
        Fault(
            "sums of biases must be equal in half precision",
            "is_rounded = rounding is not None",
            "is_rounded = False and rounding is not None",
            ["parity/test_compare_idioms.py::test_the_sum_of_two_biases_is_rounded_once_in_a_and_twice_in_b"],
        ),
    ],
}
