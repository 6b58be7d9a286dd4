"""Conversations, and pairs of prompt and completion, as training data: which tokens are trained, what is refused."""

from __future__ import annotations

import gzip
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line, tiny

from icenet.commands.prepare import prepare
from icenet.core.config import Config
from icenet.core.data.datasets import dataset_for
from icenet.core.data.text import conversations
from icenet.core.data.text.conversations import ConversationDataset, encode, open_conversations
from icenet.core.errors import ChatTemplateError, DataError, IceNetError
from icenet.core.tokenizers.bytes import ByteTokenizer
from icenet.core.tokenizers.huggingface import HFTokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Tokens(ByteTokenizer):
    """Bytes with a chat template."""

    chat_template = TEMPLATE


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def trained(example: dict[str, Any], tokenizer: Any = None, train_on: str = "answers") -> tuple[str, str]:
    """Returns the text of an example, and of its trained tokens with | for each other one (runs joined)."""
    row = encode(example, tokenizer or Tokens(), train_on)
    text = "".join(chr(t) if t < 256 else "$" for t in row.tokens)
    shown = "".join(c if t else "|" for c, t in zip(text, row.trained, strict=True))
    while "||" in shown:
        shown = shown.replace("||", "|")
    return text, shown


def write(path: Path, *examples: Any) -> Path:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


def opened(path: Path, **options: Any) -> ConversationDataset:
    return open_conversations(str(path), Tokens(), **{"seq_length": 64, "seed": 1, **options})


def test_the_answers_are_trained() -> None:
    """Each with the end of its turn; the system's and the user's text and the beginning of an answer are not."""
    text, shown = trained(chat("Hi", "Hello", "Bye", "See you"))
    assert text == "<user>Hi</>\n<assistant>Hello</>\n<user>Bye</>\n<assistant>See you</>\n"
    assert shown == "|Hello</>\n|See you</>\n"
    assert trained({"prompt": "1+1=", "completion": "2"}) == ("1+1=2$", "|2$")
    assert trained({"prompt": "", "completion": "ab"}) == ("ab$", "|b$")  # nothing predicts the first token
    pair = {"prompt": chat("a", "b", "c")["messages"], "completion": [{"role": "assistant", "content": "d"}]}
    assert trained(pair)[1] == "|d</>\n"
    assert trained(chat("Hi", "Hello"), train_on="all")[1] == "|user>Hi</>\n<assistant>Hello</>\n"


