"""Faults in icenet/core/engine."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/core/engine/batches.py": [
        Fault(
            "micro-batches have equal weights",
            'parts.append((part, range(start, end), count_labels(part["labels"]) / counted))',
            "parts.append((part, range(start, end), 1 / number / size))",
            ["core/training/test_training.py::test_the_mean_is_over_labels_and_not_over_micro_batches"],
        ),
        Fault(
            "processes share a row of the batch",
            "edges = [own.start + len(own) * index // number for index in range(number + 1)]",
            "edges = [len(own) * index // number for index in range(number + 1)]",
            ["core/distributed/test_distributed.py::test_micro_batches_of_all_processes_are_the_batch"],
        ),
    ],
    "icenet/core/engine/ema.py": [
        Fault(
            "the average of weights moves by the decay",
            "return 1 - min(decay, (1 + step) / (10 + step))",
            "return min(decay, (1 + step) / (10 + step))",
            ["core/training/test_training.py::test_the_weight_of_an_average"],
        ),
    ],
    "icenet/core/engine/engine.py": [
        Fault(
            "a training process gives freed memory back",
            "        keep_freed_memory()",
            "        pass",
            ["core/host/test_allocator.py::test_training_keeps_it"],
        ),
        Fault(
            "the loss that balances experts is not added",
            "return loss if more is None else loss + more",
            "return loss",
            ["nn/test_experts.py::test_training_has_the_loss_and_gradients_of_transformers"],
        ),
        Fault(
            "random numbers without a key are accepted",
            "        if after != before and",
            "        if not after and",
            ["nn/test_dropout.py::test_random_numbers_without_a_key_are_refused"],
        ),
        Fault(
            "a training step runs outside of the model's arithmetic",
            "    @in_arithmetic\n    def train_step(",
            "    def train_step(",
            [
                "engine/test_arithmetic.py::test_each_use_of_a_pytorch_model_has_its_arithmetic",
                "engine/test_arithmetic.py::test_each_use_of_an_mlx_model_is_on_its_device",
            ],
        ),
        Fault(
            "a skipped step leaves its running statistics",
            (
                "            self.nn.norm.set_running_statistics(self.model, statistics)\n"
                "            return self._submit"
            ),
            "            return self._submit",
            ["models/test_cnn.py::test_a_skipped_step_changes_nothing"],
        ),
        Fault(
            "gradients that cancel out in the first batch are taken for detached logits",
            "if norm.item() == 0 and self._is_detached(batch, step) and loss",
            "if norm.item() == 0 and loss",
            ["core/data/test_images.py::test_equal_images_whose_gradients_cancel_out"],
        ),
        Fault(
            "logits without a gradient are accepted",
            "if norm.item() == 0 and self._is_detached(batch, step) and loss.item() > 0:",
            "if False:",
            ["models/custom/test_custom.py::test_logits_without_a_gradient"],
        ),
        Fault(
            "a micro-batch without labels makes a loss of the user NaN",
            "labelled_rows(batch, len(rows)) or part",
            "part",
            ["core/training/test_user_data.py::test_rows_without_labels_do_not_make_the_loss_nan[torch]"],
        ),
        Fault(
            "a process without rows makes the validation loss NaN",
            "loss = mean.item() if counted else 0.0",
            "loss = mean.item()",
            ["core/training/test_user_data.py::test_rows_without_labels_do_not_make_the_loss_nan[torch]"],
        ),
        Fault(
            "MLX's settings of CUDA replace those of the user",
            "os.environ.setdefault(name, value)",
            "os.environ[name] = value",
            ["engine/test_arithmetic.py::test_kernels_are_started_one_by_one_on_cuda"],
        ),
    ],
    "icenet/core/engine/logits.py": [
        Fault(
            "logits with too few classes are accepted",
            "shape[:-1] != labels or shape[-1] < vocab_size or",
            "shape[:-1] != labels or",
            ["models/test_inputs.py::test_a_model_that_does_not_fit_its_data"],
        ),
        Fault(
            "the dtype of a user's logits is not checked",
            """ or "float" not in dtype:""",
            ":",
            ["engine/test_model_output.py::test_an_output_that_is_not_logits[booleans-mlx]"],
        ),
    ],
    "icenet/core/engine/parameter_groups.py": [
        Fault(
            "the biases of experts decay",
            'return len(shape) - (kinds.get(layout.split(path)[0]) == "stacked_linear")',
            "return len(shape)",
            ["nn/test_experts.py::test_biases_of_experts_have_no_weight_decay"],
        ),
        Fault(
            "norms and biases decay",
            "decay = weight_decay(training) if _num_axes(path, shape, kinds) >= 2 else 0.0",
            "decay = weight_decay(training)",
            ["engine/test_optimizers.py::test_matrices_decay_and_vectors_do_not"],
        ),
        Fault(
            "the last matching parameter group wins",
            "for index, group in enumerate(groups) if matching",
            "for index, group in reversed([*enumerate(groups)]) if matching",
            ["engine/test_optimizers.py::test_a_parameter_is_in_the_first_group_that_matches"],
        ),
    ],
}
