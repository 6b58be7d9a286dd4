"""The planted faults: one small, plausible mistake each, and the tests that must find it."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A mistake in one file: `old` is replaced by `new`.

    Attributes:
        name: The mistake in words.
        file: Path in the checkout.
        old: Text that occurs exactly once in the file.
        new: Its replacement.
        tests: Tests that must fail, below `parity_tests/`.
    """

    name: str
    file: str
    old: str
    new: str
    tests: list[str]


FAULTS: list[Fault] = [
    # ---- random numbers and initial values -------------------------------------------------------------------
    Fault(
        "a key ignores its words",
        "icenet/core/rng.py",
        "        result = fold(result, word)\n",
        "        result = fold(result, stream)\n",
        ["core/test_rng.py::test_different_words_give_different_keys"],
    ),
    Fault(
        "a rotation of threefry is wrong",
        "icenet/core/rng.py",
        "(17, 29, 16, 24)",
        "(17, 29, 16, 25)",
        ["core/test_rng.py::test_published_vectors"],
    ),
    Fault(
        "dropout keeps the values it should drop",
        "icenet/nn/dropout.py",
        "(words >= mx.array(rng.dropout_threshold(p), mx.uint32))",
        "(words < mx.array(rng.dropout_threshold(p), mx.uint32))",
        ["core/test_rng.py::test_dropout_masks_agree"],
    ),
    Fault(
        "all rows have the dropout key of the first",
        "icenet/core/models/dropout.py",
        "return keys if shape[0] % keys.shape[0] == 0 else keys[:1]",
        "return keys[:1]",
        ["core/test_rng.py::test_each_site_step_and_row_has_a_mask_of_its_own"],
    ),
    Fault(
        "dropout does not scale the values it keeps",
        "icenet_torch/nn/dropout.py",
        "1 / (1 - self.p)",
        "1.0",
        ["core/test_rng.py::test_dropout_keeps_the_share_it_should_and_scales_it"],
    ),
    Fault(
        "initial values do not depend on the path",
        "icenet/core/models/init.py",
        "deviation = init_scale / math.sqrt(shape[-1])\n",
        "deviation, path = init_scale / math.sqrt(shape[-1]), name\n",
        ["core/test_rng.py::test_a_parameter_starts_from_its_seed_and_path_alone"],
    ),
    Fault(
        "sine and cosine of the positions are swapped",
        "icenet/core/models/init.py",
        "np.stack([np.sin(angles), np.cos(angles)]",
        "np.stack([np.cos(angles), np.sin(angles)]",
        ["core/test_rng.py::test_positions_are_the_papers"],
    ),
    # ---- layers and models -----------------------------------------------------------------------------------
    Fault(
        "the forget and input gates of MLX's LSTM are swapped",
        "icenet/nn/recurrent.py",
        "        i, f, g, o = mx.split(gates[-1], 4, axis=-1)  # [B, H] each",
        "        f, i, g, o = mx.split(gates[-1], 4, axis=-1)  # [B, H] each",
        ["models/test_rnn.py::test_the_equations"],
    ),
    Fault(
        "the GRU's reset gate acts before the product with the bias",
        "icenet/nn/recurrent.py",
        "n = mx.tanh(projected_n[step] + r * recurrent_n)",
        "n = mx.tanh(projected_n[step] + r * (recurrent_n - bias_hn) + bias_hn)",
        ["models/test_rnn.py::test_the_equations"],
    ),
    Fault(
        "an LSTM's gradient ignores the cell state before the first step",
        "icenet/nn/recurrent.py",
        "states_before(c0, cs) * f * (1 - f)",
        "states_before(mx.zeros_like(c0), cs) * f * (1 - f)",
        [
            "models/test_rnn.py::test_in_pieces",
            "models/test_rnn.py::test_mlxs_own_layers",
            "models/test_rnn.py::test_gradient_checkpointing_changes_nothing",
        ],
    ),
    Fault(
        "padding moves the state of MLX's LSTM",
        "icenet/nn/recurrent.py",
        "h = where(step_mask, o * tanh_cs[-1], h)",
        "h = o * tanh_cs[-1]",
        ["models/test_rnn.py::test_padding_moves_no_state"],
    ),
    Fault(
        "the epsilon of layer norm is 1e-6",
        "icenet/nn/norm.py",
        "eps: float = 1e-5",
        "eps: float = 1e-6",
        ["parity/test_parity.py::test_the_mirror_equals_torchs_encoder_layer", "parity/test_parity.py::test_fp32"],
    ),
    Fault(
        "the running variance of batch norm is biased",
        "icenet/nn/norm.py",
        "m * (var * (count / (count - 1)))",
        "m * var",
        ["models/test_cnn.py::test_batch_norm_is_torchs_own"],
    ),
    Fault(
        "batch norm uses the batch's statistics in evaluation",
        "icenet_torch/nn/norm.py",
        "self.bias, self.training, 1.0, self.eps)",
        "self.bias, True, 1.0, self.eps)",
        [
            "models/test_cnn.py::test_batch_norm_is_torchs_own",
            "models/test_cnn.py::test_only_training_moves_the_running_statistics",
        ],
    ),
    Fault(
        "the running statistics have momentum 0.9",
        "icenet/nn/norm.py",
        "keep, m = 1 - self.momentum, self.momentum",
        "m, keep = 1 - self.momentum, self.momentum",
        ["models/test_cnn.py::test_batch_norm_is_torchs_own"],
    ),
    Fault(
        "the causal mask with padding hides the token itself",
        "icenet/nn/attention.py",
        "mask = mask & (keys <= queries)\n",
        "mask = mask & (keys < queries - 1)\n",
        [
            "models/test_models.py::test_padding_changes_nothing_for_real_positions",
            "parity/test_parity.py::test_padding",
        ],
    ),
    Fault(
        "the causal mask with padding shows the next token",
        "icenet_torch/nn/attention.py",
        "keys <= queries",
        "keys <= queries + 1",
        [
            "models/test_models.py::test_padding_changes_nothing_for_real_positions",
            "parity/test_parity.py::test_padding",
        ],
    ),
    Fault(
        "attention scores are not scaled",
        "icenet/nn/attention.py",
        "scale = q.shape[-1] ** -0.5",
        "scale = 1.0",
        ["parity/test_parity.py::test_fp32"],
    ),
    Fault(
        "embeddings are not scaled",
        "icenet/models/transformer.py",
        "self.token_embedding(input_ids) * self.config.hidden_size**0.5 + positions",
        "self.token_embedding(input_ids) + positions",
        ["parity/test_parity.py::test_fp32"],
    ),
    Fault(
        "positions count padding on the left",
        "icenet/models/transformer.py",
        "positions = self._positions[mx.maximum(counted - 1, 0)]",
        "positions = self._positions[start : start + length]",
        ["models/test_models.py::test_padding_changes_nothing_for_real_positions"],
    ),
    Fault(
        "post-norm adds the residual after the norm",
        "icenet_torch/models/transformer.py",
        "x = self.attention_norm(x + self.attention(x, mask, cache))",
        "x = x + self.attention_norm(self.attention(x, mask, cache))",
        ["parity/test_parity.py::test_the_mirror_equals_torchs_encoder_layer"],
    ),
    Fault(
        "the KV cache writes one position late",
        "icenet/generation/cache.py",
        "        self.keys[:, :, start : self.length] = keys\n",
        "        self.keys[:, :, max(start - 1, 0) : max(start - 1, 0) + keys.shape[2]] = keys\n",
        ["models/test_models.py::test_the_cache_in_pieces_gives_what_the_whole_gives"],
    ),
    Fault(
        "max-pooling gives the gradient to the last of equal values",
        "icenet/nn/conv.py",
        "mx.where(value > best, value, best)",
        "mx.where(value >= best, value, best)",
        ["models/test_cnn.py::test_max_pooling_gives_the_gradient_to_the_first_of_equals"],
    ),
    # ---- loss and training step ------------------------------------------------------------------------------
    Fault(
        "the loss is the mean over padding, too",
        "icenet/nn/loss.py",
        "counted / mx.maximum(count, 1)",
        "counted / counted.size",
        [
            "core/data/test_text.py::test_filling_up_changes_nothing",
            "core/training/test_training.py::test_the_mean_is_over_labels_and_not_over_micro_batches",
        ],
    ),
    Fault(
        "micro-batches have equal weights",
        "icenet/core/engine.py",
        'parts.append((part, range(start, end), int((part["labels"] >= 0).sum()) / counted))',
        "parts.append((part, range(start, end), 1 / number / size))",
        ["core/training/test_training.py::test_the_mean_is_over_labels_and_not_over_micro_batches"],
    ),
    Fault(
        "gradients of one micro-batch are lost",
        "icenet/engine/engine.py",
        "part_gradients if gradients is None else tree_map(mx.add, gradients, part_gradients)",
        "part_gradients",
        ["core/training/test_training.py::test_micro_batches_give_the_gradients_of_the_whole"],
    ),
    Fault(
        "clipping multiplies without a limit of one",
        "icenet/engine/engine.py",
        "factor = mx.minimum(training.max_grad_norm / (norm + 1e-6), 1.0)",
        "factor = training.max_grad_norm / (norm + 1e-6)",
        ["core/training/test_trainer.py::test_clipping"],
    ),
    Fault(
        "gradients of fp16 stay multiplied by the loss scale",
        "icenet/engine/engine.py",
        "{path: gradient / loss_scale for path, gradient in gradients.items()}",
        "dict(gradients)",
        ["core/training/test_trainer.py::test_fp16_skips_and_halves"],
    ),
    Fault(
        "the loss scale is not halved",
        "icenet/core/training/loss_scale.py",
        "max(self.scale / 2, 1.0)",
        "self.scale",
        ["core/training/test_trainer.py::test_the_loss_scale"],
    ),
    Fault(
        "the loss scale doubles one step early",
        "icenet/core/training/loss_scale.py",
        "if self.good_steps >= GROWTH_INTERVAL:",
        "if self.good_steps >= GROWTH_INTERVAL - 1:",
        ["core/training/test_trainer.py::test_the_loss_scale"],
    ),
    Fault(
        "a skipped step leaves its running statistics",
        "icenet/core/engine.py",
        "            self.nn.norm.set_running_statistics(self.model, statistics)\n            return loss",
        "            return loss",
        ["models/test_cnn.py::test_a_skipped_step_leaves_no_trace"],
    ),
    Fault(
        "processes share a row of the batch",
        "icenet/core/engine.py",
        "edges = [own.start + len(own) * index // number for index in range(number + 1)]",
        "edges = [len(own) * index // number for index in range(number + 1)]",
        ["core/distributed/test_distributed.py::test_micro_batches_of_all_processes_make_the_batch"],
    ),
    # ---- optimizers and schedules ----------------------------------------------------------------------------
    Fault(
        "Adam has no bias correction",
        "icenet/engine/optimizers.py",
        "mx.array(learning_rate / first, mx.float32)",
        "mx.array(learning_rate, mx.float32)",
        ["engine/test_optimizers.py::test_against_the_formula"],
    ),
    Fault(
        "the bias correction is one step late",
        "icenet/core/training/schedule.py",
        "return 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)",
        "return 1 - beta1 ** (step + 2), 1 - beta2 ** (step + 2)",
        ["engine/test_optimizers.py::test_against_the_formula"],
    ),
    Fault(
        "Adam adds its epsilon before the root",
        "icenet/engine/optimizers.py",
        'mx.sqrt(v) / self.state["root_correction"] + self.eps',
        'mx.sqrt(v + self.eps) / self.state["root_correction"]',
        ["engine/test_optimizers.py::test_against_the_formula"],
    ),
    Fault(
        "AdamW's decay is not multiplied by the learning rate",
        "icenet/engine/optimizers.py",
        'second**0.5, mx.float32)\n        self.state["shrink"] = mx.array(1 - learning_rate * ',
        'second**0.5, mx.float32)\n        self.state["shrink"] = mx.array(1 - ',
        ["engine/test_optimizers.py::test_against_the_formula"],
    ),
    Fault(
        "norms and biases decay",
        "icenet/core/training/parameter_groups.py",
        "decay = weight_decay(training) if len(shape) >= 2 else 0.0",
        "decay = weight_decay(training)",
        ["engine/test_optimizers.py::test_matrices_decay_and_vectors_do_not"],
    ),
    Fault(
        "the last matching parameter group wins",
        "icenet/core/training/parameter_groups.py",
        "for group in training.parameter_groups if _fits(group, path)",
        "for group in reversed(training.parameter_groups) if _fits(group, path)",
        ["engine/test_optimizers.py::test_a_parameter_is_in_the_first_group_that_matches"],
    ),
    Fault(
        "warm-up begins at zero",
        "icenet/core/training/schedule.py",
        "return peak * (step + 1) / warmup",
        "return peak * step / warmup",
        [
            "core/training/test_schedules.py::test_as_pytorchs_schedulers",
            "core/training/test_trainer.py::test_the_schedule_by_hand",
        ],
    ),
    Fault(
        "the cosine ends one step late",
        "icenet/core/training/schedule.py",
        "since / max(training.max_steps - 1 - warmup, 1)",
        "since / max(training.max_steps - warmup, 1)",
        ["core/training/test_schedules.py::test_as_pytorchs_schedulers"],
    ),
    Fault(
        "the average of weights moves by the decay",
        "icenet/core/training/schedule.py",
        "return 1 - min(decay, (1 + step) / (10 + step))",
        "return min(decay, (1 + step) / (10 + step))",
        ["core/training/test_training.py::test_the_weight_of_an_average"],
    ),
    Fault(
        "early stopping waits for one more evaluation",
        "icenet/core/training/early_stopping.py",
        "self.num_bad_evals >= patience",
        "self.num_bad_evals > patience",
        ["core/training/test_training.py::test_the_best_evaluation"],
    ),
    Fault(
        "an equal validation loss counts as better",
        "icenet/core/training/early_stopping.py",
        "if validation_loss < (math.inf",
        "if validation_loss <= (math.inf",
        ["core/training/test_training.py::test_the_best_evaluation"],
    ),
    # ---- runs and checkpoints --------------------------------------------------------------------------------
    Fault(
        "the learning rate is that of the next step",
        "icenet/core/training/trainer.py",
        "rate = learning_rate(self.step, training)",
        "rate = learning_rate(self.step + 1, training)",
        [
            "core/training/test_trainer.py::test_the_schedule_by_hand",
            "core/training/test_trainer.py::test_adamw_20_steps",
        ],
    ),
    Fault(
        "a resumed run repeats a step",
        "icenet/core/training/trainer.py",
        "trainer = cls(config, plan.run, engine, found.step, scale, quiet)",
        "trainer = cls(config, plan.run, engine, max(found.step - 1, 0), scale, quiet)",
        ["core/training/test_trainer.py::test_resume_is_exact"],
    ),
    Fault(
        "a resumed run starts with a new optimizer state",
        "icenet/core/training/trainer.py",
        "        engine.set_optimizer_state(dict(found.optimizer))\n",
        "",
        ["core/training/test_trainer.py::test_resume_is_exact"],
    ),
    Fault(
        "a checkpoint is not verified",
        "icenet/core/training/checkpoint.py",
        'if file.stat().st_size != entry.get("bytes") or weight_files.checksum(file) != entry.get("sha256"):',
        'if file.stat().st_size != entry.get("bytes"):',
        ["core/training/test_checkpoint.py::test_damage"],
    ),
    Fault(
        "the oldest checkpoints are kept",
        "icenet/core/training/checkpoint.py",
        "*list_checkpoints(run)[-keep:]",
        "*list_checkpoints(run)[:keep]",
        ["core/training/test_checkpoint.py::test_keep"],
    ),
    Fault(
        "the validation loss is the mean over batches",
        "icenet/core/training/trainer.py",
        "total + found.loss * found.labels, count + found.labels",
        "total + found.loss, count + 1",
        [
            "core/training/test_trainer.py::test_the_evaluation_is_the_mean_over_tokens",
            "core/data/test_text.py::test_training_on_rows_of_their_own",
        ],
    ),
    # ---- data ------------------------------------------------------------------------------------------------
    Fault(
        "labels are the inputs",
        "icenet/core/data/text/packed.py",
        '"labels": np.ascontiguousarray(windows[:, 1:])',
        '"labels": np.ascontiguousarray(windows[:, :-1])',
        ["core/data/test_data.py::test_an_epoch_covers_windows_once"],
    ),
    Fault(
        "each epoch has the same order",
        "icenet/core/data/text/packed.py",
        'rng.permutation(rng.key(self.seed, "data", epoch), self._windows)',
        'rng.permutation(rng.key(self.seed, "data", 0), self._windows)',
        ["core/data/test_data.py::test_documented_formula_of_the_order"],
    ),
    Fault(
        "the order does not depend on the seed",
        "icenet/core/data/text/packed.py",
        'rng.key(self.seed, "data", epoch)',
        'rng.key(0, "data", epoch)',
        ["core/data/test_data.py::test_order_is_a_pure_function_of_seed_and_step"],
    ),
    Fault(
        "padding is counted in the loss",
        "icenet/core/data/text/documents.py",
        "labels = np.full((len(rows), longest), IGNORED, np.int32)",
        "labels = np.full((len(rows), longest), self._eot_id, np.int32)",
        ["core/data/test_text.py::test_every_text_begins_a_row_of_its_own"],
    ),
    Fault(
        "a crop is off by one",
        "icenet/core/data/images/augment.py",
        "image[:] = source[top : top + height, left : left + width]",
        "image[:] = source[top : top + height, left + 1 : left + 1 + width]",
        ["core/data/test_images.py::test_augmentation"],
    ),
    Fault(
        "images are normalized without the mean",
        "icenet/core/data/images/augment.py",
        "* scale.astype(np.float32) - shift.astype(np.float32)",
        "* scale.astype(np.float32)",
        ["core/data/test_images.py::test_normalization"],
    ),
    Fault(
        "the standard deviation is that of values up to 255",
        "icenet/core/data/images/augment.py",
        "scale = 1 / (255 * np.asarray(std, np.float64))",
        "scale = 1 / np.asarray(std, np.float64)",
        ["core/data/test_images.py::test_normalization"],
    ),
    Fault(
        "all images of an epoch are mirrored alike",
        "icenet/core/data/images/augment.py",
        'mirrored = rng.fold(keys, "flip")[:, 0] >= 2**31',
        'mirrored = np.full(len(images), rng.fold(keys, "flip")[0, 0] >= 2**31)',
        ["core/data/test_images.py::test_augmentation"],
    ),
    Fault(
        "documents are not separated by an end-of-text token",
        "icenet/core/data/text/prepare.py",
        "self._needs_eot = position.tokens > self._block_start\n        if tokens",
        "self._needs_eot = False\n        if tokens",
        ["core/data/test_text.py::test_lines_are_texts_in_blocks_of_a_drawn_order"],
    ),
    # ---- weights ---------------------------------------------------------------------------------------------
    Fault(
        "a convolution's weight has height and width swapped",
        "icenet/core/weights/layout.py",
        '"conv2d": {"weight": _axes(0, 2, 3, 1)',
        '"conv2d": {"weight": _axes(0, 3, 2, 1)',
        ["core/weights/test_convert.py::test_a_layer_computes_the_same_on_both_sides"],
    ),
    Fault(
        "a transposed convolution has the layout of a convolution",
        "icenet/core/weights/layout.py",
        '"conv_transpose2d": {"weight": _axes(1, 2, 3, 0)',
        '"conv_transpose2d": {"weight": _axes(0, 2, 3, 1)',
        ["core/weights/test_convert.py::test_a_layer_computes_the_same_on_both_sides"],
    ),
    Fault(
        "weights of torch.nn.GRU lose the recurrent bias of n",
        "icenet/core/weights/torch_rnn.py",
        "        bias[n_gate] = first[n_gate]\n",
        "",
        ["models/test_rnn.py::test_torchs_module_imported_and_exported"],
    ),
    Fault(
        "a checkpoint names int32 as uint32",
        "icenet/core/weights/safetensors.py",
        '"I32": np.dtype("<i4")',
        '"I32": np.dtype("<u4")',
        ["core/weights/test_weights.py::test_the_bytes_are_those_of_the_safetensors_package"],
    ),
    # ---- generation ------------------------------------------------------------------------------------------
    Fault(
        "top-p drops the token at its boundary",
        "icenet/generation/sampling.py",
        "<= 1 - top_p",
        "< 1 - top_p + 0.02",
        [
            "core/generation/test_generation.py::test_scores_follow_the_rules",
            "core/generation/test_generation.py::test_scores_follow_hugging_face",
        ],
    ),
    Fault(
        "top-k keeps one more token",
        "icenet_torch/generation/sampling.py",
        "torch.topk(logits, top_k, dim=-1)",
        "torch.topk(logits, top_k + 1, dim=-1)",
        ["core/generation/test_generation.py::test_scores_follow_the_rules"],
    ),
    Fault(
        "min-p is relative to one",
        "icenet/generation/sampling.py",
        "threshold = min_p * probabilities.max(axis=-1, keepdims=True)",
        "threshold = min_p",
        ["core/generation/test_generation.py::test_scores_follow_the_rules"],
    ),
    Fault(
        "the repetition penalty divides negative logits",
        "icenet/generation/sampling.py",
        "mx.where(logits > 0, logits / penalty, logits * penalty)",
        "logits / penalty",
        ["core/generation/test_generation.py::test_scores_follow_the_rules"],
    ),
    Fault(
        "temperature comes after the filters",
        "icenet/core/generation/sampling.py",
        "    logits = logits / max(settings.temperature, MIN_TEMPERATURE)\n",
        "",
        ["core/generation/test_generation.py::test_scores_follow_the_rules"],
    ),
    Fault(
        "all rows draw the same numbers",
        "icenet/core/generation/sampling.py",
        "np.arange(rows))",
        "np.zeros(rows, np.int64))",
        ["core/generation/test_generation.py::test_draw_keys_are_one_per_row_and_token"],
    ),
    Fault(
        "a stop token stays in the text",
        "icenet/core/generation/stopping.py",
        "            tokens.pop()\n            return True",
        "            return True",
        ["core/generation/test_generation.py::test_stop_tokens"],
    ),
    Fault(
        "prompts of unequal length are padded on the right",
        "icenet/core/generation/prompts.py",
        "tokens[index, length - len(row) :] = row\n        mask[index, length - len(row) :] = True",
        "tokens[index, : len(row)] = row\n        mask[index, : len(row)] = True",
        [
            "core/generation/test_generation.py::test_a_mask_is_what_unequal_prompts_are",
            "core/generation/test_generation.py::test_the_first_row_does_not_depend_on_the_others",
        ],
    ),
    Fault(
        "positions begin at one after the cache",
        "icenet_torch/models/transformer.py",
        "start = cache[0].length if cache else 0",
        "start = cache[0].length + 1 if cache else 0",
        ["models/test_models.py::test_the_cache_in_pieces_gives_what_the_whole_gives"],
    ),
    # ---- configuration, commands, architecture ---------------------------------------------------------------
    Fault(
        "an unknown key is ignored",
        "icenet/core/config/section.py",
        'extra="forbid"',
        'extra="ignore"',
        ["core/config/test_config.py::test_bad_files"],
    ),
    Fault(
        "a usage error exits with 1",
        "icenet/core/errors.py",
        "    exit_code = 2",
        "    exit_code = 1",
        ["commands/test_bad_inputs.py::test_bad_input"],
    ),
    Fault(
        "core imports PyTorch",
        "icenet/core/rng.py",
        "import hashlib\n",
        "import hashlib\n\nimport torch\n",
        ["architecture/test_imports.py::test_shared_code_imports_no_framework"],
    ),
    Fault(
        "an import cycle through a late import",
        "icenet/core/rng.py",
        "Words = NDArray[np.uint32]\n",
        "Words = NDArray[np.uint32]\n\n\ndef _late() -> None:\n    from icenet.core.models import init\n",
        ["architecture/test_imports.py::test_there_is_no_import_cycle"],
    ),
    Fault(
        "MLX is imported before the BLAS is chosen",
        "icenet/nn/loss.py",
        "import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)\n\n",
        "",
        ["architecture/test_imports.py::test_a_fast_blas_is_loaded_before_mlx"],
    ),
    Fault(
        "one backend renames an attribute",
        "icenet_torch/models/transformer.py",
        "        self.embedding_dropout = ops.Dropout(config.dropout)\n",
        "        self.input_dropout = self.embedding_dropout = ops.Dropout(config.dropout)\n",
        ["architecture/test_mirror.py::test_models_have_the_same_methods_arguments_and_attributes"],
    ),
    Fault(
        "one backend changes a line of a model",
        "icenet_torch/models/transformer.py",
        "return x + self.feed_forward(self.feed_forward_norm(x))",
        "return x + 1.0 * self.feed_forward(self.feed_forward_norm(x))",
        ["architecture/test_mirror.py::test_model_files_differ_in_framework_words_only"],
    ),
    # ---- parity ----------------------------------------------------------------------------------------------
    Fault(
        "a ratio of 80 passes",
        "icenet/parity/yardstick.py",
        "FACTOR = 8.0",
        "FACTOR = 80.0",
        ["parity/test_yardstick.py::test_seven_times_the_noise_passes_and_ten_times_does_not"],
    ),
    Fault(
        "the noise is that of MLX",
        "icenet/parity/yardstick.py",
        "error, noise, rounding = np.abs(a - r), np.abs(b - r), half_ulp(r, stored)",
        "error, noise, rounding = np.abs(a - r), np.abs(a - r), half_ulp(r, stored)",
        ["parity/test_yardstick.py::test_seven_times_the_noise_passes_and_ten_times_does_not"],
    ),
    Fault(
        "every tensor passes",
        "icenet/parity/yardstick.py",
        "        return self.ratio <= FACTOR\n",
        "        return True\n",
        ["parity/test_yardstick.py::test_seven_times_the_noise_passes_and_ten_times_does_not"],
    ),
    Fault(
        "one wrong element among a million passes",
        "icenet/parity/yardstick.py",
        "return max(self.rms_ratio, self.peak_ratio)",
        "return self.rms_ratio",
        ["parity/test_yardstick.py::test_one_wrong_element_in_a_million_fails"],
    ),
    Fault(
        "a training curve is judged at its end only",
        "icenet/parity/yardstick.py",
        "worst, strict_step = int(np.argmax(ratios)), int(np.argmax(strict))",
        "worst, strict_step = len(ratios) - 1, int(np.argmax(strict))",
        ["parity/test_yardstick.py::test_curves_are_compared_step_by_step"],
    ),
    Fault(
        "values that are not finite pass",
        "icenet/parity/yardstick.py",
        "    if not finite.all():\n        # fp16",
        "    if False:\n        # fp16",
        ["parity/test_yardstick.py::test_values_that_are_not_finite_must_agree"],
    ),
]