def test_a_template_that_changes_earlier_turns() -> None:
    """Such as those that drop reasoning: what the whole text has in common with the shorter one is the prompt."""

    class Drops(Tokens):
        chat_template = (
            "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}(thought){% endif %}"
            "{{ m.content }}</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
        )

    assert (
        trained(chat("a", "b", "c", "d"), Drops())[1] == "|(thought)d</>\n"
        or "d</>\n" in trained(chat("a", "b", "c", "d"), Drops())[1]
    )


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_mask_is_that_of_transformers() -> None:
    """Whose template marks the answers; ours needs no marks. A merge across the border of an answer is trained."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["the answer is the question\n\n the"] * 20, trainer)
    ours = HFTokenizer(model.to_str().encode(), companions={"chat_template.jinja": CHATML.encode()})
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=model, chat_template=CHATML)
    for contents in (("Hi", "the answer"), ("the question", "the", " x\nthe", "\u65e5\u672c is the answer\n")):
        example = chat(*contents)
        expected = theirs.apply_chat_template(
            example["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        row = encode(example, ours)
        assert row.tokens.tolist() == expected["input_ids"]
        assert row.trained.tolist() == [bool(mask) for mask in expected["assistant_masks"]]
    row = encode(chat("Hi", "\n\nthe"), ours)  # the answer begins inside the token of two line ends
    assert ours.decode(row.tokens[row.trained][:1]) == "\n\n"


def test_a_folder_of_files(tmp_path: Path) -> None:
    """JSON lines, packed ones, an array; a byte order mark and blank lines are not content."""
    example = {"prompt": "a", "completion": "b"}
    (folder := tmp_path / "chats").mkdir()
    write(folder / "1.jsonl", example, example)
    (folder / "2.jsonl.gz").write_bytes(gzip.compress(json.dumps(example).encode() + b"\n\n"))
    (folder / "3.json").write_text(json.dumps([example, example]))
    (folder / "4.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(example).encode())
    found = opened(folder)
    assert found.steps_per_epoch(1) == 6 and not found.notes
    assert found.fingerprint == opened(folder, seed=2).fingerprint != opened(folder / "1.jsonl").fingerprint


def test_batches(tmp_path: Path) -> None:
    """Padded to a multiple of 16 and masked; each row once per epoch, in an order of the seed; rows held out."""
    examples = [{"prompt": "p" * index, "completion": chr(65 + index)} for index in range(10)]
    path = write(tmp_path / "c.jsonl", *examples)
    found = opened(path, validation_fraction=0.2)
    batches = [found.train_batch(step, 2) for step in range(4)]
    letters = [chr(label) for batch in batches for label in batch["labels"][batch["labels"] >= 0] if label < 256]
    held_out = [
        chr(label) for batch in found.validation_batches(8) for label in batch["labels"].flat if 0 <= label < 256
    ]
    assert sorted(letters + held_out) == [chr(65 + i) for i in range(10) if i > 0] and len(held_out) <= 2
    for batch in batches:
        assert batch["inputs"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, 16)
        assert (batch["labels"][~batch["attention_mask"]] == -100).all()
        assert (batch["inputs"][~batch["attention_mask"]] == 256).all()
    again = opened(path, validation_fraction=0.2).train_batch(1, 2)
    assert all(np.array_equal(again[name], batches[1][name]) for name in again)
    order = [opened(path, seed=seed).train_batch(0, 10)["labels"].tolist() for seed in (1, 2)]
    assert order[0] != order[1]
    assert next(opened(path, seed=5, validation_fraction=0.2).validation_batches(8))["inputs"].tolist() == (
        next(found.validation_batches(8))["inputs"].tolist()
    )


def test_long_conversations_are_cut_and_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.jsonl",
        {"prompt": "p" * 5, "completion": "c" * 20},
        {"prompt": "p" * 30, "completion": "c"},
        {"prompt": "p", "completion": "c"},
    )
    found = opened(path, seq_length=10)
    (note,) = found.notes
    assert "cut at the end: 2" in note and "left out: 1" in note
    assert found.steps_per_epoch(1) == 2 and found.train_batch(0, 2)["inputs"].shape == (2, 16)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("{", ["not JSON"]),
        ("[1]", ["c.jsonl"]),
        ('{"text": "a"}', ["needs messages, or prompt and completion; it has text"]),
        ('{"messages": [], "prompt": "a", "completion": "b"}', ["needs messages, or"]),
        ('{"prompt": "a", "completion": 3}', ["two texts, or two lists"]),
        ('{"messages": []}', ["empty list"]),
        ('{"messages": [{"role": "user", "content": "a"}]}', ["no message of the assistant"]),
        ('{"messages": [{"content": "a"}]}', ["role"]),
        ("3", ["is a int, not an object"]),
    ],
)
def test_a_line_that_cannot_be_used(line: str, names: list[str], tmp_path: Path) -> None:
    good = json.dumps({"prompt": "a", "completion": "b"})
    path = tmp_path / "c.jsonl"
    path.write_text(f"{good}\n{line}\n" if line != "[1]" else line)
    with pytest.raises(IceNetError) as caught:
        opened(path)
    assert is_one_line(caught.value, *names)
    if line != "[1]":
        assert "line 2" in str(caught.value)
        (note,) = opened(path, errors="skip").notes
        assert "line 2" in note


def test_other_sources_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    for name in ("empty.jsonl", "table.parquet", "missing.jsonl"):
        with pytest.raises(DataError) as caught:
            opened(tmp_path / name)
        assert is_one_line(caught.value, name)


def test_a_length_that_leaves_no_answer_is_named(tmp_path: Path) -> None:
    """The file is not empty, and its lines have the right form: the length is what has to change."""
    path = write(
        tmp_path / "c.jsonl", {"prompt": "p" * 30, "completion": "c"}, {"prompt": "p" * 40, "completion": "c"}
    )
    for errors in ("stop", "skip"):
        with pytest.raises(DataError) as caught:
            opened(path, seq_length=10, errors=errors)
        assert is_one_line(caught.value, "raise data.seq_length, which is 10", "left out: 2 (c.jsonl line 1")
        assert "empty" not in str(caught.value) and "messages" not in str(caught.value)


@pytest.mark.parametrize(("fraction", "change"), [(0.01, "raise it"), (0.99, "lower it")])
def test_a_fraction_that_holds_out_none_or_all_says_how_to_change_it(
    fraction: float, change: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "c.jsonl", *[{"prompt": "p", "completion": "c"}] * 4)
    with pytest.raises(DataError) as caught:
        opened(path, validation_fraction=fraction)
    assert is_one_line(caught.value, "c.jsonl", "4 conversations", f"data.validation_fraction {fraction}", change)


def test_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", chat("a", "b"))
    with pytest.raises(IceNetError, match=r"line 1: .*chat template"):
        open_conversations(str(path), ByteTokenizer(), seq_length=9, seed=0)


@pytest.mark.parametrize("errors", ["stop", "skip"])
def test_a_template_with_a_wrong_syntax_is_no_fault_of_the_data(tmp_path: Path, errors: str) -> None:
    class Broken(Tokens):
        chat_template = "{% for m in messages %}"

    path = write(tmp_path / "c.jsonl", chat("a", "b"))
    with pytest.raises(ChatTemplateError) as caught:
        open_conversations(str(path), Broken(), seq_length=9, seed=0, errors=errors)
    assert is_one_line(caught.value, "data.tokenizer", "bytes", "chat template", "line 1")
    assert "c.jsonl" not in str(caught.value) and "data.errors" not in str(caught.value)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_model_is_trained_on_the_answers(tmp_path: Path, backend: str) -> None:
    """The loss is that of the answers: it falls to that of a known answer after unknown prompts."""
    pytest.importorskip(backend)
    from helpers import losses, train

    draws = np.random.default_rng(0)
    examples = [{"prompt": "".join(map(chr, draws.integers(97, 123, 6))), "completion": " yes"} for _ in range(64)]
    source = write(tmp_path / "c.jsonl", *examples)
    base = tiny(tmp_path, "training.max_steps=40", "training.eval_every=null", "training.learning_rate=1e-2")
    values = {**base.to_dict(), "data": {"kind": "chat", "source": str(source)}}
    config = Config.from_dict(values)
    assert isinstance(dataset_for(config), ConversationDataset)
    run = train(config, tmp_path / "run", backend).run
    assert losses(run)[0] > 4 and losses(run)[-1] < 0.5  # of 26 letters by chance: 3.3


def test_conversations_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file in the cache has the same batches and notes. A damaged one is made again, as for other settings."""
    calls = []

    def counted(example: Any, tokenizer: Any, train_on: str) -> Any:
        calls.append(example)
        return encode(example, tokenizer, train_on)

    monkeypatch.setattr(conversations, "encode", counted)
    path = write(tmp_path / "c.jsonl", chat("Hi", "Hello " * 20), *({"prompt": "a", "completion": c} for c in "bcd"))
    first = opened(path)
    assert len(calls) == 4
    with pytest.raises(ValueError, match="read-only"):
        first._file.tokens[0] = 1
    again = opened(path)
    assert len(calls) == 4 and again.notes == first.notes != [] and again.summary == first.summary
    for name, array in first.train_batch(1, 2).items():
        assert np.array_equal(again.train_batch(1, 2)[name], array)
    opened(path, errors="skip")
    assert len(calls) == 4
    first.path.write_bytes(first.path.read_bytes()[:-8])
    assert opened(path).fingerprint == first.fingerprint and len(calls) == 8
    for options in ({"train_on": "all"}, {"seq_length": 9}):
        opened(path, **options)
    other = Tokens()
    other.chat_template = f"!{TEMPLATE}"
    assert open_conversations(str(path), other, seq_length=64, seed=1).fingerprint != first.fingerprint
    assert len(calls) == 20
    write(path, {"prompt": "a", "completion": "b"})
    assert opened(path).num_conversations == 1 and not first.path.exists()


