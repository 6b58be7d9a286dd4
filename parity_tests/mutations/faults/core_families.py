"""Faults in icenet/core/families."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/core/families/__init__.py": [
        Fault(
            "an option that no family has is dropped in an export",
            "if not (different := different_options(family, config)):",
            "if not (different := different_options(family, config)) or family is families[-1]:",
            ["core/families/test_folders.py::test_options_that_no_family_has_are_named"],
        ),
    ],
    "icenet/core/families/family.py": [
        Fault(
            "an unknown key of config.json is ignored",
            "[key for key in given if key not in known]",
            "[key for key in known if key in IGNORED and not key]",
            ["core/families/test_folders.py::test_a_config_that_is_not_supported_is_one_line"],
        ),
    ],
    "icenet/core/families/folder.py": [
        Fault(
            "an export forgets the special tokens of the source",
            "for file, recorded in (origin.token_ids if origin else {}).items():",
            "for file, recorded in dict[str, dict[str, object]]().items():",
            ["core/training/test_initial_weights.py::test_a_trained_import_is_exported_as_what_it_was"],
        ),
        Fault(
            "a tied head that differs is dropped",
            'if fields.get("tie_embeddings") and _has_own_head',
            'if not fields.get("tie_embeddings") and _has_own_head',
            ["core/families/test_folders.py::test_a_tied_head_may_be_present_absent_or_different"],
        ),
    ],
    "icenet/core/families/generation_settings.py": [
        Fault(
            "only the first end token of a folder ends a text",
            "for index, end in enumerate(ends) if end not in ends[:index]]",
            "for end in ends[:1]]",
            ["core/families/test_folders.py::test_generation_settings_are_those_of_the_folder"],
        ),
    ],
    "icenet/core/families/gguf.py": [
        Fault(
            "queries of Llama keep the order of llama.cpp",
            'change = "permuted"',
            'change = ""',
            ["core/families/test_gguf.py::test_a_file_is_the_folder_that_it_was_made_from"],
        ),
        Fault(
            "norms of Gemma keep the 1",
            'change = "one more"',
            'change = ""',
            ["core/families/test_gguf.py::test_a_file_is_the_folder_that_it_was_made_from"],
        ),
    ],
    "icenet/core/families/gguf_export.py": [
        Fault(
            "routers of experts are written in half precision",
            "if len(shape) < 2 or last == _ROUTER else kind",
            "if len(shape) < 2 else kind",
            ["core/families/test_gguf.py::test_an_exported_file_has_the_options_and_tensors"],
        ),
        Fault(
            "a thread writes its rows of a GGUF tensor at its beginning",
            "file.seek(start + first * row_size)",
            "file.seek(start)",
            ["core/families/test_gguf.py::test_a_file_does_not_depend_on_the_parts_that_threads_convert"],
        ),
        Fault(
            "blocks of 8 bits are rounded towards zero",
            "    scaled += scaled\n",
            "",
            ["core/families/test_gguf.py::test_blocks_of_8_bits_are_those_of_the_package"],
        ),
    ],
    "icenet/core/families/gguf_rotary.py": [
        Fault(
            "settings of Llama 3 are fitted where the file has them",
            "if all(type(value) in (int, float) and 0 < value < 2**31 for value in given.values()):",
            "if False:",
            ["core/families/test_gguf.py::test_settings_of_llama_3_that_are_not_published_come_back"],
        ),
    ],
    "icenet/core/families/gpt.py": [
        Fault(
            "projections of mlx-lm's GPT-2 are transposed",
            '_gpt2_rows("model", is_transposed=False)',
            '_gpt2_rows("model", is_transposed=True)',
            ["core/families/test_mlx_lm.py::test_names_of_mlx_lm_are_read_and_leave_as_those_of_transformers"],
        ),
    ],
    "icenet/core/families/llama.py": [
        Fault(
            "a window in every other layer begins with the second",
            "lambda index, _: index % 2 == 0",
            "lambda index, _: index % 2 == 1",
            ["core/families/test_folders.py::test_the_configs_of_published_models_are_read"],
        ),
        Fault(
            "Gemma 2 has norms without 1 +",
            '{"norm_offset": True, "norm_position": "sandwich", "embedding_scale": None},',
            '{"norm_offset": False, "norm_position": "sandwich", "embedding_scale": None},',
            ["core/families/test_folders.py::test_the_options_of_gemma"],
        ),
    ],
    "icenet/core/families/moe.py": [
        Fault(
            "each decoder_sparse_step-th layer is counted from 0",
            "(index + 1) % step == 0",
            "index % step == 0",
            ["core/families/test_moe.py::test_layers_without_experts"],
        ),
    ],
    "icenet/core/families/rotary_keys.py": [
        Fault(
            "scaled rotary positions are read as plain ones",
            '        if ours == "default":\n            return {}',
            '        if ours != "":\n            return {}',
            ["core/families/test_folders.py::test_scaled_positions_are_read"],
        ),
        Fault(
            "the layers without positions are those after the multiples of the interval",
            "int((index + 1) % interval != 0)",
            "int(index % interval != 0)",
            ["core/families/test_position_keys.py::test_layers_without_positions_by_an_interval"],
        ),
        Fault(
            "the rotated part of a head is not read from rope_parameters",
            'given.number("partial_rotary_factor", values.number("partial_rotary_factor", None))',
            'values.number("partial_rotary_factor", None)',
            ["core/families/test_position_keys.py::test_spellings_of_the_rotated_part_of_a_head"],
        ),
    ],
    "icenet/core/families/sentence_transformers.py": [
        Fault(
            "a folder of sentence-transformers without the config.json of a module is read",
            "    file = module / dense.CONFIG\n    if not file.is_file():",
            "    file = module / dense.CONFIG\n    if False:",
            ["core/embedding/test_embed.py::test_a_folder_that_was_copied_in_part_is_named"],
        ),
    ],
    "icenet/core/families/tensors.py": [
        Fault(
            "fused experts are split from the end",
            "return array[:, rows] if self.row.is_fused else array[rows]",
            "return array[:, ::-1][:, rows] if self.row.is_fused else array[rows]",
            ["core/families/test_moe.py::test_experts_are_stacked_from_the_names_of_each_program"],
        ),
        Fault(
            "rows that are packed within heads are split as if they were stacked",
            "        if self.row.is_per_head:\n            parts = array.reshape",
            "        if False:\n            parts = array.reshape",
            ["core/families/test_folders.py::test_packed_tensors_are_split_and_joined"],
        ),
        Fault(
            "transposed tensors are exported as they are",
            "        return joined.T if self.row.is_transposed else joined",
            "        return joined",
            ["core/families/test_folders.py::test_export_is_the_inverse_of_import"],
        ),
    ],
    "icenet/core/families/torchvision.py": [
        Fault(
            "published vision transformers of torchvision have unknown names",
            "new = re.sub(pattern, replacement, new)",
            "pass",
            ["core/families/test_torchvision.py::test_python_converts_with_a_model"],
        ),
        Fault(
            "a version 1 ResNet is written for torchvision, whose ResNets are version 1.5",
            '        "bottleneck_stride": "conv3",\n',
            "",
            ["core/families/test_torchvision.py::test_options_that_torchvision_lacks_are_named"],
        ),
    ],
    "icenet/core/families/vision.py": [
        Fault(
            "the stride of a bottleneck is at the other convolution",
            '"bottleneck_stride", ("conv3", "conv1")',
            '"bottleneck_stride", ("conv1", "conv3")',
            ["core/families/test_folders.py::test_the_strides_of_a_resnet"],
        ),
    ],
    "icenet/core/families/weights.py": [
        Fault(
            "misshapen tensors of a folder are not listed",
            "if name in weights and weights.spec(name).shape != tensor.shape",
            "if name in weights and weights.spec(name).shape[:0] != tensor.shape[:0]",
            ["core/families/test_folders.py::test_all_tensors_that_do_not_fit_are_listed"],
        ),
        Fault(
            "an export of an encoder drops its pooler",
            "set(imported.left_out)",
            "{*imported.left_out, *imported.unused}",
            ["core/families/test_encoders.py::test_folders_are_exported_with_the_same_tensors"],
        ),
    ],
}
