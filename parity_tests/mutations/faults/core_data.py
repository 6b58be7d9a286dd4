"""Faults in icenet/core/data, icenet/core/data/images and icenet/core/data/text."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/core/data/epochs.py": [
        Fault(
            "each epoch has the same order",
            'rng.permutation(rng.key(self._seed, "data", epoch), self.num_rows)',
            'rng.permutation(rng.key(self._seed, "data", 0), self.num_rows)',
            ["core/data/test_data.py::test_order_follows_the_documented_formula"],
        ),
        Fault(
            "the order does not depend on the seed",
            'rng.key(self._seed, "data", epoch)',
            'rng.key(0, "data", epoch)',
            ["core/data/test_data.py::test_order_follows_the_documented_formula"],
        ),
    ],
    "icenet/core/data/images/augment.py": [
        Fault(
            "a crop is off by one",
            "crop = source[max(0, down) : height + min(0, down),",
            "crop = source[max(0, down) - 1 : height + min(0, down) - 1,",
            ["core/data/test_images.py::test_augmentation"],
        ),
        Fault(
            "images are normalized without the mean",
            "images.astype(np.float32) * scale - shift",
            "images.astype(np.float32) * scale",
            ["core/data/test_images.py::test_normalization"],
        ),
        Fault(
            "the standard deviation is that of values up to 255",
            "scale = 1 / (255 * np.asarray(std, np.float64))",
            "scale = 1 / np.asarray(std, np.float64)",
            ["core/data/test_images.py::test_normalization"],
        ),
        Fault(
            "all images of an epoch are mirrored alike",
            'mirrored = rng.fold(keys, "flip")[:, 0] >= 2**31',
            'mirrored = np.full(len(images), rng.fold(keys, "flip")[0, 0] >= 2**31)',
            ["core/data/test_images.py::test_augmentation"],
        ),
    ],
    "icenet/core/data/images/decode.py": [
        Fault(
            "transparent pixels are blended with black",
            'canvas = Image.new("RGB", image.size, background)',
            'canvas = Image.new("RGB", image.size)',
            ["core/data/test_image_pixels.py::test_a_black_glyph_on_a_transparent_background"],
        ),
        Fault(
            "the transparent colour of a PNG has 8 bits",
            'return key * (85 if raw == "L;2" else 17)',
            "return key",
            ["core/data/test_image_pixels.py::test_the_transparent_grey_of_a_png_has_the_depth_of_the_file"],
        ),
    ],
    "icenet/core/data/images/facts.py": [
        Fault(
            "an export of a trained model has no image processor",
            "return folder.ImageFiles(self.classes, self.preprocessor)",
            "return folder.ImageFiles(self.classes, None)",
            ["core/training/test_image_models.py::test_a_run_reads_images_as_the_model_that_it_begins_with"],
        ),
    ],
    "icenet/core/data/images/folders.py": [
        Fault(
            "the folder of a run is a class",
            "if is_run([each.name for each in entries]):",
            "if not entries:",
            ["core/data/test_images.py::test_runs_below_the_images_are_no_classes"],
        ),
        Fault(
            "the names of splits depend on their case",
            'word = re.sub(r"[\\W\\d_]+", "", name.casefold())',
            'word = re.sub(r"[\\W\\d_]+", "", name)',
            ["core/data/test_image_folders.py::test_names_of_splits"],
        ),
        Fault(
            "folders that all contain the same folders are classes",
            "    _check_not_the_same_subfolders(root)\n    return names\n",
            "    return names\n",
            ["core/data/test_image_folders.py::test_structures_that_are_no_classes"],
        ),
    ],
    "icenet/core/data/images/preprocess.py": [
        Fault(
            "the centre of an image is one pixel off",
            "(pixels.shape[0] - height) // 2",
            "(pixels.shape[0] - height + 1) // 2",
            ["core/data/test_preprocess.py::test_values_and_crops_by_their_formulas"],
        ),
        Fault(
            "a setting of an image processor that is unknown has no effect",
            "    if unknown:\n",
            "    if False:\n",
            ["core/data/test_preprocess.py::test_a_setting_that_is_not_supported_is_one_line"],
        ),
        Fault(
            "the mean of a folder's processor is not scaled to values from 0 to 1",
            "255 * (1 if self.scale is None else self.scale)",
            "255",
            ["core/training/test_initial_weights.py::test_other_images_than_those_of_the_model_are_said"],
        ),
    ],
    "icenet/core/data/text/conversations.py": [
        Fault(
            "conversations with other settings have the same file in the cache",
            "settings = [seq_length, train_on, template]",
            "settings = [template]",
            ["core/data/test_conversations.py::test_conversations_are_encoded_once"],
        ),
    ],
    "icenet/core/data/text/documents.py": [
        Fault(
            "padding is counted in the loss",
            "labels = np.full((len(rows), longest), IGNORED, np.int32)",
            "labels = np.full((len(rows), longest), self._eot_id, np.int32)",
            ["core/data/test_data.py::test_every_document_begins_a_row"],
        ),
    ],
    "icenet/core/data/text/left_out.py": [
        Fault(
            "the cache of data.errors=skip is used for stop",
            'return errors == "skip" or not NEEDS_SKIP & self.counts.keys()',
            "return True",
            ["core/data/test_text.py::test_one_bad_byte_loses_nothing_in_silence"],
        ),
    ],
    "icenet/core/data/text/packed.py": [
        Fault(
            "labels are the inputs",
            '"labels": np.ascontiguousarray(windows[:, 1:])',
            '"labels": np.ascontiguousarray(windows[:, :-1])',
            ["core/data/test_data.py::test_an_epoch_covers_windows_once"],
        ),
        Fault(
            "a damaged token file counts as prepared",
            "return compute_fingerprint(pieces, self.tokenizer) == self.fingerprint",
            "return True",
            ["core/data/test_token_cache.py::test_prepare_makes_what_train_reads"],
        ),
        Fault(
            "the last validation window has no label at its end",
            "(self.num_validation_tokens - 1) // self.seq_length",
            "self.num_validation_tokens // self.seq_length",
            ["core/data/test_data.py::test_validation_is_the_tail_and_always_the_same"],
        ),
    ],
    "icenet/core/data/text/prepare.py": [
        Fault(
            "documents are not separated by an end-of-text token",
            "self._needs_eot = position.tokens > self._block_start\n        if tokens",
            "self._needs_eot = False\n        if tokens",
            ["core/data/test_text.py::test_lines_are_documents_in_shuffled_blocks"],
        ),
    ],
    "icenet/core/data/text/reading.py": [
        Fault(
            "a text file that is not UTF-8 is left out without data.errors=skip",
            'if self.reason != BINARY and errors != "skip":',
            "if False:",
            ["core/data/test_text.py::test_one_bad_byte_loses_nothing_in_silence"],
        ),
        Fault(
            "a byte order mark is text",
            "self._call(self._stream.read, len(BOM)) == BOM",
            "False",
            ["core/data/test_text.py::test_byte_order_marks_are_no_text"],
        ),
    ],
    "icenet/core/data/text/sources.py": [
        Fault(
            "a text of equal size and time is not read again",
            "status.st_mtime_ns, status.st_ctime_ns)",
            "status.st_mtime_ns)",
            ["core/data/test_token_cache.py::test_made_once_and_again_when_the_source_changes"],
        ),
    ],
    "icenet/core/data/user.py": [
        Fault(
            "another batch of a user's data is not said",
            "if self.last_batch == earlier:",
            "if True:",
            [
                "core/training/test_user_data.py::test_a_batch_that_depends_on_earlier_ones_is_seen_when_a_run_continues"
            ],
        ),
    ],
}
