"""Faults in icenet/core/models and icenet/core/nn."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/core/models/base.py": [
        Fault(
            "token ids are not compared with the vocabulary",
            '            check_vocabulary(tokens, self.config.vocab_size, "input_ids")\n',
            "            pass\n",
            ["models/test_inputs.py::test_tokens"],
        ),
        Fault(
            "weights of a file stay in memory next to their copy",
            "        release(array)\n",
            "",
            ["models/test_dtype.py::test_loading_keeps_no_second_copy"],
        ),
        Fault(
            "a model reads an additive mask as its opposite",
            'check_mask(mask, "attention_mask")',
            "pass",
            ["models/test_inputs.py::test_a_mask_that_is_added_to_the_scores"],
        ),
    ],
    "icenet/core/models/buckets.py": [
        Fault(
            "padding changes angles that depend on the number of tokens",
            'scaling.type not in ("dynamic", "longrope")',
            'scaling.type != ""',
            ["models/test_compile.py::test_padding_does_not_change_the_loss"],
        ),
    ],
    "icenet/core/models/build.py": [
        Fault(
            "the class of a model may have its own __call__",
            'if "__call__" in own:',
            'if "__call__ " in own:',
            ["models/custom/test_custom.py::test_a_class_without_forward"],
        ),
    ],
    "icenet/core/models/inference.py": [
        Fault(
            "PyTorch computes with weights that are rounded to the dtype of the scales",
            "dtype=np.float32, kept=kept",
            "kept=kept",
            ["nn/test_quantized_layers.py::test_backends_agree_in_fp32_on_scales_in_half_precision"],
        ),
        Fault(
            "text of a folder without a tokenizer is read as bytes",
            " and not lacks_tokenizer(config, weights)",
            "",
            ["core/families/test_folders.py::test_text_is_not_bytes_without_a_tokenizer"],
        ),
    ],
    "icenet/core/models/init.py": [
        Fault(
            "initial values do not depend on the path",
            "deviation = init_scale / math.sqrt(shape[-1])\n",
            "deviation, path = init_scale / math.sqrt(shape[-1]), name\n",
            ["core/test_rng.py::test_an_initial_value_depends_on_seed_and_path_only"],
        ),
        Fault(
            "sine and cosine of the positions are swapped",
            "np.stack([np.sin(angles), np.cos(angles)]",
            "np.stack([np.cos(angles), np.sin(angles)]",
            ["core/test_rng.py::test_positions_are_those_of_the_paper"],
        ),
    ],
    "icenet/core/models/modules.py": [
        Fault(
            "tensors of a state dict are never tied",
            "places.setdefault(_memory(value) or name, name)",
            "places.setdefault(name, name)",
            ["core/weights/test_twin_names.py::test_a_network_with_other_names[state dict-mapping]"],
        ),
        Fault(
            "biases of an MLX module are lost without a word",
            "if pairing.removed:",
            "if False:",
            ["core/weights/test_twin_names.py::test_transformer_layers_with_biases_are_trained_like_pytorchs"],
        ),
        Fault(
            "an array of MLX is taken for a tensor",
            'if any(base.__module__ == "mlx.core" for',
            "if any(False for",
            ["core/weights/test_copy_errors.py::test_a_misuse_is_one_line[arrays of MLX]"],
        ),
    ],
    "icenet/core/models/ported.py": [
        Fault(
            "a ported model begins with undefined weights",
            "model.set_weights({name: array for name, array in found.items() if name in shapes})",
            "pass",
            ["models/test_ported.py::test_both_backends_begin_with_the_weights_of_the_folder"],
        ),
    ],
    "icenet/core/models/twins.py": [
        Fault(
            "what the twins train is not compared",
            "    if mlx.trained and not torch.trained:\n",
            "    if False:\n",
            ["models/test_twins.py::test_a_mismatch_is_named_when_the_model_is_built"],
        ),
        Fault(
            "what the twins share is not compared",
            "    if mlx.tied_to != torch.tied_to and (mlx.trained or torch.trained):\n",
            "    if False:\n",
            ["models/test_twins.py::test_a_tie_on_one_side_is_named"],
        ),
    ],
    "icenet/core/nn/dropout.py": [
        Fault(
            "a layer has the same mask in each of its calls",
            "        self._calls = call + 1\n",
            "",
            ["nn/test_dropout.py::test_the_frameworks_dropout_has_equal_masks_and_the_right_rate"],
        ),
        Fault(
            "all rows have the dropout key of the first",
            "return keys if shape[0] % keys.shape[0] == 0 else keys[:1]",
            "return keys[:1]",
            ["core/training/test_training.py::test_micro_batches_give_the_gradients_of_the_whole"],
        ),
        Fault(
            "dropout does not scale the values it keeps",
            "1 / (1 - self.p) if",
            "1.0 if",
            ["core/test_rng.py::test_dropout_rate_and_scale"],
        ),
    ],
    "icenet/core/nn/relative_positions.py": [
        Fault(
            "distances to later tokens are those to earlier ones",
            "before[1:] + np.int32(buckets // 2)",
            "before[1:]",
            ["models/test_options.py::test_distances_have_the_groups_of_the_formula"],
        ),
    ],
}
