"""Faults in icenet/engine, icenet/generation, icenet/models and icenet/tools."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/engine/build.py": [
        Fault(
            "a new model changes MLX's default device",
            "    with mx.stream(chosen):\n",
            "    mx.set_default_device(chosen)\n    with mx.stream(chosen):\n",
            ["engine/test_arithmetic.py::test_each_use_of_an_mlx_model_is_on_its_device"],
        ),
    ],
    "icenet/engine/engine.py": [
        Fault(
            "gradients of one micro-batch are lost",
            "part_gradients if gradients is None else tree_map(mx.add, gradients, part_gradients)",
            "part_gradients",
            ["core/training/test_training.py::test_micro_batches_give_the_gradients_of_the_whole"],
        ),
        Fault(
            "clipping multiplies without a limit of one",
            "factor = mx.minimum(training.max_grad_norm / (norm + 1e-6), 1.0)",
            "factor = training.max_grad_norm / (norm + 1e-6)",
            ["core/training/test_trainer.py::test_a_norm_below_the_limit_is_not_clipped"],
        ),
        Fault(
            "gradients of fp16 stay multiplied by the loss scale",
            "{path: gradient / loss_scale for path, gradient in gradients.items()}",
            "dict(gradients)",
            ["core/training/test_trainer.py::test_fp16_gradients_do_not_depend_on_the_loss_scale"],
        ),
        Fault(
            "bytes of images are scaled but not shifted on MLX",
            " * mx.array(scale) - mx.array(shift)",
            " * mx.array(scale)",
            ["engine/test_prefetch.py::test_bytes_become_the_values_of_the_host"],
        ),
    ],
    "icenet/engine/optimizers.py": [
        Fault(
            "Adam has no bias correction",
            "mx.array(learning_rate / first, mx.float32)",
            "mx.array(learning_rate, mx.float32)",
            ["engine/test_optimizers.py::test_against_the_formula"],
        ),
        Fault(
            "Adam adds its epsilon before the root",
            'mx.sqrt(v) / self.state["root_correction"] + self.eps',
            'mx.sqrt(v + self.eps) / self.state["root_correction"]',
            ["engine/test_optimizers.py::test_against_the_formula"],
        ),
        Fault(
            "AdamW's decay is not multiplied by the learning rate",
            'second**0.5, mx.float32)\n        self.state["shrink"] = mx.array(1 - learning_rate * ',
            'second**0.5, mx.float32)\n        self.state["shrink"] = mx.array(1 - ',
            ["engine/test_optimizers.py::test_against_the_formula"],
        ),
    ],
    "icenet/generation/cache.py": [
        Fault(
            "the KV cache writes one position late",
            "        self.keys = _write(self.keys, keys, position, first)\n",
            "        self.keys = _write(self.keys, keys, mx.maximum(position - 1, 0), None)\n",
            ["models/test_models.py::test_a_sequence_in_pieces_through_the_cache_equals_the_whole"],
        ),
        Fault(
            "rows of unequal positions attend to all columns",
            "len(self.position) > 1 or ",
            "",
            ["core/generation/test_batching.py::test_rows_of_a_cache_are_moved"],
        ),
        Fault(
            "neighbouring rows of a cache are all written",
            "            first = last + 1\n",
            "            first = last\n",
            ["core/generation/test_batching.py::test_rows_of_a_cache_are_moved"],
        ),
        Fault(
            "a row of an own position is written at the longest one",
            "first = length if len(position) == 1 else None",
            "first = length",
            ["core/generation/test_batching.py::test_rows_of_a_cache_are_moved"],
        ),
        Fault(
            "padding on the left of a batch counts as positions",
            "mx.maximum(columns - self.padding[:, None], 0)",
            "columns",
            ["models/test_models.py::test_a_padded_batch_has_the_logits_of_each_prompt_alone"],
        ),
    ],
    "icenet/generation/decoder.py": [
        Fault(
            "NaN logits choose token 0",
            "t if math.isfinite(b) else -1 for",
            "t for",
            ["core/generation/test_endings.py::test_logits_that_are_not_finite"],
        ),
        Fault(
            "captured steps are not kept",
            "        if key not in steps:\n",
            "        if True:\n",
            ["models/test_kept_steps.py::test_requests_of_the_same_form_are_captured_once"],
        ),
    ],
    "icenet/generation/sampling.py": [
        Fault(
            "top-p drops the token at its boundary",
            "<= 1 - top_p",
            "< 1 - top_p + 0.02",
            [
                "core/generation/test_generation.py::test_scores_equal_the_reference",
                "core/generation/test_generation.py::test_scores_follow_hugging_face",
            ],
        ),
        Fault(
            "min-p is relative to one",
            "threshold = min_p * probabilities.max(axis=-1, keepdims=True)",
            "threshold = min_p",
            ["core/generation/test_generation.py::test_scores_equal_the_reference"],
        ),
        Fault(
            "the repetition penalty divides negative logits",
            "mx.where(logits > 0, logits / penalty, logits * penalty)",
            "logits / penalty",
            ["core/generation/test_generation.py::test_scores_equal_the_reference"],
        ),
    ],
    "icenet/models/base.py": [
        Fault(
            "a model that icenet.build did not make is on a GPU",
            "        with self.arithmetic():\n            return on_cpu()\n",
            "        with self.arithmetic():\n            return self.device is not None and on_cpu()\n",
            ["core/generation/test_batching.py::test_prompts_of_similar_length_are_read_together"],
        ),
    ],
    "icenet/models/fused.py": [
        Fault(
            "a fused block of parallel branches reads the sum, MLX",
            "x if self.parallel else y, second, y)",
            "y, second, y)",
            ["models/test_fused.py::test_a_fused_block_of_mlx_computes_what_the_block_does"],
        ),
    ],
    "icenet/models/transformer.py": [
        Fault(
            "embeddings are not scaled",
            "            x = x * scale\n",
            "            pass\n",
            ["parity/test_parity.py::test_fp32"],
        ),
        Fault(
            "learned positions have no offset",
            "self.position_embedding(positions + self.config.position_offset)",
            "self.position_embedding(positions)",
            ["models/test_options.py::test_encoders_compute_each_row_as_alone"],
        ),
    ],
    "icenet/tools/calls.py": [
        Fault(
            "the generator of MLX is not restored",
            "mx.random.seed((high << 32) | low)",
            "mx.random.seed(low)",
            ["parity/test_compare.py::test_modules_and_generators_stay_unchanged"],
        ),
        Fault(
            "inputs that determine ids are no constants in a replay",
            "    if constants:\n        yield from",
            "    if not constants:\n        yield from",
            ["parity/test_masks_and_ids.py::test_ids_of_values_that_have_no_gradient"],
        ),
    ],
}