def test_processes_that_start_at_once_encode_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def slow(example: Any, tokenizer: Any, train_on: str) -> Any:
        calls.append(example)
        time.sleep(0.05)
        return encode(example, tokenizer, train_on)

    monkeypatch.setattr(conversations, "encode", slow)
    path = write(tmp_path / "c.jsonl", *({"prompt": "a", "completion": c} for c in "bcd"))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: opened(path), range(3)))
    assert len(calls) == 3 and len({data.fingerprint for data in found}) == 1


def test_prepare_encodes_conversations(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", *({"prompt": "a", "completion": c} for c in "bcd"))
    config = tiny(tmp_path, f"data={{kind: chat, source: {path}, validation_fraction: 0}}", "training.batch_size=2")
    summary = prepare(config, quiet=True)
    assert is_one_line(summary, "9 tokens of 3 conversations")
    path = Path(summary.rpartition(" in ")[2])
    os.utime(path, (0, 0))
    assert prepare(config, quiet=True) == f"already prepared: {summary}"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (0, 0))
    again = prepare(config, quiet=True)
    assert summary in again and "damaged" in again and bytes(content) != path.read_bytes()


def test_a_line_that_was_left_out_is_an_error_again(tmp_path: Path) -> None:
    """The file that `skip` made is not used for `stop`."""
    path = write(tmp_path / "c.jsonl", {"prompt": "a", "completion": "b"}, {"text": "x"})
    assert "left out" in opened(path, errors="skip").notes[0]
    with pytest.raises(DataError, match="line 2"):
        opened(path)
