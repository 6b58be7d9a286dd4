"""Faults in icenet/parity/calls."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/parity/calls/array_files.py": [
        Fault(
            "an array that modules pass on is written for each of them",
            "if known is not None:",
            "if False:",
            ["parity/test_memory.py::test_an_array_that_modules_pass_on_is_written_once"],
        ),
    ],
    "icenet/parity/calls/culprit.py": [
        Fault(
            "the last difference of a replay is named",
            "return min(found, key=lambda origin: origin.order, default=None)",
            "return max(found, key=lambda origin: origin.order, default=None)",
            ["parity/test_compare.py::test_the_first_of_several_places_is_named"],
        ),
    ],
    "icenet/parity/calls/events.py": [
        Fault(
            "the arrays of a draw stay until the end",
            "for event in run.events if id(run) not in ids else ():",
            "for event in ():",
            ["parity/test_memory.py::test_the_arrays_of_a_draw_are_deleted_before_the_next"],
        ),
        Fault(
            "a comparison fills the disk before it says that the space is too little",
            "if needed <= 0:",
            "if True:",
            ["parity/test_memory.py::test_too_little_space_is_an_error_after_the_first_run"],
        ),
        Fault(
            "the arrays of a run stay in memory until it ends",
            "taken = self.store.keep(taken) if isinstance(taken, Value) else taken",
            "taken = taken",
            ["parity/test_recording.py::test_values_are_written_as_they_come"],
        ),
    ],
    "icenet/parity/calls/larger.py": [
        Fault(
            "errors of rounding at larger inputs are a bound",
            "if over and _is_steady(c, pair, list(over)):",
            "if over:",
            ["parity/test_larger_inputs.py::test_code_that_is_another_for_large_values_only_within_rounding_passes"],
        ),
        Fault(
            "probabilities are replaced by larger inputs",
            "(*squares, *sums)",
            "squares",
            ["parity/test_larger_inputs.py::test_code_that_relies_on_what_its_inputs_are_passes"],
        ),
        Fault(
            "functions of positive numbers are not replayed on larger inputs",
            'over, is_known = _judge_at(c, pair, "run")',
            "pass",
            ["parity/test_larger_inputs.py::test_a_bound_of_a_function_of_positive_numbers_is_compared"],
        ),
        Fault(
            "larger inputs of small arrays are independent draws",
            "drawn = (places + drawn) / max(size, 1)",
            "pass",
            ["parity/test_larger_inputs.py::test_a_small_array_reaches_a_narrow_range"],
        ),
        Fault(
            "small slopes in half precision are not searched below zero",
            'if is_known and not over and c.dtype != "fp32":',
            'if is_known and not over and c.dtype == "fp32":',
            ["parity/test_larger_inputs.py::test_small_slopes_in_half_precision"],
        ),
    ],
    "icenet/parity/calls/module_copy.py": [
        Fault(
            "functions of a user that read the mode are computed in one mode",
            "    return _reads_mode(cls) or _any_reads_mode(held)\n",
            "    return False\n",
            ["parity/test_false_passes.py::test_a_function_that_reads_the_mode_is_compared_in_both"],
        ),
        Fault(
            "code of the frameworks does not read the mode",
            "return _depends_on_mode(module) or any(map(_code_reads_mode, own))",
            "return _depends_on_mode(module)",
            ["parity/test_fewer_runs.py::test_only_norms_depend_on_the_mode"],
        ),
        Fault(
            "the axes of a plain dropout are forgotten before it has its keys",
            "for path, is_moved in self._channels.items():",
            "for path, is_moved in {}.items():",
            ["parity/test_recording.py::test_the_trace_says_what_the_module_itself_says"],
        ),
    ],
    "icenet/parity/calls/module_replays.py": [
        Fault(
            "a replay computes the calls within it",
            "            return results[index]\n",
            "            return original(*args, **kwargs)\n",
            ["parity/test_compare_idioms.py::test_a_fault_in_a_layer_that_is_called_three_times"],
        ),
    ],
    "icenet/parity/calls/other_ids.py": [
        Fault(
            "rows that no call selects are not compared",
            "if not len(unseen):",
            "if True:",
            [
                "parity/test_other_inputs.py::test_ids_that_the_inputs_do_not_have",
                "parity/test_other_inputs.py::test_rows_that_the_inputs_do_not_select",
            ],
        ),
    ],
    "icenet/parity/calls/own_code.py": [
        Fault(
            "blocks of one class have equal code, whatever their attributes",
            "        return type(item).__name__, repr(item)\n",
            "        return type(item).__name__\n",
            ["parity/test_fewer_runs.py::test_a_block_of_another_attribute_is_replayed"],
        ),
    ],
    "icenet/parity/calls/pairing.py": [
        Fault(
            "an argument that is one row on one side, and copies of it on the other, is a difference",
            " or align.copies(a.array, b.array)",
            "",
            ["parity/test_repeated_calls.py::test_an_argument_may_be_a_single_row_or_copies_of_it"],
        ),
        Fault(
            "a module of the user whose arrays have other axes on each side is a difference",
            "if not are_rows and (pair.path in layers or all(_axes(x) == _axes(y) for x, y, _ in hows)):",
            "if not are_rows:",
            ["parity/test_repeated_calls.py::test_a_module_of_another_interface_is_computed_within_its_caller"],
        ),
        Fault(
            "batch and sequence may be exchanged in any model",
            "align.sequence_first(a.array, b.array) if sequence_first and found",
            "align.sequence_first(a.array, b.array) if found",
            ["parity/test_sequence_first.py::test_axes_are_exchanged_only_in_models_that_have_such_layers"],
        ),
        Fault(
            "masked values by other numbers are a difference",
            "    return ours.is_float and align.masks_otherwise(",
            "    return False and align.masks_otherwise(",
            ["parity/test_compare_idioms.py::test_masks_by_other_numbers_are_equal"],
        ),
        Fault(
            "a mask of another shape is an obstacle",
            "            pair.own.add(j)\n",
            "            pair.obstacle = 'a mask'\n",
            ["parity/test_compare_idioms.py::test_each_side_keeps_its_own_mask"],
        ),
    ],
    "icenet/parity/calls/propagation.py": [
        Fault(
            "the error of what is computed between layers is not passed on",
            'if child is None else ("argument", child.path)',
            'if child is None else ("unused", child.path)',
            ["parity/test_compare_idioms.py::test_the_error_of_what_a_model_computes_between_layers_is_known"],
        ),
    ],
    "icenet/parity/calls/repeated.py": [
        Fault(
            "calls are in another order only with equal axes",
            "[align.SAME, align.MOVED, align.rows(x.array, y.array)]",
            "[align.SAME]",
            ["parity/test_repeated_calls.py::test_a_shared_encoder_may_be_called_in_another_way"],
        ),
        Fault(
            "only calls within unpaired calls are repetitions",
            "            yield child\n            yield from",
            "            yield from",
            ["parity/test_repeated_calls.py::test_a_result_may_be_computed_again"],
        ),
        Fault(
            "a call that has no counterpart keeps the one of its number",
            "        for number in range(len(x)):\n            del found[own, number]\n",
            "",
            ["parity/test_repeated_calls.py::test_calls_correspond_by_their_arguments"],
        ),
        Fault(
            "calls with other arguments have no counterpart",
            "        left = iter([k for k in range(len(x)) if k not in order.values()])",
            "        left = iter(list[int]())",
            ["parity/test_repeated_calls.py::test_calls_correspond_by_their_arguments"],
        ),
    ],
    "icenet/parity/calls/runs.py": [
        Fault(
            "one dropout in place of two has masks of its own",
            " or _has_other_dropouts(c)",
            "",
            ["parity/test_port_causes.py::test_one_dropout_in_place_of_two"],
        ),
    ],
    "icenet/parity/calls/structures.py": [
        Fault(
            "outputs with keys correspond by their order",
            "        return [others.index(name) for name in names]\n",
            "        return list(range(count))\n",
            ["parity/test_false_passes.py::test_outputs_correspond_by_their_keys"],
        ),
        Fault(
            "the arrays of a dataclass are not compared",
            "    if is_dataclass(item) and not",
            "    if False and not",
            ["parity/test_outputs.py::test_unequal_outputs_of_any_kind_are_found[dataclass]"],
        ),
    ],
}
