"""Faults in icenet/core/tokenizers."""

from __future__ import annotations

from faults.fault import Fault

FAULTS: dict[str, list[Fault]] = {
    "icenet/core/tokenizers/chat.py": [
        Fault(
            "the answer of an interrupted template is that of the next one",
            (
                "            except BaseException:  # Ctrl-C: the answer would be read as that of the next request\n"
                "                self._stop()\n"
            ),
            "            except BaseException:\n",
            ["core/tokenizers/test_chat_templates.py::test_nothing_of_the_process_is_left_after_an_interruption"],
        ),
    ],
    "icenet/core/tokenizers/coverage.py": [
        Fault(
            "characters without a token are dropped in silence",
            "self.is_silent = is_bpe and not complete",
            "self.is_silent = False",
            ["core/tokenizers/test_tokenizers.py::test_letters_without_an_unknown_token"],
        ),
    ],
    "icenet/core/tokenizers/huggingface.py": [
        Fault(
            "an unfinished character destroys the characters before it",
            "self._with_valid_bytes(shown) if self._bytes else shown",
            "shown",
            ["core/tokenizers/test_tokenizers.py::test_a_cut_character_leaves_the_characters_before_it"],
        ),
        Fault(
            "texts are cut without room for the tokens around them",
            "encoding.truncate(limit - around)",
            "encoding.truncate(limit)",
            ["core/embedding/test_embed.py::test_texts_are_cut_with_a_notice"],
        ),
    ],
    "icenet/core/tokenizers/llama.py": [
        Fault(
            "a space follows special tokens of Llama 2",
            'else "first"',
            'else "always"',
            [
                "core/tokenizers/test_sentencepiece.py::test_a_llama_tokenizer_has_the_rules_of_transformers[llama-changes0]"
            ],
        ),
    ],
    "icenet/core/tokenizers/merges.py": [
        Fault(
            "a long token makes the merges of a vocabulary take minutes",
            " or sum(length * length for length in lengths) > _MAX_COPIED",
            "",
            ["core/tokenizers/test_sentencepiece.py::test_a_faulty_file_is_one_line[long]"],
        ),
    ],
    "icenet/core/tokenizers/sentencepiece.py": [
        Fault(
            "the ids of XLM-RoBERTa are those of its file",
            "pieces = [*first, *pieces[3:],",
            "pieces = [*first, *pieces[4:],",
            ["core/tokenizers/test_sentencepiece.py::test_tokens_and_texts_are_those_of_sentencepiece[xlm-roberta]"],
        ),
        Fault(
            "user-defined pieces are merged with their neighbours",
            "    if symbols:\n        pattern",
            "    if False:\n        pattern",
            ["core/tokenizers/test_sentencepiece.py::test_tokens_and_texts_are_those_of_sentencepiece[spaces]"],
        ),
        Fault(
            "a text that names a byte is that byte",
            "absent if kind in (_BYTE, _UNUSED) else score",
            "score",
            ["core/tokenizers/test_sentencepiece.py::test_tokens_and_texts_are_those_of_sentencepiece[nfkc]"],
        ),
    ],
    "icenet/core/tokenizers/template_worker.py": [
        Fault(
            "a chat template reaches the attributes of classes",
            "    class Environment(ImmutableSandboxedEnvironment):\n",
            (
                "    ImmutableSandboxedEnvironment.is_safe_attribute = lambda *_: True\n\n"
                "    class Environment(ImmutableSandboxedEnvironment):\n"
            ),
            ["core/tokenizers/test_chat_templates.py::test_a_hostile_template_is_one_line"],
        ),
        Fault(
            "an endless chat template is not stopped",
            "signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)",
            "signal.setitimer(signal.ITIMER_PROF, 0)",
            ["core/tokenizers/test_chat_templates.py::test_an_endless_template_is_stopped[comparison]"],
        ),
    ],
}
