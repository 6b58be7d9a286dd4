"""Faults in icenet/core/porting/source and icenet/core/porting/table."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/core/porting/source/body.py": [
        Fault(
            "a port reads a buffer after its update instead of before",
            "        self.keep_before(updates, outputs)\n",
            "",
            ["porting/test_source.py::test_what_is_read_before_an_update_is_the_value_before"],
        ),
    ],
    "icenet/core/porting/source/configurations.py": [
        Fault(
            "an instance with numbers of its own gets the configuration",
            "            if not is_same:\n",
            "            if False:\n",
            ["porting/test_source_classes.py::test_an_instance_with_another_configuration_has_its_own_numbers"],
        ),
    ],
    "icenet/core/porting/source/constructor_values.py": [
        Fault(
            "a layer that was replaced has the numbers of the original's constructor",
            "repr(value) == repr(text) for",
            "True for",
            ["porting/test_constructors.py::test_a_layer_that_was_replaced_has_its_own_numbers"],
        ),
    ],
    "icenet/core/porting/source/constructors.py": [
        Fault(
            "an attribute that is computed from itself has no end",
            "        if name in self.open:\n",
            "        if False:\n",
            ["porting/test_constructors.py::test_what_is_computed_from_itself_is_no_expression"],
        ),
    ],
    "icenet/core/porting/source/counters.py": [
        Fault(
            "a loop ends a turn early",
            '{low + count}" if low else str(count)',
            '{low + count - 1}" if low else str(count - 1)',
            ["porting/test_source.py::test_statements_that_repeat_are_a_loop"],
        ),
    ],
    "icenet/core/porting/source/inlining.py": [
        Fault(
            "an expression of a port computes a value twice",
            "return TABLE[user.base](trial).count(mark) > 1",
            "return False",
            ["porting/test_idioms.py::test_sizes_of_inputs_stay_open_and_an_expression_is_computed_once"],
        ),
    ],
    "icenet/core/porting/source/joined_names.py": [
        Fault(
            "a variable has the name of one that is read later",
            "if other not in conflicts.of(name):",
            "if True:",
            ["porting/test_source_classes.py::test_values_of_all_turns_stay_apart"],
        ),
    ],
    "icenet/core/porting/source/joined_variants.py": [
        Fault(
            "the variant in which a flag is false computes what the other one does",
            "is_first_large = bool(",
            "is_first_large = not bool(",
            ["porting/test_variants.py::test_a_flag_of_the_original_decides_between_two_variants"],
        ),
    ],
    "icenet/core/porting/source/originals.py": [
        Fault(
            "a second name in a loop is not found",
            "start = after if after < until else 0",
            "start = after",
            ["porting/test_readable.py::test_second_names_parts_and_numbers_have_the_names_of_the_original"],
        ),
        Fault(
            "the second name of a variable is the first of several",
            "return names[-1] if names",
            "return names[0] if names",
            ["porting/test_readable.py::test_a_second_name_is_that_of_the_value_and_of_its_function"],
        ),
        Fault(
            "second names are those of the outermost function",
            "return max(inside",
            "return min(inside",
            ["porting/test_readable.py::test_a_second_name_is_that_of_the_value_and_of_its_function"],
        ),
        Fault(
            "the name of an earlier value is the second name of a later one",
            "and start < item.line < until and",
            "and item.line < until and",
            ["porting/test_readable.py::test_a_second_name_is_that_of_the_value_and_of_its_function"],
        ),
        Fault(
            "the second names of an inner function count for the outer",
            " and _function_at(file, item.line) is function",
            "",
            ["porting/test_readable.py::test_a_second_name_is_that_of_the_value_and_of_its_function"],
        ),
    ],
    "icenet/core/porting/source/sequences.py": [
        Fault(
            "a function of a port names a class that the port lacks",
            "if _is_sequence(node, kinds):  # the whole",
            "if _is_sequence(node, {members[0].kind}):  # the whole",
            ["porting/test_sequences.py::test_a_function_holds_sequences_of_other_classes"],
        ),
        Fault(
            "the stride of a pool has the default of a convolution",
            ' and "Pool" not in node.func.attr',
            "",
            ["porting/test_sequences.py::test_a_function_must_save_layers"],
        ),
    ],
    "icenet/core/porting/source/simplify.py": [
        Fault(
            "a number of a port is the logarithm of one near it",
            "if 2 <= number < 10**6 and math.log(number) == value:",
            "if 2 <= number < 10**6:",
            ["porting/test_source.py::test_an_expression_is_simple"],
        ),
        Fault(
            "a number of a port is rounded to 1 minus a short one",
            "if 1 - rest == value:",
            "if True:",
            ["porting/test_source.py::test_an_expression_is_simple"],
        ),
    ],
    "icenet/core/porting/source/size_variables.py": [
        Fault(
            "the size of an argument that is read once has no variable though the argument is replaced",
            "< 2 and not is_replaced",
            "< 2",
            ["porting/test_readable.py::test_sizes_are_read_where_the_original_reads_them"],
        ),
        Fault(
            "a size that the last statement with its array reads has a variable",
            "late = any(index > last",
            "late = any(index >= last",
            ["porting/test_readable.py::test_sizes_are_read_where_the_original_reads_them"],
        ),
        Fault(
            "a size has a variable of each array that has it",
            " and size not in self.sizes\n            }",
            "\n            }",
            ["porting/test_readable.py::test_sizes_are_read_where_the_original_reads_them"],
        ),
        Fault(
            "the array whose size is read later is not kept",
            "                    self.last_use[source] = max(self.last_use.get(source, -1), index)\n",
            "",
            ["porting/test_readable.py::test_sizes_are_read_where_the_original_reads_them"],
        ),
    ],
    "icenet/core/porting/source/specialize.py": [
        Fault(
            "a value may be None although every call of a function gives it",
            "return NOT_NONE if is_given else _UNKNOWN",
            "return NOT_NONE",
            ["porting/test_source.py::test_a_parameter_that_may_be_none_keeps_its_branch"],
        ),
    ],
    "icenet/core/porting/source/tidy.py": [
        Fault(
            "helper functions of a port keep variables that nothing reads",
            "        if not dead:\n            return\n",
            "        return\n",
            ["porting/test_helper_source.py::test_helpers_have_no_dead_code"],
        ),
    ],
    "icenet/core/porting/source/variants.py": [
        Fault(
            "variants whose methods take other arguments are one class",
            "if longer.names[: len(shorter.names)] != shorter.names:",
            "if False:",
            ["porting/test_source_classes.py::test_the_methods_of_two_variants_are_one_where_they_compute_the_same"],
        ),
        Fault(
            "a variable that has a value in the smaller variant is taken for that of the further layer",
            " or match[1] in ours or masked(",
            " or masked(",
            ["porting/test_source_classes.py::test_the_methods_of_two_variants_are_one_where_they_compute_the_same"],
        ),
        Fault(
            "a constructor with a further statement that makes no layer is one class with that without",
            "if not names or len(names) < len(matches):",
            "if not names:",
            ["porting/test_source_classes.py::test_the_methods_of_two_variants_are_one_where_they_compute_the_same"],
        ),
        Fault(
            "another variable than that of the further layer has the value of the smaller variant",
            'return a if b == match[1] and a.isidentifier() else ""',
            'return a if a.isidentifier() else ""',
            ["porting/test_source_classes.py::test_the_methods_of_two_variants_are_one_where_they_compute_the_same"],
        ),
    ],
    "icenet/core/porting/source/written_sizes.py": [
        Fault(
            "a number has any expression of the original's statement",
            "if repr(value) == repr(number):",
            "if True:",
            ["porting/test_variants.py::test_sizes_that_the_forward_computes_are_computed"],
        ),
    ],
    "icenet/core/porting/table/base.py": [
        Fault(
            "a port casts a complex number to a real one before its phase",
            "is_integer = tensor is not None and not tensor.is_floating and not tensor.is_complex",
            "is_integer = tensor is not None and not tensor.is_floating",
            ["porting/test_idioms.py::test_products_in_a_list_are_no_joins_and_a_phase_is_that_of_a_complex_number"],
        ),
    ],
    "icenet/core/porting/table/convolution.py": [
        Fault(
            "a transposed convolution with a large output padding is MLX's layer",
            "    if groups != 1 or is_odd:\n",
            "    if groups != 1:\n",
            ["porting/test_operations.py::test_an_operation"],
        ),
    ],
}
