"""Faults in icenet/core/training and icenet/core/training/notices."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/core/training/checkpoint_writer.py": [
        Fault(
            "a checkpoint does not record the source of imported weights",
            "origin.metadata() if (origin := self.engine.model.origin) else {},",
            "{},",
            ["core/training/test_initial_weights.py::test_a_trained_import_is_exported_as_what_it_was"],
        ),
        Fault(
            "a changed loss is not said",
            'state["loss_code"] = user_code.hashes(getattr(self.engine.loss, "__module__", ""))',
            "pass",
            ["core/training/test_user_data.py::test_changed_code_is_said"],
        ),
    ],
    "icenet/core/training/evaluation.py": [
        Fault(
            "the validation loss is the mean over batches",
            "total + found.loss * found.labels, count + found.labels",
            "total + found.loss, count + 1",
            [
                "core/training/test_trainer.py::test_the_evaluation_is_the_mean_over_tokens",
                "core/data/test_data.py::test_training_on_padded_rows",
            ],
        ),
    ],
    "icenet/core/training/initial_weights.py": [
        Fault(
            "a new output layer has other initial values than a new model",
            "engine.model.initial_weights(config.seed, paths=paths)",
            "engine.model.initial_weights(config.seed + 1, paths=paths)",
            ["core/training/test_image_models.py::test_a_new_head"],
        ),
    ],
    "icenet/core/training/loss_scale.py": [
        Fault(
            "the loss scale is not halved",
            "max(self.scale / 2, 1.0)",
            "self.scale",
            ["core/training/test_trainer.py::test_the_loss_scale"],
        ),
        Fault(
            "the loss scale doubles one step early",
            "if self.good_steps >= GROWTH_INTERVAL:",
            "if self.good_steps >= GROWTH_INTERVAL - 1:",
            ["core/training/test_trainer.py::test_the_loss_scale"],
        ),
    ],
    "icenet/core/training/notices/changed_keys.py": [
        Fault(
            "another seed of images is not said to mix training and validation images",
            '*(["seed"] if is_images else []), ',
            "",
            ["core/training/notices/test_changed_keys.py::test_the_seed_of_images_decides_which_are_held_out"],
        ),
    ],
    "icenet/core/training/notices/continuation.py": [
        Fault(
            "a resumed run does not say that TF32 has changed",
            "if before is not None and before != engine.tf32:",
            "if False:",
            ["engine/test_arithmetic.py::test_a_run_records_its_arithmetic"],
        ),
    ],
    "icenet/core/training/notices/unused_keys.py": [
        Fault(
            "a group whose parameters belong to earlier groups is not named",
            "own = [path for path, owner in owners.items() if owner == index]",
            "own = list(owners)",
            ["core/training/notices/test_unused_keys.py::test_parameter_groups_without_effect"],
        ),
    ],
    "icenet/core/training/own_folder.py": [
        Fault(
            "TensorBoard's files of another run go with those of a run that failed in its first step",
            "                if run_folder.TENSORBOARD not in before:\n",
            "                if before is not None:\n",
            ["core/runs/test_run_folder.py::test_a_failed_first_step_leaves_the_folder_as_it_was"],
        ),
    ],
    "icenet/core/training/prefetch.py": [
        Fault(
            "a batch that was read ahead is used for any step",
            " and planned[0] == step else",
            " else",
            ["engine/test_prefetch.py::test_each_step_has_its_batch"],
        ),
    ],
    "icenet/core/training/schedule.py": [
        Fault(
            "the bias correction is one step late",
            "return 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)",
            "return 1 - beta1 ** (step + 2), 1 - beta2 ** (step + 2)",
            ["engine/test_optimizers.py::test_against_the_formula"],
        ),
        Fault(
            "warm-up begins at zero",
            "return peak * (step + 1) / warmup",
            "return peak * step / warmup",
            [
                "core/training/test_schedules.py::test_as_pytorchs_schedulers",
                "core/training/test_trainer.py::test_the_schedule_by_hand",
            ],
        ),
        Fault(
            "the cosine ends one step late",
            "since / max(steps - 1 - warmup, 1)",
            "since / max(steps - warmup, 1)",
            ["core/training/test_schedules.py::test_as_pytorchs_schedulers"],
        ),
    ],
    "icenet/core/training/skipped_steps.py": [
        Fault(
            "skipped steps add up over finite ones",
            "            self._in_a_row = 0\n            return True",
            "            return True",
            ["core/training/test_training.py::test_only_steps_in_a_row_end_a_run"],
        ),
    ],
    "icenet/core/training/trainer.py": [
        Fault(
            "a wrong id of a later batch is a loss that is not finite",
            "            self.engine.check_embeddings(batch, pending.step)\n",
            "            del batch\n",
            ["nn/test_embedding.py::test_a_later_batch_with_a_wrong_id"],
        ),
        Fault(
            "the layers of a continued run are read from an old checkpoint",
            "self._layers = sentence_transformers.dense_files(config.embedding)",
            "self._layers: Any = {}",
            ["core/embedding/test_embed.py::test_a_run_has_the_dense_layers_of_its_model"],
        ),
        Fault(
            "a run with data of a user's class loses the tokenizer of its model",
            "        initial_weights.files_for(config, trainer.dataset)\n",
            "",
            [
                "core/training/test_initial_weights.py::test_a_run_with_data_of_a_user_keeps_the_tokenizer_of_its_model"
            ],
        ),
        Fault(
            "a run continues on the other backend with a model that trains other arrays",
            "        twins.check_same_model(found.state, engine.model, str(found.path))\n",
            "",
            ["models/test_twins.py::test_a_mismatch_is_named_when_the_model_is_built"],
        ),
        Fault(
            "the learning rate is that of the next step",
            "rate = learning_rate(self.step, training)",
            "rate = learning_rate(self.step + 1, training)",
            ["core/training/test_schedules.py::test_the_table_is_the_runs"],
        ),
        Fault(
            "a resumed run repeats a step",
            "trainer = cls(config, plan.run, engine, found.step, scale, quiet, given)",
            "trainer = cls(config, plan.run, engine, max(found.step - 1, 0), scale, quiet, given)",
            ["core/training/test_trainer.py::test_resume_is_exact"],
        ),
        Fault(
            "a resumed run starts with a new optimizer state",
            "        engine.set_optimizer_state(dict(found.optimizer))\n",
            "",
            ["core/training/test_trainer.py::test_resume_is_exact"],
        ),
        Fault(
            "a continued run forgets the source of imported weights",
            "engine.model.origin = Origin.of(found.weights)",
            "engine.model.origin = None",
            ["core/training/test_initial_weights.py::test_a_trained_import_is_exported_as_what_it_was"],
        ),
        Fault(
            "steps that a resumed run repeats are not mentioned",
            "[*self.notes, *unused, *repeated]",
            "[*self.notes, *unused]",
            ["core/runs/test_run_folder.py::test_a_missing_newest_checkpoint_is_named"],
        ),
        Fault(
            "the last step is not evaluated",
            "(self.step % training.eval_every == 0 or is_last)",
            "self.step % training.eval_every == 0",
            ["core/training/test_training.py::test_the_last_step_ends_a_run_as_planned"],
        ),
        Fault(
            "a run ends early at its last step",
            "should_stop(training.early_stopping) and not is_last",
            "should_stop(training.early_stopping)",
            ["core/training/test_training.py::test_the_last_step_ends_a_run_as_planned"],
        ),
        Fault(
            "the loss of a run is that of a skipped step",
            "        if math.isfinite(result.loss):\n            self._last_loss = result.loss",
            "        self._last_loss = result.loss",
            ["core/training/test_training.py::test_the_last_step_ends_a_run_as_planned"],
        ),
        Fault(
            "a signal in the last step interrupts a complete run",
            "if self._stop_signal is not None and self.step < training.max_steps:",
            "if self._stop_signal is not None:",
            ["core/training/test_training.py::test_the_last_step_ends_a_run_as_planned"],
        ),
    ],
}
