"""Faults in icenet/core/weights."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/core/weights/arrays.py": [
        Fault(
            "integers overflow",
            "if {_rank(given), _rank(own)} == {1} and",
            "if False and",
            ["core/weights/test_copy_errors.py::test_integers_keep_their_values"],
        ),
        Fault(
            "arrays keep their byte order",
            'return array.astype(array.dtype.newbyteorder("="), copy=False)',
            "return array",
            ["core/weights/test_arrays.py::test_arrays_of_any_layout"],
        ),
    ],
    "icenet/core/weights/convert.py": [
        Fault(
            "the MLX form of a container has PyTorch's names",
            "{canonical: name for name, canonical in facts.names.items()}, facts.aliases)",
            "{}, facts.aliases)",
            ["core/weights/test_convert.py::test_files_of_any_module_are_converted"],
        ),
        Fault(
            "converted files wait for the disk",
            "companions, durable=False)",
            "companions)",
            ["core/families/test_folders.py::test_only_what_cannot_be_made_again_waits_for_the_disk"],
        ),
    ],
    "icenet/core/weights/copying.py": [
        Fault(
            "each part of a transposed array is its first",
            'np.copyto(targets[first:last], sources[first:last], casting="unsafe")',
            'np.copyto(targets[first:last], sources[start : start + last - first], casting="unsafe")',
            ["core/weights/test_copying.py::test_copies_have_the_bits_of_their_source"],
        ),
    ],
    "icenet/core/weights/counterparts.py": [
        Fault(
            "keys and values of an attention are exchanged",
            'PROJECTIONS = ("query_proj", "key_proj", "value_proj")',
            'PROJECTIONS = ("query_proj", "value_proj", "key_proj")',
            ["core/weights/test_from_torch.py::test_outputs_and_gradients[MultiHeadAttention]"],
        ),
        Fault(
            "an attention with kdim has one matrix",
            " and rows == width:  # as",
            "  or True:  # as",
            ["core/weights/test_from_torch.py::test_outputs_and_gradients[MultiHeadAttention, kdim and vdim]"],
        ),
        Fault(
            "the attentions of a decoder layer are exchanged",
            '"self_attention": "self_attn",\n        "cross_attention": "multihead_attn",',
            '"self_attention": "multihead_attn",\n        "cross_attention": "self_attn",',
            ["core/weights/test_from_torch.py::test_outputs_and_gradients[TransformerDecoderLayer, norm first]"],
        ),
        Fault(
            "the directions of a recurrent layer have the same names",
            'theirs[f"{part}_l0{reverse}"] = shape',
            'theirs[f"{part}_l0"] = shape',
            ["core/weights/test_from_torch.py::test_outputs_and_gradients[icenet.nn.GRU]"],
        ),
    ],
    "icenet/core/weights/files.py": [
        Fault(
            "a shard that the index does not list is passed over",
            "    if others:\n        reason",
            "    if False:\n        reason",
            ["core/weights/test_weights.py::test_shards_that_no_index_lists"],
        ),
        Fault(
            "no file waits for the disk",
            "    durable: bool = True,",
            "    durable: bool = False,",
            ["core/weights/test_weights.py::test_a_full_disk_leaves_the_old_file"],
        ),
    ],
    "icenet/core/weights/gguf.py": [
        Fault(
            "tensors of a GGUF file may overlap",
            "            if start < end:",
            "            if start < begin:",
            ["core/families/test_gguf.py::test_files_that_lie_are_one_line"],
        ),
        Fault(
            "parts of a GGUF file are read in any order",
            "part.metadata.get(_SPLIT_NUMBER)) != (count, number)",
            "number) != (count, number)",
            ["core/families/test_gguf.py::test_parts_that_are_missing_or_of_another_file_are_one_line"],
        ),
    ],
    "icenet/core/weights/hub.py": [
        Fault(
            "a misspelled path in a folder that exists is looked for on the network",
            "return is_id and not path.exists() and not path.parent.exists()",
            "return is_id and not path.exists()",
            ["core/weights/test_hub.py::test_what_is_an_id"],
        ),
    ],
    "icenet/core/weights/layout.py": [
        Fault(
            "matrices of a bilinear layer are not transposed",
            '"bilinear": {"weight": _axes(0, 2, 1)',
            '"bilinear": {"weight": _axes(0, 1, 2)',
            ["core/weights/test_from_torch.py::test_outputs_and_gradients[Bilinear]"],
        ),
        Fault(
            "a convolution's weight has height and width swapped",
            '"conv2d": {"weight": _axes(0, 2, 3, 1)',
            '"conv2d": {"weight": _axes(0, 3, 2, 1)',
            ["core/weights/test_convert.py::test_a_layer_computes_the_same_on_both_sides"],
        ),
        Fault(
            "a transposed convolution has the layout of a convolution",
            '"conv_transpose2d": {"weight": _axes(1, 2, 3, 0)',
            '"conv_transpose2d": {"weight": _axes(0, 2, 3, 1)',
            ["core/weights/test_convert.py::test_a_layer_computes_the_same_on_both_sides"],
        ),
    ],
    "icenet/core/weights/packing.py": [
        Fault(
            "MLX's product is not rounded before the bias is added",
            "groups = groups.astype(rows.dtype).astype(np.float32)",
            "groups = groups.astype(np.float32)",
            ["core/weights/test_quantized.py::test_mlx_folders_have_the_bits_of_mlx"],
        ),
        Fault(
            "the far end of a group, not its edge, is exact",
            "is_low = np.abs(low) > np.abs(high)",
            "is_low = np.abs(low) < np.abs(high)",
            ["core/weights/test_packed.py::test_the_formula_has_the_bits_of_mlx"],
        ),
    ],
    "icenet/core/weights/pairing.py": [
        Fault(
            "a tied weight needs a place of its own",
            " if self._owner(theirs) not in owners]",
            " if True]",
            ["core/weights/test_twin_names.py::test_a_network_with_other_names[module-mapping]"],
        ),
        Fault(
            "axes are guessed from shapes",
            'has_other_axes = other != "plain" and ',
            "has_other_axes = False and ",
            ["core/weights/test_copy_errors.py::test_equal_shapes_of_other_kinds_are_refused"],
        ),
        Fault(
            "the second of two weights with one place is used",
            "elif place in self._hits and ",
            "elif False and ",
            ["core/weights/test_copy_errors.py::test_a_misuse_is_one_line[twice]"],
        ),
        Fault(
            "a counter of batches has no place",
            "if name is None or self._is_counter(name):",
            "if name is None:",
            ["core/weights/test_from_torch.py::test_outputs_and_gradients[BatchNorm]"],
        ),
        Fault(
            "a missing bias of a transformer layer is removed",
            'not any(name.startswith(group) and name.endswith("bias") for name in hit)',
            "True",
            ["core/weights/test_twin_names.py::test_transformer_layers_with_biases_are_trained_like_pytorchs"],
        ),
        Fault(
            "linear layers of GPT-2 are not transposed",
            "return array.T if self._is_transposed(place, theirs) else array",
            "return array",
            ["core/weights/test_twin_names.py::test_linear_layers_of_gpt2_are_transposed"],
        ),
        Fault(
            "raw weights of a module are transposed like those of a linear layer",
            'return kind == "linear" and theirs in self._torch.transposed',
            "return theirs in self._torch.transposed",
            ["core/weights/test_twin_names.py::test_linear_layers_of_gpt2_are_transposed"],
        ),
    ],
    "icenet/core/weights/prefixes.py": [
        Fault(
            "the prefix of a wrapper is removed from the ends of other names",
            'return f".{name}".replace(f".{part}", ".").removeprefix(".")',
            'return name.replace(part, "")',
            ["core/weights/test_formats.py::test_wrappers_within_names"],
        ),
        Fault(
            "a prefix that explains a few names is advised",
            "    if not prefix or 2 * count < len(known):\n",
            "    if not prefix:\n",
            ["core/weights/test_formats.py::test_wrappers_within_names"],
        ),
    ],
    "icenet/core/weights/quantization.py": [
        Fault(
            "a folder of mlx-lm does not say which layers have other settings",
            "if found != common}",
            "if found is None}",
            ["nn/test_quantized_layers.py::test_layers_of_a_folder_have_their_own_settings"],
        ),
    ],
    "icenet/core/weights/quantized.py": [
        Fault(
            "zero points of GPTQ's format v1 stay one too small",
            'self._is_minus_one = stored == "gptq"',
            "self._is_minus_one = False",
            ["core/weights/test_quantized.py::test_gptq_folders"],
        ),
        Fault(
            "AWQ's outputs are in the order of their bits",
            "[:, :, _AWQ_ORDER]",
            "[:, :, :]",
            ["core/weights/test_quantized.py::test_awq_folders"],
        ),
    ],
    "icenet/core/weights/rename.py": [
        Fault(
            "the least specific name applies",
            "key=lambda rule: -len(",
            "key=lambda rule: len(",
            ["core/weights/test_twin_names.py::test_the_most_specific_entry_of_a_mapping_applies"],
        ),
        Fault(
            "an entry of rename without an effect is accepted",
            "if unused := [key for key in rename if key not in matched]:",
            "if unused := []:",
            ["core/weights/test_copy_errors.py::test_a_misuse_is_one_line[an unused name]"],
        ),
    ],
    "icenet/core/weights/safetensors.py": [
        Fault(
            "an array of a file that became shorter is looked up",
            "        data.check()\n    flat",
            "        del data.path\n    flat",
            ["core/weights/test_weights.py::test_a_source_that_becomes_shorter_is_an_error"],
        ),
        Fault(
            "a checkpoint names int32 as uint32",
            '"I32": np.dtype("<i4")',
            '"I32": np.dtype("<u4")',
            ["core/weights/test_weights.py::test_the_bytes_are_those_of_the_safetensors_package"],
        ),
    ],
    "icenet/core/weights/safetensors_writer.py": [
        Fault(
            "arrays are copied from the beginning of their file",
            "        start = offset(array, data)\n        if data is not",
            "        start = 0\n        if data is not",
            ["core/weights/test_weights.py::test_arrays_of_files_are_copied_from_file_to_file"],
        ),
        Fault(
            "adjacent arrays of another file are copied together",
            "if data is not self._source or start != self._stop:",
            "if start != self._stop:",
            ["core/weights/test_weights.py::test_adjacent_arrays_of_two_files"],
        ),
    ],
    "icenet/core/weights/sharing.py": [
        Fault(
            "unequal values of a shared array are accepted",
            " if not _is_equal(first, found[name])]",
            " if False]",
            ["models/test_twins.py::test_a_shared_array_is_stored_under_both_names_and_read_from_one"],
        ),
        Fault(
            "a shared array is counted twice",
            "if is_trainable and path not in shared}",
            "if is_trainable}",
            ["models/test_twins.py::test_info_counts_a_shared_array_once"],
        ),
    ],
    "icenet/core/weights/torch_rnn.py": [
        Fault(
            "the gradient of the second bias is zero",
            "array.copy() if gradients else np.zeros_like(array)",
            "np.zeros_like(array)",
            ["core/weights/test_from_torch.py::test_outputs_and_gradients[LSTM]"],
        ),
        Fault(
            "a sum of biases loses the sign of zero",
            "np.where(second == 0, first.astype(wide), ",
            "np.where(False, first.astype(wide), ",
            ["core/weights/test_twin_names.py::test_special_values_keep_their_bits"],
        ),
        Fault(
            "weights of torch.nn.GRU lose the recurrent bias of n",
            "        bias[n_gate] = first[n_gate]\n",
            "",
            ["models/test_rnn.py::test_torchs_module_imported_and_exported"],
        ),
    ],
}
