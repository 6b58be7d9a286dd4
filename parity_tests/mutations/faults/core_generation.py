"""Faults in icenet/core/generation and icenet/core/embedding."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/core/embedding/dense.py": [
        Fault(
            "layers after the pooling have no bias",
            ' + self._arrays.get("linear.bias", 0.0)',
            "",
            ["core/embedding/test_embed.py::test_dense_layers_after_the_pooling[torch]"],
        ),
    ],
    "icenet/core/embedding/pooling.py": [
        Fault(
            "the mean of tokens counts padding",
            "weights = mask.astype(np.float64)",
            "weights = np.ones(mask.shape)",
            ["core/embedding/test_embed.py::test_pooling_counts_the_tokens_of_the_mask_only"],
        ),
    ],
    "icenet/core/embedding/texts.py": [
        Fault(
            "vectors are in the order of the lengths of texts",
            "found[chosen] = ",
            "found[start : start + len(chosen)] = ",
            ["core/embedding/test_embed.py::test_a_vector_does_not_depend_on_its_neighbours"],
        ),
    ],
    "icenet/core/generation/batching.py": [
        Fault(
            "the draws of a row that joins are those of the batch's first token",
            ".keys([self.chosen[row] for row in rows], decoding.KEY_BLOCK)",
            ".keys(1, decoding.KEY_BLOCK)",
            ["core/generation/test_batching.py::test_each_row_is_as_it_is_alone"],
        ),
        Fault(
            "a row that ends with its first token keeps its place among the others",
            "            joined = joined.arrange(kept, decoder)\n",
            "            pass\n",
            ["core/generation/test_batching.py::test_rows_that_end_with_their_first_token"],
        ),
        Fault(
            "the last hidden state of a shorter prompt is that of its padding",
            "decoder.to_device(lengths[ends] - 1 - start)",
            "decoder.to_device(lengths[ends] * 0 + (stop - 1 - start))",
            ["core/generation/test_batching.py::test_each_row_is_as_it_is_alone"],
        ),
        Fault(
            "a row has one token beyond its limit before it leaves",
            "self.chosen[row] == self.request.limits[row]:",
            "self.chosen[row] > self.request.limits[row]:",
            ["core/generation/test_batching.py::test_rows_join_and_leave"],
        ),
        Fault(
            "a batch has more slots than the option says",
            "size = min(self.request.settings.max_batch_size, len(self.waiting))",
            "size = len(self.waiting)",
            ["core/generation/test_batching.py::test_rows_join_and_leave"],
        ),
        Fault(
            "a batch never becomes smaller",
            "        return 0 < size * self.costs.leaving <= free < size\n",
            "        return False\n",
            [
                "core/generation/test_batching.py::test_rows_join_and_leave",
                "core/generation/test_batching.py::test_a_batch_on_a_gpu_is_halved",
            ],
        ),
        Fault(
            "a cache with more arrays of a user's class shares a batch",
            ' or "arrange" not in vars(type(cache))',
            "",
            ["core/generation/test_batching.py::test_what_cannot_share_a_batch"],
        ),
    ],
    "icenet/core/generation/cache.py": [
        Fault(
            "the buffers of a cache grow at the first new token",
            "self.reserve(min(columns + 1, limit) - (self.length or 0))",
            "self.reserve(columns - (self.length or 0))",
            ["models/test_models.py::test_the_first_step_needs_no_larger_buffers"],
        ),
        Fault(
            "a recurrent network reads the padding of shorter prompts",
            "    reads_padding = True\n",
            "    reads_padding = False\n",
            ["core/generation/test_batching.py::test_each_row_is_as_it_is_alone"],
        ),
        Fault(
            "the table of positions does not grow with the cache",
            "self._prepare(self.capacity)",
            "pass",
            ["nn/test_positions.py::test_a_captured_step_finds_the_rows_of_its_position"],
        ),
    ],
    "icenet/core/generation/chat.py": [
        Fault(
            "the end of a turn does not end an answer",
            "(*(settings.eos_token_id or ()), *end_ids(model.tokenizer))",
            "settings.eos_token_id or end_ids(model.tokenizer)",
            ["core/generation/test_chat.py::test_every_end_token_ends_an_answer"],
        ),
    ],
    "icenet/core/generation/copies.py": [
        Fault(
            "a copy for generation is kept when a weight was replaced",
            "self._settings == settings and self._snapshot.is_current(model):",
            "self._settings == settings:",
            ["core/generation/test_generation_copies.py::test_a_changed_weight_changes_what_is_generated"],
        ),
        Fault(
            "a copy for generation is kept in training",
            "if not model.training and not is_cast:",
            "if not is_cast:",
            ["core/generation/test_generation_copies.py::test_a_model_in_training_keeps_no_copy"],
        ),
        Fault(
            "a copy for generation is kept when its weights are cast",
            "if not model.training and not is_cast:",
            "if not model.training:",
            [
                "core/generation/test_generation_copies.py::test_a_changed_weight_that_is_frozen_and_cast_changes_the_copy"
            ],
        ),
    ],
    "icenet/core/generation/decoder.py": [
        Fault(
            "a position of the cache is left lazy after a prefill",
            "self.evaluate([hidden, *(self.cache.state if isinstance(self.cache, Cache) else [])])",
            "self.evaluate([hidden])",
            ["core/generation/test_requests.py::test_each_token_of_a_full_window_in_another_thread"],
        ),
        Fault(
            "a token is decoded outside of the model's arithmetic",
            "        with self.model.evaluation(), self.model.arithmetic():\n            yield\n",
            "        with self.model.evaluation():\n            yield\n",
            [
                "engine/test_arithmetic.py::test_each_use_of_a_pytorch_model_has_its_arithmetic",
                "engine/test_arithmetic.py::test_each_use_of_an_mlx_model_is_on_its_device",
            ],
        ),
        Fault(
            "a cache is kept after a failure",
            "if exception[0] in (None, GeneratorExit, KeyboardInterrupt):",
            "if True:",
            ["core/generation/test_prompt_cache.py::test_a_failure_leaves_no_tokens"],
        ),
        Fault(
            "all rows of a batch slide together",
            "np.where(self.lengths > longest, max(longest // 2, 1), self.lengths)",
            "np.minimum(self.lengths, max(longest // 2, 1))",
            [
                "core/generation/test_generation.py::test_a_sliding_window",
                "core/generation/test_generation.py::test_no_row_depends_on_its_neighbours",
            ],
        ),
        Fault(
            "captured steps of all temperatures are one",
            "draws = settings.temperature, settings.top_k",
            "draws = settings.top_k, settings.top_k",
            ["models/test_kept_steps.py::test_a_model_and_its_buffers_are_freed"],
        ),
        Fault(
            "a context with long-rope is not read again",
            "(self.lengths == limit + 1).any()",
            "(self.lengths == 0).any()",
            ["models/test_options.py::test_rows_that_become_longer_than_the_original_context"],
        ),
        Fault(
            "a prompt in pieces has the angles of each piece's own length",
            "row_lengths = self.to_device(lengths.astype(np.int32)[:, None])",
            "row_lengths = None",
            ["models/test_options.py::test_rows_that_become_longer_than_the_original_context"],
        ),
    ],
    "icenet/core/generation/prompt_cache.py": [
        Fault(
            "a prompt cache keeps tokens that the prompt does not have",
            "min(_common_length(self.tokens, tokens), len(tokens) - 1)",
            "min(len(self.tokens), len(tokens) - 1)",
            ["core/generation/test_prompt_cache.py::test_an_empty_cache_takes_any_prompt"],
        ),
        Fault(
            "a prompt cache of trained weights is used",
            "values = [model._to_float_host(arrays[index].reshape(-1)[:1024]).tobytes() for index in chosen]\n",
            "values: list[bytes] = []\n",
            ["core/generation/test_prompt_cache.py::test_a_cache_follows_the_model"],
        ),
        Fault(
            "a file of another model's cache is loaded",
            'if metadata.get("model") != fingerprint(model):',
            'if "model" not in metadata:',
            ["core/generation/test_prompt_cache.py::test_a_faulty_file_is_one_line[model]"],
        ),
        Fault(
            "a prompt that differs from the cached one is read in silence",
            "if common < self.prompt_length and not self._continues(",
            "if common < 0 and not self._continues(",
            ["core/generation/test_prompt_cache.py::test_only_what_follows_the_cached_tokens_is_read"],
        ),
        Fault(
            "a prompt cache in use is saved",
            "        self._cache, self.tokens = None, []\n        if cache is None or",
            "        self.tokens = []\n        if cache is None or",
            ["core/generation/test_prompt_cache.py::test_an_empty_cache_takes_any_prompt"],
        ),
    ],
    "icenet/core/generation/prompts.py": [
        Fault(
            "prompts of unequal length are padded on the right",
            "tokens[index, length - len(row) :] = row\n        mask[index, length - len(row) :] = True",
            "tokens[index, : len(row)] = row\n        mask[index, : len(row)] = True",
            [
                "core/generation/test_generation.py::test_a_mask_equals_unequal_prompts",
                "core/generation/test_generation.py::test_the_first_row_does_not_depend_on_the_others",
            ],
        ),
        Fault(
            "an additive mask is read as its opposite",
            "wrong = mask[(mask != 0) & (mask != 1)]",
            "wrong = mask[:0]",
            ["core/generation/test_requests.py::test_bad_requests_are_one_line_that_names_the_fault"],
        ),
        Fault(
            "prompts of folders lack the beginning-of-text token",
            "partial(encode_prompt, tokenizer) if add_special_tokens else tokenizer.encode",
            "tokenizer.encode",
            [
                "core/generation/test_chat.py::test_prompts_have_the_tokens_that_the_tokenizer_puts_around_a_text[torch]"
            ],
        ),
    ],
    "icenet/core/generation/request.py": [
        Fault(
            "a row draws with the keys of its slot",
            "numbers=tuple(rows if self.numbers is None else (self.numbers[row] for row in rows)),",
            "numbers=tuple(range(len(rows))),",
            ["core/generation/test_batching.py::test_each_row_is_as_it_is_alone"],
        ),
        Fault(
            "a GPU reads prompts without a bound",
            "PREFILL_TOKENS // rows)",
            "PREFILL_TOKENS)",
            ["models/test_prefill.py::test_the_passes_over_a_prompt"],
        ),
        Fault(
            "the limit of a row is that of the longest prompt",
            "for length in lengths)",
            "for length in [max(lengths)] * len(lengths))",
            ["core/generation/test_endings.py::test_limits_are_those_of_each_row"],
        ),
    ],
    "icenet/core/generation/sampling.py": [
        Fault(
            "temperature comes after the filters",
            "    logits = logits / max(settings.temperature, MIN_TEMPERATURE)\n",
            "",
            ["core/generation/test_generation.py::test_scores_equal_the_reference"],
        ),
        Fault(
            "all rows draw the same numbers",
            "np.arange(rows) if",
            "np.zeros(rows, np.int64) if",
            ["core/generation/test_generation.py::test_draw_keys_are_one_per_row_and_token"],
        ),
        Fault(
            "each block of sampling keys begins with the first key",
            "np.arange(tokens)[:, None] + np.array(first)",
            "np.arange(tokens)[:, None]",
            ["core/generation/test_endings.py::test_sampling_keys_are_made_in_blocks"],
        ),
    ],
    "icenet/core/generation/speculative.py": [
        Fault(
            "proposals are accepted after one that is not",
            "int(np.cumprod(found[:-1] == proposed[1:]).sum())",
            "int((found[:-1] == proposed[1:]).sum())",
            ["core/generation/test_speculative.py::test_tokens_are_those_without_a_draft"],
        ),
        Fault(
            "the model keeps the columns of proposals that are not accepted",
            "        target.cache.truncate(before + accepted + 1)\n",
            "",
            ["core/generation/test_speculative.py::test_tokens_are_those_without_a_draft"],
        ),
        Fault(
            "the draft keeps the columns of proposals that are not accepted",
            "            draft.cache.truncate(read + min(accepted + 1, count))\n",
            "",
            ["core/generation/test_speculative.py::test_proposals_are_counted_as_a_plain_loop_counts_them"],
        ),
        Fault(
            "the draft does not read its last proposal where it is accepted",
            "skipped = [tokens[-1]] if count > 0 and accepted == count else []",
            "skipped: list[Any] = []",
            ["core/generation/test_speculative.py::test_proposals_are_counted_as_a_plain_loop_counts_them"],
        ),
        Fault(
            "the draft draws with other keys than the model",
            "        keys = self.request.keys(len(chosen), self.count + 1)\n",
            "        keys = self.request.keys(len(chosen) + 1, self.count + 1)\n",
            ["core/generation/test_speculative.py::test_draws_are_those_of_the_seed"],
        ),
        Fault(
            "a place has not seen the proposals before it",
            "seen = target.concatenate(rows).reshape(len(rows), -1)",
            "seen = target.concatenate([seen] * len(rows)).reshape(len(rows), -1)",
            ["core/generation/test_speculative.py::test_a_penalty_counts_the_proposals_before_a_place"],
        ),
        Fault(
            "a draft reads beyond its context",
            "self._room() - len(self.unread) + 1)",
            "self.count)",
            ["core/generation/test_speculative.py::test_a_draft_with_a_shorter_context"],
        ),
        Fault(
            "the draft computes logits of a token that it only reads",
            "        if draft.model.is_on_cpu:  # the logits",
            "        if False:  # the logits",
            ["core/generation/test_speculative.py::test_a_token_that_is_only_read_has_no_logits"],
        ),
    ],
    "icenet/core/generation/stopping.py": [
        Fault(
            "an error names the place of a row among those that share a batch",
            "number = self._numbers[row]",
            "number = row",
            ["core/generation/test_batching.py::test_an_error_in_rows_apart"],
        ),
        Fault(
            "a stop token stays in the text",
            '        if token in self._stop_ids:\n            reason = "stop"\n',
            '        if token in self._stop_ids:\n            tokens.append(token)\n            reason = "stop"\n',
            ["core/generation/test_requests.py::test_stop_tokens"],
        ),
        Fault(
            "generation continues after the end of a text",
            "        elif token in self._end_ids:\n",
            "        elif token in self._stop_ids:\n",
            ["core/generation/test_endings.py::test_a_row_ends_at_the_end_of_text_token"],
        ),
        Fault(
            "a stop text does not match special tokens",
            "        self._texts += [pattern.sub(marker, text) for text in mixed]\n",
            "",
            ["core/generation/test_endings.py::test_a_stop_text_with_special_tokens"],
        ),
    ],
    "icenet/core/generation/streaming.py": [
        Fault(
            "a stream shows spaces that the next token removes",
            "max(stopping.held_back(complete), unstable)",
            "stopping.held_back(complete)",
            ["core/tokenizers/test_prompts.py::test_the_pieces_of_a_stream_are_the_text[bert-True]"],
        ),
    ],
}
