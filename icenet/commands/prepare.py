"""`icenet prepare`: encodes a text before training, or trains a tokenizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from icenet.core import files
from icenet.core.config import ChatDataConfig, Config
from icenet.core.config.presets import names
from icenet.core.data.datasets import dataset_for
from icenet.core.data.text.conversations import ConversationDataset
from icenet.core.data.text.left_out import LeftOut
from icenet.core.data.text.packed import TextDataset
from icenet.core.data.text.reading import Reader, UnusableFileError
from icenet.core.data.text.sources import Source, find_source
from icenet.core.errors import DataError, UsageError
from icenet.core.report.bar import Bar
from icenet.core.runs import checkpoint
from icenet.core.tokenizers.huggingface import HFTokenizer
from icenet.core.tokenizers.library import library
from icenet.core.training.signals import Interrupted, Stopped

EOT_TOKEN = "<|endoftext|>"
MIN_VOCAB_SIZE = 257
"""The 256 bytes and the end-of-text token."""
MAX_VOCAB_SIZE = 2**24
"""That of `model.vocab_size`."""


def prepare(config: Config, workers: int | None = None, quiet: bool = False) -> str:
    """Creates the token file of a configuration and returns a summary.

    If the cache has the file, checks that it is intact. Continues an interrupted call, except for conversations.

    Args:
        config: The configuration.
        workers: Number of threads that encode (default: one per processor).
        quiet: Show no progress.

    Raises:
        UsageError: The data is neither text nor conversations.
        ConfigError, DataError: See `dataset_for`.
    """
    if config.data.kind not in ("text", "chat"):
        raise UsageError(
            f"data.kind {config.data.kind}: only text and chat are prepared; icenet train reads other data directly"
        )
    started = time.time()
    try:
        dataset, path = _open(config, workers, quiet)
        is_new, notes = path.stat().st_mtime >= started - 0.05, list(dataset.notes)
        if not is_new and not dataset.is_intact():
            path.unlink()
            dataset, path = _open(config, workers, quiet)
            is_new, notes = True, [*dataset.notes, f"{path}: was damaged and is encoded again; check the disk"]
    except (KeyboardInterrupt, Stopped) as stop:
        kept = "the work done so far is kept: the same command continues it"
        if isinstance(config.data, ChatDataConfig):
            kept = "conversations that are not all encoded are not kept"
        raise Interrupted(str(stop) or "Ctrl-C", f"; {kept}") from None
    existing = "" if is_new else "already prepared: "
    if isinstance(dataset, ConversationDataset):
        tokens, count, noun = dataset.num_tokens, dataset.num_conversations, "conversation"
    else:
        tokens = dataset.num_train_tokens + dataset.num_validation_tokens
        count, noun = dataset.num_documents, "document"
    documents = f"{count:,} {noun}{'s' if count != 1 else ''}"
    summary = f"{existing}{tokens:,} tokens of {documents} ({path.stat().st_size / 1e6:,.1f} MB) in {path}"
    return "\n".join([summary, *notes])


def _open(config: Config, workers: int | None, quiet: bool) -> tuple[TextDataset | ConversationDataset, Path]:
    """Returns the data of a configuration and their token file."""
    dataset = dataset_for(config, workers=workers, quiet=quiet)
    assert isinstance(dataset, (TextDataset, ConversationDataset)) and dataset.path is not None
    return dataset, dataset.path


def read_config(target: str, overrides: Sequence[str], options: Collection[str]) -> Config:
    """Returns the configuration to prepare.

    Args:
        target: Path of a YAML file, or the name of a preset.
        overrides: Values of `--set`.
        options: Names of the given options that belong to `--train-tokenizer`.

    Raises:
        UsageError: `target` is a text, or there are such options.
        ConfigError: See `Config.from_yaml`.
    """
    if options:
        option = f"--{min(options).replace('_', '-')}"
        raise UsageError(f"{option}: only valid with --train-tokenizer bpe; a CONFIG has the keys of data instead")
    path = Path(target)
    if target == "stdlib" or path.is_dir() or (path.is_file() and path.suffix not in (".yaml", ".yml")):
        raise UsageError(
            f"{target}: is a text, not a CONFIG; use icenet prepare CONFIG --set data.source={target}, or add "
            "--train-tokenizer bpe"
        )
    return Config.from_yaml(target, overrides)


def train_tokenizer(
    source: str,
    *,
    vocab_size: int = 4096,
    out: Path = Path("tokenizer.json"),
    text_key: str = "text",
    errors: str = "stop",
    overwrite: bool = False,
    quiet: bool = False,
) -> str:
    """Trains a byte-level BPE on a text, writes it as a tokenizer.json and returns a summary.

    Byte pair encoding (Sennrich et al., 2016) of UTF-8 bytes with GPT-2's pre-tokenizer (Radford et al., 2019), by
    Hugging Face's `tokenizers`. Decoding returns any text unchanged. Token 0 is <|endoftext|>. The same text gives
    the same file, byte for byte.

    Args:
        source: The text, see `find_source`.
        vocab_size: Number of tokens, at least 257. A short text may have fewer.
        out: The file to write.
        text_key: Key of the text in JSON lines.
        errors: stop, skip or replace, as `data.errors`.
        overwrite: Replace an existing file.
        quiet: Show no progress.

    Raises:
        UsageError: The file exists, or the vocabulary is too small.
        DataError: The text cannot be read, or `tokenizers` is not installed.
    """
    if source.endswith((".yaml", ".yml")) or (source in names() and not Path(source).exists()):
        raise UsageError(f"{source}: is a configuration; name its text (data.source) instead")
    if vocab_size < MIN_VOCAB_SIZE:
        raise UsageError(f"--vocab-size {vocab_size}: must be at least {MIN_VOCAB_SIZE}, 256 bytes and {EOT_TOKEN}")
    if vocab_size > MAX_VOCAB_SIZE:
        raise UsageError(f"--vocab-size {vocab_size}: must be at most {MAX_VOCAB_SIZE:,}, the limit of a model")
    target = files.output_file(out, overwrite=overwrite)
    found = find_source(source, errors)
    files.output_file(out, overwrite=overwrite, inputs=[document.path for document in found.documents])
    if (enclosing := checkpoint.enclosing(target)) is not None:
        raise UsageError(f"--out {out}: is in the checkpoint {enclosing}; choose another place")
    left_out = found.left_out.copy()
    tokenizer = library().Tokenizer(library().models.BPE())
    tokenizer.pre_tokenizer = library().pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library().decoders.ByteLevel()
    trainer = library().trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT_TOKEN],
        initial_alphabet=library().pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with Bar(f"reading {found.description}", quiet) as bar:
        total, done = sum(document.size for document in found.documents), 0

        def progress(size: int) -> None:
            nonlocal done
            done += size
            bar(done, max(done, total))  # a gzip file has more text than bytes

        tokenizer.train_from_iterator(_training_texts(found, text_key, errors, left_out, progress), trainer=trainer)
    if not done:
        why = f"; {left_out.summary()}" if left_out else ""
        raise DataError(f"TEXT: there is no text in {found.description}{why}")
    content = (tokenizer.to_str(pretty=True) + "\n").encode("utf-8")
    size = HFTokenizer(content).vocab_size  # only a file that can be read is written
    files.write_bytes(target, content)
    fewer = "" if size == vocab_size else f" (of the {vocab_size:,} requested: the text has no more pairs to merge)"
    notes = f"\n{found.description}: {left_out.summary()}" if left_out else ""
    if text_key != "text" and not any(document.lines or document.json for document in found.documents):
        notes += f"\n--text-key {text_key} has no effect: {found.description} has no JSON lines"
    return (
        f"{size:,} tokens{fewer} from {done / 1e6:,.1f} MB of {found.description}, in {out}\n"
        f"to train with it: --set data.tokenizer={out} --set model.vocab_size={size}{notes}"
    )


def _training_texts(
    source: Source, text_key: str, errors: str, left_out: LeftOut, progress: Callable[[int], None]
) -> Iterator[list[str]]:
    """Yields the chunks of a source, each split at end-of-text tokens, and counts what it leaves out."""
    for document in source.documents:
        try:
            with Reader(document) as reader:
                for chunk in reader.chunks(text_key=text_key, errors=errors):
                    progress(len(chunk.text.encode()))
                    if chunk.left_out is not None:
                        left_out.add(*chunk.left_out)
                    yield [part for part in chunk.text.split(EOT_TOKEN) if part]
        except UnusableFileError as error:
            error.leave_out(source.sole, errors)
            left_out.add(error.reason, f"{document.name}: {error.details}")
