"""Faults in icenet/cli, icenet/commands and icenet/commands/bench."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/cli/main.py": [
        Fault(
            "a program that calls main gets MLX's own BLAS",
            'arguments is None and sys.argv[1:2] == ["convert"]',
            '"convert" in (arguments or sys.argv)',
            ["core/host/test_blas.py::test_a_program_without_products_loads_no_library"],
        ),
    ],
    "icenet/commands/bench/common.py": [
        Fault(
            "a peer that fails ends the bench",
            "        except isolated.IsolatedError as error:\n            reason =",
            "        except ZeroDivisionError as error:\n            reason =",
            ["commands/test_bench.py::test_a_side_that_fails_costs_one_line"],
        ),
    ],
    "icenet/commands/bench/inference.py": [
        Fault(
            "the time of the prompt counts as that of the new tokens",
            "return [parts[1] - first if parts[1] > first else parts[1] for parts in self.rounds]",
            "return [parts[1] for parts in self.rounds]",
            ["commands/test_bench.py::test_the_seconds_of_new_tokens"],
        ),
        Fault(
            "the rounds before Ctrl-C are lost",
            "                interruption = error\n",
            "                raise\n",
            ["commands/test_bench.py::test_ctrl_c_shows_the_rounds_that_are_done"],
        ),
    ],
    "icenet/commands/bench/inference_rows.py": [
        Fault(
            "the limit of quantized weights leaves out the biases of groups",
            "bits / 8 + 2 * value_bytes",
            "bits / 8 + value_bytes",
            ["commands/test_bench.py::test_quantized_weights_next_to_those_as_they_are"],
        ),
    ],
    "icenet/commands/bench/limits.py": [
        Fault(
            "the limit leaves out the cache",
            " + attended * size.cache_width * cache_bytes",
            "",
            ["commands/test_bench.py::test_the_bytes_of_a_step"],
        ),
        Fault(
            "the limit counts all pairs of tokens",
            "return inside * (inside + 1) // 2 +",
            "return inside * inside +",
            ["commands/test_bench.py::test_the_operations_of_a_prompt_are_those_that_pytorch_counts[None]"],
        ),
    ],
    "icenet/commands/bench/sides.py": [
        Fault(
            "the draft of the bench always agrees",
            "token if ok else (token + 1)",
            "token if ok else token + 0 * (token + 1)",
            ["commands/test_bench.py::test_a_draft_next_to_plain_decoding"],
        ),
    ],
    "icenet/commands/bench/training_rows.py": [
        Fault(
            "the limit of training leaves out the backward pass",
            "return 3.0 * batch * (2",
            "return 1.0 * batch * (2",
            ["commands/test_bench_train.py::test_the_operations_of_texts_are_those_that_pytorch_counts"],
        ),
        Fault(
            "the first convolution of a bottleneck has the smaller images",
            "before if late and part == 0 else side",
            "side",
            ["commands/test_bench_train.py::test_the_operations_of_images_are_those_that_pytorch_counts"],
        ),
    ],
    "icenet/commands/chat.py": [
        Fault(
            "a chat template is rendered after the weights are read",
            "    check_chat_template(path, [*first, QUESTION], template_options)\n",
            "",
            ["commands/test_chat_command.py::test_a_faulty_template_is_refused_before_the_weights_are_read"],
        ),
        Fault(
            "a chat reads the whole conversation for each answer",
            "stream=True, cache=self._cache, **self._options)",
            "stream=True, **self._options)",
            ["core/generation/test_prompt_cache.py::test_a_chat_reads_each_message_once"],
        ),
        Fault(
            "a message without an answer stays in the conversation",
            "                self.messages.pop()\n",
            "                pass\n",
            ["commands/test_chat_command.py::test_an_error_leaves_the_conversation_as_it_was"],
        ),
    ],
    "icenet/commands/overrides.py": [
        Fault(
            "an option replaces a key of --set without a word",
            "if not is_new:",
            "if False:",
            ["commands/test_cli.py::test_keys_that_an_option_replaces"],
        ),
    ],
    "icenet/commands/predict.py": [
        Fault(
            "predict ignores --dtype",
            "precision = dtype or found",
            "precision = found",
            ["commands/test_averaged.py::test_predict_in_half_precision"],
        ),
    ],
    "icenet/commands/quickstart.py": [
        Fault(
            "a plot that cannot be drawn ends a quickstart",
            "plot, plot_problem = canvas.attempt(draw)",
            'plot, plot_problem = draw(), ""',
            ["commands/test_quickstart.py::test_again_and_with_few_checkpoints_kept"],
        ),
    ],
}
