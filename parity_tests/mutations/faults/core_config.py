"""Faults in icenet/core/config."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/core/config/custom.py": [
        Fault(
            "the flag --trust-code outlives its command",
            "        _everything_trusted.reset(token)\n",
            "        pass\n",
            ["models/custom/test_trust.py::test_the_flag_is_for_one_command"],
        ),
        Fault(
            "the port in a checkpoint is run without trust",
            '_check(reference, "model.port", "port")',
            "pass",
            ["models/test_ported.py::test_a_port_that_a_checkpoint_names_is_not_run"],
        ),
    ],
    "icenet/core/config/imported.py": [
        Fault(
            "another number of classes next to model.path is no request for a new output layer",
            'training["new_head"] = True',
            'training["new_head"] = False',
            ["core/training/test_image_models.py::test_a_new_head"],
        ),
        Fault(
            "data.image_size and the processor of model.path are both set",
            '("preprocessor" in keys and own)',
            '("preprocessor" in keys and False)',
            ["core/training/test_image_models.py::test_keys_of_the_user_come_before_the_processor"],
        ),
    ],
    "icenet/core/config/run.py": [
        Fault(
            "a key that a later --set replaces is not named",
            "within = [path for path in given if path[: len(key)] == key]",
            "within = [path for path in given if path[: len(key)] < key]",
            ["core/config/test_values.py::test_a_key_that_is_set_twice"],
        ),
        Fault(
            "the schema refuses empty sections",
            "            if typed.may_be_empty(field):\n",
            "            if field.is_required():\n",
            ["core/config/test_config.py::test_the_schema_and_the_config_accept_null_for_the_same_keys"],
        ),
    ],
    "icenet/core/config/scalars.py": [
        Fault(
            "a number with a leading 0 is octal",
            "        return int(text)\n",
            '        return int(text, 8 if text[0] == "0" and text[1:].isdigit() else 10)\n',
            ["core/config/test_values.py::test_numbers_are_decimal"],
        ),
        Fault(
            "numbers of other bases are texts",
            "    if _OTHER_NOTATION.fullmatch(text):\n",
            "    if False:\n",
            ["core/config/test_values.py::test_other_notations_are_one_line_with_the_decimal_number"],
        ),
    ],
    "icenet/core/config/section.py": [
        Fault(
            "an unknown key is ignored",
            'extra="forbid"',
            'extra="ignore"',
            ["core/config/test_config.py::test_bad_files"],
        ),
    ],
    "icenet/core/config/transformer_plan.py": [
        Fault(
            "sliding layers have the base of the others",
            "    if config.sliding_rotary_theta is not None:\n        kinds = layer_types(config)",
            "    if config.sliding_rotary_theta == 0:\n        kinds = layer_types(config)",
            ["core/families/test_position_keys.py::test_the_positions_of_published_models"],
        ),
    ],
    "icenet/core/config/typed.py": [
        Fault(
            "the text null of a text field is null",
            "if stripped in scalars.NULLS and (types.NoneType in expected.kinds or not stripped):",
            "if stripped in scalars.NULLS:",
            ["core/config/test_values.py::test_a_text_of_set_is_taken_as_given"],
        ),
        Fault(
            "a text field takes a boolean",
            "    if bool in expected.kinds and stripped in scalars.BOOLEANS:\n",
            "    if stripped in scalars.BOOLEANS:\n",
            ["core/config/test_values.py::test_a_text_of_a_file_is_as_written"],
        ),
    ],
    "icenet/core/config/user_code.py": [
        Fault(
            "another version of a user's code is not noticed",
            "hashlib.sha256(content).hexdigest() != stored[name]",
            "not stored[name]",
            ["models/custom/test_custom_files.py::test_code_that_changes_after_training_is_named"],
        ),
        Fault(
            "a change of a module next to a model's file is not noticed",
            "if isinstance(loader, _Loader) and loader.source != _read(loader.path):",
            "if False:",
            ["models/custom/test_custom_files.py::test_modules_next_to_the_file"],
        ),
        Fault(
            "compiled modules next to a model's file are run",
            "        return self.source_to_code(self.source, self.path)\n",
            "        return super().get_code(fullname)\n",
            ["models/custom/test_trust.py::test_compiled_files_are_not_run"],
        ),
        Fault(
            "a folder next to a model's file hides an installed module",
            "        return importlib.util.find_spec(name) is None\n",
            "        return True\n",
            ["models/custom/test_custom_files.py::test_a_folder_of_data_hides_no_installed_module"],
        ),
    ],
    "icenet/core/config/vit_plan.py": [
        Fault(
            "images of any square size get the positions of another",
            "if (height, width) == own:",
            "if height == width:",
            ["models/test_vit.py::test_images_that_do_not_fit_are_one_line"],
        ),
    ],
    "icenet/core/config/yaml_file.py": [
        Fault(
            "a no-break space is not named",
            "if names := scalars.strange_spaces(",
            "if names := str.strip(",
            ["core/config/test_values.py::test_what_only_looks_like_a_space_is_named"],
        ),
        Fault(
            "a text that looks like a number is written without quotes",
            """style="'" if has_type else None""",
            "style=None",
            ["core/config/test_values.py::test_texts_of_a_custom_model_survive_their_file"],
        ),
    ],
}
