"""Conversations and pairs of prompt and completion (`data.kind: chat`), of which only the answers are trained.

Each line of a JSON Lines file is an object with one of these forms:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "completion": ...}       two texts, or two lists of messages

Messages become text by the chat template of the tokenizer. Two texts are joined, and the end of text follows. The
tokens are encoded once, kept in the cache of token files, and mapped into memory.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core import rng
from icenet.core.config.section import visible
from icenet.core.data.epochs import Epochs, validation_rows
from icenet.core.data.text import conversation_file
from icenet.core.data.text.cache import cached
from icenet.core.data.text.conversation_file import ConversationFile, PartialConversations, Row
from icenet.core.data.text.documents import IGNORED, MULTIPLE
from icenet.core.data.text.left_out import BAD_LINES, EMPTY, LeftOut
from icenet.core.data.text.packed import Batch
from icenet.core.data.text.reading import MAX_LINE_BYTES
from icenet.core.data.text.sources import Document, Source, find_source, reason
from icenet.core.errors import ChatTemplateError, DataError, IceNetError
from icenet.core.messages import first_line
from icenet.core.tokenizers import chat
from icenet.core.tokenizers.base import Tokenizer, encode_prompt

Progress = Callable[[int, int], None]

NO_ANSWER = "conversations without an answer within data.seq_length, left out"
CUT = "conversations longer than data.seq_length, cut at the end"


class ConversationDataset:
    """Rows of conversations, padded and masked. It implements `icenet.core.data.datasets.Dataset`.

    Rows are held out for validation at random, but independently of the seed. The order of the others is that of
    `Epochs`.

    Args:
        file: The conversations.
        tokenizer: Their tokenizer.
        seed: Determines the order of batches.
        validation_fraction: Fraction of the rows held out.
        description: Name in messages.
        left_out: What was left out of the source besides `file.left_out`.

    Attributes:
        path: The file of the tokens.
        num_tokens, num_conversations: Size of the source.
    """

    unit = "tok"

    def __init__(
        self,
        file: ConversationFile,
        tokenizer: Tokenizer,
        *,
        seed: int,
        validation_fraction: float = 0.0,
        description: str = "the conversations",
        left_out: LeftOut | None = None,
    ) -> None:
        self.tokenizer, self.seed, self.description = tokenizer, seed, description
        self.fingerprint = file.fingerprint
        self.path = file.path
        self.num_tokens, self.num_conversations = len(file.tokens), len(file.starts) - 1
        self._file = file
        held_out = round(self.num_conversations * validation_fraction)
        if validation_fraction and not 0 < held_out < self.num_conversations:
            change = "lower it" if held_out else "raise it"
            raise DataError(
                f"{description} has {self.num_conversations:,} conversations, too few to hold out "
                f"data.validation_fraction {validation_fraction:g} of them; {change}, name a longer data.source, or "
                "set it to 0"
            )
        order = rng.permutation(rng.key(0, "conversations held out"), self.num_conversations)
        self._train, self._validation = np.sort(order[held_out:]), np.sort(order[:held_out])
        left_out = (left_out or LeftOut()).merged(file.left_out)
        self.notes = [f"{description}: {left_out.summary()}"] if left_out else []
        self.summary = [
            f"{len(self._train):,} conversations for training, {held_out:,} for validation; {file.num_trained:,} of "
            f"{len(file.tokens):,} tokens are answers"
        ]
        self._epochs = Epochs(len(self._train), seed, self._too_few_rows)

    @property
    def files(self) -> Mapping[str, bytes]:
        """The files of the tokenizer, which checkpoints store."""
        return self.tokenizer.files

    @property
    def facts(self) -> dict[str, Any]:
        """Empty: a text model needs nothing besides its configuration and tokenizer."""
        return {}

    @property
    def items_per_row(self) -> int:
        """Number of tokens in one row of a batch, on average."""
        labels = int((self._file.starts[self._train + 1] - self._file.starts[self._train] - 1).sum())
        return max(1, round(labels / max(1, len(self._train))))

    def is_intact(self) -> bool:
        """Returns whether the tokens are those that were encoded. Reads all of them."""
        rows = (self._file.row(index) for index in range(self.num_conversations))
        return conversation_file.compute_fingerprint(rows, self.tokenizer) == self.fingerprint

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns the number of full batches in one pass. The remainder is dropped.

        Raises:
            DataError: The number is zero.
        """
        return self._epochs.steps(batch_size)

    def train_batch(self, step: int, batch_size: int) -> Batch:
        """Returns the batch of a step, counted from 0: a pure function of (seed, step, batch_size).

        Returns:
            `inputs` and `labels`, int32 `[batch_size, T]`, and `attention_mask`, bool `[batch_size, T]`, False for
            padding. The label of padding and of tokens that are not trained is -100.
        """
        return self._batch(self._train[self._epochs.rows(step, batch_size)[1]])

    def validation_batches(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """Yields at most `count` validation batches, the same in every call; the last one may be smaller."""
        for rows in validation_rows(len(self._validation), batch_size, count):
            yield self._batch(self._validation[rows])

    def _too_few_rows(self, batch_size: int) -> str:
        return (
            f"{self.description} has {len(self._train):,} conversations to train on, and one batch needs "
            f"{batch_size:,}: name a longer data.source, or lower training.batch_size"
        )

    def _batch(self, indices: NDArray[np.int64]) -> Batch:
        rows = [self._file.row(index) for index in indices]
        longest = -(-max(len(row.tokens) - 1 for row in rows) // MULTIPLE) * MULTIPLE
        inputs = np.full((len(rows), longest), self.tokenizer.eot_id, np.int32)
        labels = np.full((len(rows), longest), IGNORED, np.int32)
        mask = np.zeros((len(rows), longest), np.bool_)
        for index, (tokens, trained) in enumerate(rows):
            count = len(tokens) - 1
            inputs[index, :count] = tokens[:-1]
            labels[index, :count] = np.where(trained[1:], tokens[1:], IGNORED)
            mask[index, :count] = True
        return {"inputs": inputs, "labels": labels, "attention_mask": mask}


def open_conversations(
    source: str,
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    seed: int,
    validation_fraction: float = 0.0,
    train_on: str = "answers",
    errors: str = "stop",
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> ConversationDataset:
    """Opens a source of conversations. Encodes it first if its tokens are not in the cache.

    Args:
        source: A file of JSON lines, or a folder or glob of such files.
        tokenizer: A tokenizer; messages need its chat template.
        seq_length: Maximum number of labels in a row, beyond which a conversation is cut.
        seed, validation_fraction: See `ConversationDataset`.
        train_on: answers, or all for every token.
        errors: stop, or skip to leave out lines that cannot be used.
        cache_dir: The folder of token files (default: $ICENET_CACHE or ~/.cache/icenet).
        progress: Called with the bytes done and the bytes in total.

    Raises:
        DataError: A file cannot be read, a line has no conversation, nothing is left, or the cache cannot be written.
        UsageError: The tokenizer has no chat template, or the template refuses the messages.
        ChatTemplateError: The template renders no messages.
    """
    found = find_source(source, "stop" if errors == "replace" else errors)
    template = [getattr(tokenizer, name, None) for name in ("chat_template", "template_tokens")]
    settings = [seq_length, train_on, template]

    def opened(path: Path) -> ConversationFile | None:
        file = conversation_file.open_file(path)
        return file if file is not None and file.left_out.is_allowed(errors) else None

    def make(path: Path, partial: Path) -> None:
        with PartialConversations(partial, tokenizer) as rows:
            left_out = _encode_source(found, tokenizer, seq_length, train_on, errors, rows, progress)
            if not len(rows):
                way_out = "each line must be an object with messages, or with prompt and completion"
                if NO_ANSWER in left_out.counts:
                    way_out = f"raise data.seq_length, which is {seq_length}"
                left_out = found.left_out.merged(left_out)
                raise DataError(
                    f"data.source: there are no conversations to train on in {found.description}; {way_out}"
                    f"{'; ' if left_out else ''}{left_out.summary()}"
                )
            rows.write(path, left_out)

    identity = json.dumps([conversation_file.VERSION, tokenizer.name, found.identity, settings], default=dict)
    folder = Path(cache_dir) if cache_dir is not None else None
    return ConversationDataset(
        cached(found, identity, folder, opened, make),
        tokenizer,
        seed=seed,
        validation_fraction=validation_fraction,
        description=found.description,
        left_out=found.left_out,
    )


def _encode_source(
    source: Source,
    tokenizer: Tokenizer,
    seq_length: int,
    train_on: str,
    errors: str,
    rows: PartialConversations,
    progress: Progress | None,
) -> LeftOut:
    """Appends the conversations of a source to `rows`. Returns what is left out."""
    left_out = LeftOut()
    total, done = sum(document.size for document in source.documents), 0
    for document in source.documents:
        is_empty, read = True, 0
        for number, line in _lines(document):
            is_empty = False
            try:
                row = encode(_object(line), tokenizer, train_on)
            except ChatTemplateError as error:
                raise ChatTemplateError(f"data.tokenizer: {tokenizer.name}: {error}") from None
            except IceNetError as error:
                if errors != "skip":
                    raise type(error)(
                        f"data.source: {document.path}, line {number}: {error}; correct it, or leave such lines out "
                        "with data.errors=skip"
                    ) from None
                left_out.add(BAD_LINES, f"{document.name} line {number}: {error}")
                continue
            place = f"{document.name} line {number}"
            if len(row.tokens) > seq_length + 1:
                left_out.add(CUT, place)
                row = Row(row.tokens[: seq_length + 1], row.trained[: seq_length + 1])
            if row.trained.any():
                rows.append(row)
            else:
                left_out.add(NO_ANSWER, place)
            read += len(line)
            if progress is not None:
                progress(done + min(read, document.size), total)
        if is_empty:
            left_out.add(EMPTY, document.name)
        done += document.size
        if progress is not None:
            progress(done, total)
    return left_out


def encode(example: Mapping[str, Any], tokenizer: Tokenizer, train_on: str = "answers") -> Row:
    """Returns the tokens of an example, and which of them are trained.

    A token that contains both the end of a prompt and the beginning of an answer is trained.

    Args:
        example: An object with `messages`, or with `prompt` and `completion`.
        tokenizer: The tokenizer.
        train_on: answers: those of the assistant, each with the end of its turn; all: everything.

    Raises:
        DataError: It has neither, or both.
        UsageError: See `icenet.core.tokenizers.chat.render`.
    """
    has_messages, has_pair = "messages" in example, "prompt" in example and "completion" in example
    if has_messages == has_pair:
        keys = ", ".join(visible(str(key)) for key in example) or "no key"
        raise DataError(f"needs messages, or prompt and completion; it has {keys}")
    first = 0
    if has_messages:
        messages = example["messages"]
    elif isinstance(example["prompt"], str) and isinstance(example["completion"], str):
        return _encode_pair(example["prompt"], example["completion"], tokenizer, train_on)
    elif isinstance(example["prompt"], list) and isinstance(example["completion"], list):
        messages, first = example["prompt"] + example["completion"], len(example["prompt"])
    else:
        raise DataError("prompt and completion must be two texts, or two lists of messages")
    options = {key: value for key, value in example.items() if key in ("tools", "documents")}
    messages = chat.to_messages(messages)
    if not any(message["role"] == "assistant" for message in messages[first:]):
        raise DataError("has no message of the assistant to train on")

    def text_of(count: int, asks: bool = False) -> str:
        return chat.render(tokenizer, messages[:count], add_generation_prompt=asks, template_options=options)

    text = text_of(len(messages))
    tokens = tokenizer.encode(text)
    trained = np.zeros(len(tokens), np.bool_)
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index >= first:
            start = _common(text, text_of(index, asks=True)) if index else 0
            end = len(text) if index + 1 == len(messages) else _common(text, text_of(index + 1))
            # the tokens before a place in the text are those that the text up to it begins with
            begin, stop = (_common(tokens, tokenizer.encode(text[:place])) for place in (start, end))
            trained[begin:stop] = True
    return _row(tokens, trained, train_on)


def _encode_pair(prompt: str, completion: str, tokenizer: Tokenizer, train_on: str) -> Row:
    tokens = encode_prompt(tokenizer, prompt + completion)
    while tokens and tokens[-1] == tokenizer.eot_id:
        tokens.pop()
    begin = _common(tokens, encode_prompt(tokenizer, prompt))
    tokens = [*tokens, tokenizer.eot_id]
    trained = np.zeros(len(tokens), np.bool_)
    trained[begin:] = True
    return _row(tokens, trained, train_on)


def _row(tokens: Sequence[int], trained: NDArray[np.bool_], train_on: str) -> Row:
    if train_on == "all":
        trained[:] = True
    trained[:1] = False  # nothing predicts it
    return Row(np.array(tokens, np.int32), trained)


def _common(one: Sequence[Any], two: Sequence[Any]) -> int:
    """Returns the length of the common beginning of two sequences."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON: {first_line(error, 'nested too deeply')}") from None
    if not isinstance(value, dict):
        raise DataError(f"is a {type(value).__name__}, not an object")
    return value


def _lines(document: Document) -> Iterator[tuple[int, bytes]]:
    """Yields the number and the content of each line that is not blank; of a JSON array, of each item."""
    path = Path(document.path)
    if document.way_out is not None:
        raise DataError(f"data.source: {path} is {path.suffix}, not JSON lines; {document.way_out}")
    try:
        with gzip.open(path) if document.packed else path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if number == 1 and line.lstrip()[:1] == b"[":
                    yield from _items(path, line + file.read(MAX_LINE_BYTES + 1))
                    return
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"data.source: {path}, line {number}: has more than {MAX_LINE_BYTES >> 20} MB")
                if line.strip():
                    yield number, line
    except (OSError, EOFError) as error:
        raise DataError(f"data.source: {path} cannot be read: {reason(error)}") from None


def _items(path: Path, content: bytes) -> Iterator[tuple[int, bytes]]:
    if len(content) > MAX_LINE_BYTES:
        raise DataError(
            f"data.source: {path} is a JSON array of more than {MAX_LINE_BYTES >> 20} MB; convert it to JSON lines: "
            f"jq -c '.[]' {path.name}"
        )
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.source: {path} is not JSON: {first_line(error, '')}") from None
    for index, value in enumerate(values):
        yield index + 1, json.dumps(value).encode()
