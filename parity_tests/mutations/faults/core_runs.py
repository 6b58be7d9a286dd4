"""Faults in icenet/core/runs."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/core/runs/checkpoint.py": [
        Fault(
            "a checkpoint is not verified",
            'if file.stat().st_size != entry.get("bytes") or weight_files.checksum(file) != entry.get("sha256"):',
            'if file.stat().st_size != entry.get("bytes"):',
            ["core/runs/test_checkpoint.py::test_damage"],
        ),
        Fault(
            "the oldest checkpoints are kept",
            "*list_checkpoints(run)[-keep:]",
            "*list_checkpoints(run)[:keep]",
            ["core/runs/test_checkpoint.py::test_keep"],
        ),
        Fault(
            "the way out of an incomplete checkpoint may be a damaged one",
            "--resume {found.path}",
            "--resume {candidates[1]}",
            ["core/runs/test_run_folder.py::test_a_damaged_checkpoint_is_not_the_way_out_of_an_incomplete_one"],
        ),
    ],
    "icenet/core/runs/early_stopping.py": [
        Fault(
            "early stopping waits for one more evaluation",
            "self.num_bad_evals >= patience",
            "self.num_bad_evals > patience",
            ["core/training/test_training.py::test_the_best_evaluation"],
        ),
        Fault(
            "an equal validation loss counts as better",
            "if validation_loss < (math.inf",
            "if validation_loss <= (math.inf",
            ["core/training/test_training.py::test_the_best_evaluation"],
        ),
    ],
    "icenet/core/runs/open_model.py": [
        Fault(
            "the id of a repository in model.path is a path",
            "path = hub.local_path(path)\n    config, weights",
            "config, weights",
            ["core/weights/test_hub.py::test_a_run_begins_with_the_model_of_a_repository"],
        ),
        Fault(
            "averages are loaded under the first name of a shared array only",
            "    averages |= {alias: averages[owner] for alias, owner in shared.items() if owner in averages}\n",
            "",
            ["models/test_twins.py::test_averaged_weights_of_a_shared_array"],
        ),
    ],
    "icenet/core/runs/run_folder.py": [
        Fault(
            "a copied folder `best` stays the best checkpoint",
            "best.is_dir() and not best.is_symlink()",
            "best.is_dir() and best.is_file()",
            ["core/training/test_training.py::test_the_link_to_the_best_follows_what_is_there"],
        ),
        Fault(
            "a run on a file system without links has no link to the best, without a word",
            "if config.training.keep_best and (reason := files.no_symlinks(run)):",
            'if reason := "":',
            ["core/training/test_training.py::test_a_file_system_without_links_has_no_link_to_the_best"],
        ),
        Fault(
            "a new run replaces a plot of the user",
            "            if os.path.lexists(run / name) and not (name in _FOLDERS and (run / name).is_dir()):\n",
            '            if name.endswith("l") and os.path.lexists(run / name) and (run / name).is_file():\n',
            ["core/runs/test_run_folder.py::test_a_new_run_replaces_no_file_of_the_user"],
        ),
        Fault(
            "a run whose checkpoints are missing begins again",
            "return last if isinstance(last, int) and last > step else None",
            "return last if isinstance(last, int) and 0 < step < last else None",
            ["core/runs/test_run_folder.py::test_missing_checkpoints_stop_a_run"],
        ),
        Fault(
            "a new run removes files outside its folder, which a run.json from elsewhere lists",
            "all(_is_below(name) and ",
            "all(",
            ["core/runs/test_run_folder.py::test_a_run_that_was_killed_before_its_first_step_is_replaced"],
        ),
        Fault(
            "a config.yaml that the user changed is replaced",
            "    return found != content and not earlier\n",
            "    return found == content and not earlier\n",
            ["core/runs/test_run_folder.py::test_a_changed_config_is_kept"],
        ),
    ],
    "icenet/core/runs/saved_model.py": [
        Fault(
            "a model that its config does not describe is saved",
            "    check_config(model)\n",
            "",
            ["test_api.py::test_parametrized_layers_are_not_saved"],
        ),
        Fault(
            "a saved model loses the names of its classes",
            "    companions |= image_file(model.image_facts, model.config)",
            "",
            ["core/training/test_image_models.py::test_saved_and_converted_models_predict_as_the_folder"],
        ),
        Fault(
            "a saved model loses how its layers are quantized",
            ", **metadata_of(quantized)}",
            "}",
            ["nn/test_quantized_layers.py::test_a_saved_model_is_loaded_with_the_same_bits"],
        ),
        Fault(
            "a saved model does not record the code of its class",
            "if code else {}",
            "if False else {}",
            ["models/custom/test_custom_files.py::test_code_that_changes_after_saving_is_named"],
        ),
        Fault(
            "a saved model is a folder of a run",
            "    check_not_a_run(folder)\n    earlier",
            "    earlier",
            ["core/runs/test_run_folder.py::test_saving_replaces_a_saved_model_and_nothing_else"],
        ),
        Fault(
            "a saved model replaces files of the user",
            "if os.path.lexists(folder / name) and name not in earlier:",
            "if os.path.lexists(folder / name) and earlier and name not in earlier:",
            ["core/runs/test_run_folder.py::test_saving_replaces_a_saved_model_and_nothing_else"],
        ),
    ],
}
