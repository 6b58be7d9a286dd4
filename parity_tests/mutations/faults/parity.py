"""Faults in icenet/parity."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/parity/align.py": [
        Fault(
            "pooling is taken to have the same axes in both frameworks",
            'KINDS.get(kind or "")\n    if ours.ndim < 3',
            'SAME if kind == "pool" else KINDS.get(kind or "")\n    if ours.ndim < 3',
            ["parity/test_modules.py::test_correct_layers_pass"],
        ),
        Fault(
            "the axes of an activation on a square array do not depend on its values",
            "nearer(ours, theirs) or shapes.get(theirs.shape) or _default(ours.ndim)",
            "_default(ours.ndim)",
            ["parity/test_modules.py::test_a_net_of_square_signals"],
        ),
        Fault(
            "the cotangent of copies is that of the first one, not their sum",
            "array.sum(axis=_copied_axes(ours, theirs))).reshape(ours)",
            "_first(array, _copied_axes(ours, theirs))).reshape(ours)",
            ["parity/test_repeated_calls.py::test_cotangents_of_copies"],
        ),
        Fault(
            "a layer of MLX is replayed on inputs with PyTorch's axes",
            "return _with_axes(name, array, (1, -1), 0, copy)",
            "return array",
            ["parity/test_modules.py::test_correct_layers_pass"],
        ),
    ],
    "icenet/parity/curves.py": [
        Fault(
            "a training curve is judged at its end only",
            "worst, strict_step = int(np.argmax(ratios)), int(np.argmax(strict))",
            "worst, strict_step = len(ratios) - 1, int(np.argmax(strict))",
            ["parity/test_yardstick.py::test_curves_are_compared_step_by_step"],
        ),
    ],
    "icenet/parity/configuration/engines.py": [
        Fault(
            "parity compares in TF32",
            '"allow_tf32=false"',
            '"allow_tf32=true"',
            ["engine/test_arithmetic.py::test_parity_compares_in_full_fp32"],
        ),
        Fault(
            "the weights of a layer stay those of its last sample",
            "            modules.set_weights(layer, own)\n",
            "            pass\n",
            ["parity/test_locate.py::test_a_comparison_leaves_the_engines_unchanged"],
        ),
    ],
    "icenet/parity/inputs.py": [
        Fault(
            "any argument is drawn for the first layer",
            "    return list(distinct.values())[:5]\n",
            "    return layers[:1]\n",
            ["parity/test_compare.py::test_several_arguments_are_drawn"],
        ),
    ],
    "icenet/parity/layer.py": [
        Fault(
            "derivatives below the last bit of one are judged",
            "gradient_floor=floor,",
            "gradient_floor=0.0,",
            ["parity/test_compare_idioms.py::test_derivatives_smaller_than_the_last_bit_of_one_are_equal"],
        ),
        Fault(
            "a gradient that is wrong at ties only passes",
            "    if passed and is_leaf and at_ties.has_inputs:\n",
            "    if False and at_ties.has_inputs:\n",
            ["parity/test_modules.py::test_a_gradient_that_is_wrong_at_ties_only_is_found"],
        ),
        Fault(
            "the noise of a gradient is sampled at ties, where it jumps",
            "    if cotangents is None or not (ties and is_backward and _may_be_kink(call)):\n",
            "    if True:\n",
            ["parity/test_modules.py::test_a_gradient_that_is_wrong_at_ties_only_is_found"],
        ),
        Fault(
            "equal inputs of a smooth layer are ties",
            "    if at_ties.has_inputs and not at_ties.ties.are_kinks:\n",
            "    if False:\n",
            ["parity/test_modules.py::test_a_smooth_layer_with_equal_inputs_has_no_ties"],
        ),
        Fault(
            "the inputs of a replay are not moved apart at ties",
            "return Value(round_to(moved_apart(value.array, value.dtype, key), value.dtype), value.dtype)",
            "return value",
            ["parity/test_modules.py::test_max_pooling_behind_a_relu"],
        ),
        Fault(
            "a gradient that differs at ties passes wherever it differs",
            "    return moved, passed and is_larger\n",
            "    return {name: Judgement(0.0, 0.0, 0.0, 0.0) for name in moved}, is_larger\n",
            ["parity/test_modules.py::test_subgradients_at_ties_and_edges"],
        ),
        Fault(
            "integers are not compared",
            "    wrong = int(((a != b) & (a != r)).sum())\n",
            "    wrong = 0\n",
            ["parity/test_outputs.py::test_unequal_outputs_of_any_kind_are_found[integers]"],
        ),
    ],
    "icenet/parity/nearby.py": [
        Fault(
            "the blocks of an array are moved by one pattern",
            "np.arange(start, start + part.size",
            "np.arange(part.size",
            ["parity/test_yardstick.py::test_each_block_of_an_array_has_perturbations_of_its_own"],
        ),
    ],
    "icenet/parity/configuration/randomness.py": [
        Fault(
            "parity does not compare two equal runs",
            "            if np.array_equal(a, b, equal_nan=value.is_float) or (",
            "            if a.shape or (",
            ["nn/test_dropout.py::test_parity_finds_a_generator_of_the_user"],
        ),
    ],
    "icenet/parity/resampling.py": [
        Fault(
            "a gradient of a port is repeated in problems that are near",
            "(self._samples.repeated or self._reference)(index)",
            "self._reference(index)",
            ["parity/test_yardstick.py::test_a_gradient_may_be_repeated_in_problems_further_away"],
        ),
        Fault(
            "a small jump of one sample explains differences of other elements",
            "return count > 1 or self._run.judge(name, elsewhere).passed",
            "return True",
            ["parity/test_yardstick.py::test_a_small_jump_is_noise_if_it_is_frequent_or_at_the_same_elements"],
        ),
        Fault(
            "a ratio of 24 after 3 samples is decided",
            "LIMITS = {3: 50 * FACTOR,",
            "LIMITS = {3: 3 * FACTOR,",
            ["parity/test_yardstick.py::test_the_limits_of_early_decisions_are_as_rare_as_the_final_one"],
        ),
        Fault(
            "a value that passes by repetition ends the sampling of the others",
            "        if cut and all(judged[name].passed for name in names if name not in cut):\n",
            "        if False:\n",
            [
                "parity/test_yardstick.py::test_a_value_that_passes_by_repetition_does_not_end_the_sampling_of_the_others"
            ],
        ),
        Fault(
            "the noise of a value is that of one run",
            "    if samples is None or not over:\n",
            "    if samples or not over:\n",
            ["parity/test_yardstick.py::test_a_single_number_passes_whatever_the_luck_of_one_run"],
        ),
        Fault(
            "a difference counts even if it does not repeat",
            "        for index in range(REPEATS):\n",
            "        for index in range(0):\n",
            ["parity/test_yardstick.py::test_values_that_are_infinite_in_all_runs_pass"],
        ),
        Fault(
            "the values of a nearby problem are compared with those of this one",
            "squared_distance(values[name].array, exact[name].array)\n            self._run.noises.update",
            "squared_distance(values[name].array, 1.0)\n            self._run.noises.update",
            ["parity/test_yardstick.py::test_a_bias_and_a_larger_error_of_a_single_number_are_found"],
        ),
    ],
    "icenet/parity/configuration/run.py": [
        Fault(
            "a training step is compared at the learning rate of the config only",
            "    return max(engines.torch.config.training.learning_rate, STEP_RATE)\n",
            "    return engines.torch.config.training.learning_rate\n",
            ["parity/test_locate.py::test_an_error_of_an_update_is_found_at_any_learning_rate"],
        ),
        Fault(
            "a training step of the report is not clipped in PyTorch",
            "engine.apply_gradients(gradients, step, rate, clip=True)",
            "engine.apply_gradients(gradients, step, rate)",
            ["parity/test_sweep.py::test_sweep[3]"],
        ),
    ],
    "icenet/parity/configuration/texts.py": [
        Fault(
            "a text that ends equals one that goes on",
            "    return chosen, stopping.tokens[0]\n",
            "    return stopping.tokens[0], stopping.tokens[0]\n",
            ["parity/test_texts.py::test_a_text_is_not_equal_to_its_beginning"],
        ),
    ],
    "icenet/parity/ties.py": [
        Fault(
            "equal values of a low precision stay equal if a dtype has too few numbers for all of them",
            "position = position * side + coordinates % side",
            "position = coordinates % side",
            ["parity/test_ties.py::test_values_of_a_window_differ_and_are_exact"],
        ),
    ],
    "icenet/parity/trace.py": [
        Fault(
            "the arrays of a dataclass are not recorded",
            "        if is_dataclass(outputs) and not",
            "        if False and not",
            ["parity/test_probe.py::test_the_arrays_of_a_dataclass_are_recorded"],
        ),
    ],
    "icenet/parity/variations.py": [
        Fault(
            "inputs with one value only keep it",
            "if not _has_one_value(value.array):",
            "if True:",
            ["parity/test_other_inputs.py::test_a_mask_of_ones_that_one_side_ignores"],
        ),
        Fault(
            "equal lengths keep their value",
            "    smaller[0] = array[0]\n",
            "    smaller[:] = array[0]\n",
            ["parity/test_other_inputs.py::test_lengths_that_are_all_equal"],
        ),
    ],
    "icenet/parity/yardstick.py": [
        Fault(
            "a ratio of 80 passes",
            "FACTOR = 8.0",
            "FACTOR = 80.0",
            ["parity/test_yardstick.py::test_seven_times_the_noise_passes_and_ten_times_does_not"],
        ),
        Fault(
            "the noise is that of MLX",
            "for index, difference in enumerate((x - exact, y - exact)):",
            "for index, difference in enumerate((x - exact, x - exact)):",
            ["parity/test_yardstick.py::test_seven_times_the_noise_passes_and_ten_times_does_not"],
        ),
        Fault(
            "every tensor passes",
            "        return self.ratio <= FACTOR\n",
            "        return True\n",
            ["parity/test_yardstick.py::test_seven_times_the_noise_passes_and_ten_times_does_not"],
        ),
        Fault(
            "one wrong element among a million passes",
            "return max(self.rms_ratio, self.peak_ratio)",
            "return self.rms_ratio",
            ["parity/test_yardstick.py::test_one_wrong_element_in_a_million_fails"],
        ),
        Fault(
            "values that are not finite pass",
            "    if not sizes.is_finite:\n",
            "    if False:\n",
            ["parity/test_yardstick.py::test_values_that_are_not_finite_must_agree"],
        ),
    ],
}
