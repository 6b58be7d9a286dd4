"""Faults in icenet/core and its folders distributed, host and report."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/core/distributed/processes.py": [
        Fault(
            "every process has the first shard",
            "array[self.process_group.rank * rows : (self.process_group.rank + 1) * rows]",
            "array[:rows]",
            ["core/distributed/test_distributed.py::test_shards_are_the_inverse_of_gathering"],
        ),
        Fault(
            "a signal to another process is ignored",
            "return loss, stop_reason(counts)",
            "return loss, None",
            ["core/distributed/test_distributed.py::test_the_reason_to_stop_reaches_all_processes"],
        ),
    ],
    "icenet/core/errors.py": [
        Fault(
            "a usage error exits with 1",
            "    exit_code = 2",
            "    exit_code = 1",
            ["commands/test_bad_inputs.py::test_bad_input"],
        ),
    ],
    "icenet/core/files.py": [
        Fault(
            "a file system that cannot flush a folder keeps nothing",
            "if not is_folder or error.errno not in (errno.EINVAL,",
            "if not is_folder or error.errno in (errno.EINVAL,",
            ["core/test_files.py::test_a_file_system_that_cannot_flush_a_folder"],
        ),
    ],
    "icenet/core/host/allocator.py": [
        Fault(
            "freed memory goes back to the system, although a threshold is set",
            "        library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)\n",
            "        pass\n",
            ["core/host/test_allocator.py::test_freed_memory_is_kept_unless_users_set_the_allocator"],
        ),
        Fault(
            "variables with which users set the allocator are replaced",
            " or any(os.environ.get(name) for name in VARIABLES)",
            "",
            ["core/host/test_allocator.py::test_freed_memory_is_kept_unless_users_set_the_allocator"],
        ),
    ],
    "icenet/core/host/blas.py": [
        Fault(
            "the BLAS of a config is not used",
            "_load(variable or choice, ",
            '_load(variable or "auto", ',
            ["core/host/test_blas.py::test_a_config_chooses_without_the_environment"],
        ),
    ],
    "icenet/core/host/threads.py": [
        Fault(
            "more threads are chosen although they are slower",
            "together < 0.8 * alone",
            "together < 80 * alone",
            ["core/host/test_threads.py::test_more_threads_are_chosen_where_they_are_faster"],
        ),
    ],
    "icenet/core/importing.py": [
        Fault(
            "a Ctrl-C during an import is dropped",
            "    if requests:\n        raise KeyboardInterrupt",
            "",
            ["core/test_importing.py::test_ctrl_c_is_raised_at_the_end_of_the_block"],
        ),
    ],
    "icenet/core/listing.py": [
        Fault(
            "the folder of a run is a part of a text",
            "if not enter_runs and folder",
            "if enter_runs and folder",
            ["core/data/test_text.py::test_runs_below_a_source_are_left_out"],
        ),
        Fault(
            "a folder is listed again for each link to it",
            "if found in seen:\n            on_skip(LINKED_TWICE, folder",
            "if False:\n            on_skip(LINKED_TWICE, folder",
            ["core/data/test_text.py::test_a_folder_is_listed_once_although_a_link_leads_back_to_it"],
        ),
        Fault(
            "a file is read again for each link to it",
            "elif name in found:",
            "elif False:",
            ["core/data/test_text.py::test_a_file_is_read_once_whatever_leads_to_it"],
        ),
    ],
    "icenet/core/messages.py": [
        Fault(
            "the number of further names counts the first ones, too",
            "{len(listed) - count:,} more",
            "{len(listed):,} more",
            ["parity/test_compare_idioms.py::test_numbers_without_an_effect_are_said"],
        ),
    ],
    "icenet/core/report/canvas.py": [
        Fault(
            "a name with $ is drawn as a formula",
            '    return text.replace("$", r"\\$")\n',
            "    return text\n",
            ["core/report/test_plots.py::test_names_are_drawn_literally"],
        ),
        Fault(
            "the backend of a notebook in the environment keeps matplotlib from being imported",
            'os.environ.pop("MPLBACKEND", None)',
            'os.environ.get("MPLBACKEND")',
            ["core/report/test_plots.py::test_late_imports_and_no_matplotlib"],
        ),
        Fault(
            "a plot that cannot be drawn ends a run",
            "    except Exception as error:  # matplotlib, its fonts",
            "    except OSError as error:  # matplotlib, its fonts",
            ["core/report/test_streams.py::test_a_plot_that_cannot_be_drawn_does_not_end_a_run"],
        ),
    ],
    "icenet/core/report/streams.py": [
        Fault(
            "control characters of Latin-1 reach the terminal",
            '_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")',
            '_CONTROL = re.compile("[\\x00-\\x1f\\x7f\\ud800-\\udfff]")',
            ["core/report/test_streams.py::test_names_are_printed_literally"],
        ),
    ],
    "icenet/core/rng.py": [
        Fault(
            "a key ignores its words",
            "        result = fold(result, word)\n",
            "        result = fold(result, stream)\n",
            ["core/test_rng.py::test_different_words_give_different_keys"],
        ),
        Fault(
            "the error of the polynomial for cosine and sine is not considered",
            "_SINE_ERROR = 2.0**-43",
            "_SINE_ERROR = 0.0",
            ["core/test_rng.py::test_the_polynomial_gives_the_bits_of_numpys_cosine_and_sine"],
        ),
        Fault(
            "a rotation of threefry is wrong",
            "(17, 29, 16, 24)",
            "(17, 29, 16, 25)",
            ["core/test_rng.py::test_published_vectors"],
        ),
        Fault(
            "a rotation of a single key is wrong",
            "x1 >> (32 - rotation)) ^ x0",
            "x1 >> (31 - rotation)) ^ x0",
            ["core/test_rng.py::test_a_key_is_the_hash_of_its_seed", "core/test_rng.py::test_published_vectors"],
        ),
        Fault(
            "core imports PyTorch",
            "import hashlib\n",
            "import hashlib\n\nimport torch\n",
            ["architecture/test_imports.py::test_shared_code_imports_no_framework"],
        ),
        Fault(
            "an import cycle through a late import",
            "Words = NDArray[np.uint32]\n",
            "Words = NDArray[np.uint32]\n\n\ndef _late() -> None:\n    from icenet.core.models import init\n",
            ["architecture/test_imports.py::test_there_is_no_import_cycle"],
        ),
    ],
}
