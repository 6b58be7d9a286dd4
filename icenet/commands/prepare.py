"""What `icenet prepare` does before a training: a tokenizer from a text, and the tokens of a text."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from icenet.core import files as staging
from icenet.core.config import Config
from icenet.core.config.presets import names
from icenet.core.data.datasets import Bar, TextDataset, dataset_for
from icenet.core.data.text.reading import NotTextError, Reader
from icenet.core.data.text.sources import Source, find_source
from icenet.core.errors import DataError, IceNetError, UsageError
from icenet.core.tokenizers.huggingface import HFTokenizer, library

END = "<|endoftext|>"
LEAST_VOCABULARY = 257
"""256 bytes, and the end of a text."""


def prepare(config: Config, workers: int | None = None, quiet: bool = False) -> str:
    """Makes the tokens that training with a configuration reads; says where they are.

    What was done before a kill is not done again, and what is done is not done at all.

    Raises:
        UsageError: the configuration reads no text.
        ConfigError, DataError: as `dataset_for` has it.
    """
    if config.data.kind != "text":
        raise UsageError(f"data.kind {config.data.kind}: only text is prepared; icenet train reads the rest as it is")
    began = time.time()
    try:
        dataset = dataset_for(config, workers=workers, quiet=quiet)
    except KeyboardInterrupt:
        raise IceNetError("stopped by Ctrl-C; what is done is kept: the same command goes on from there") from None
    assert isinstance(dataset, TextDataset) and dataset.path is not None
    status = dataset.path.stat()
    tokens = dataset.num_train_tokens + dataset.num_validation_tokens
    there = "" if status.st_mtime >= began - 0.05 else "already there: "
    texts_ = f"{dataset.num_documents:,} text{'s' if dataset.num_documents != 1 else ''}"
    return f"{there}{tokens:,} tokens of {texts_} ({status.st_size / 1e6:,.1f} MB) in {dataset.path}"


def read_config(target: str, overrides: Sequence[str], options: Collection[str]) -> Config:
    """The configuration that is to be prepared; `options` are those given that a tokenizer's training takes.

    Raises:
        UsageError: a text is named in its place, or there are such options.
        ConfigError: see `Config.from_yaml`.
    """
    if options:
        option = f"--{min(options).replace('_', '-')}"
        raise UsageError(f"{option}: goes with --train-tokenizer bpe; in a CONFIG these are keys of data")
    path = Path(target)
    if target == "stdlib" or path.is_dir() or (path.is_file() and path.suffix not in (".yaml", ".yml")):
        raise UsageError(
            f"{target}: is a text, and a CONFIG whose data.source names it is wanted (icenet prepare CONFIG --set "
            f"data.source={target}); or add --train-tokenizer bpe"
        )
    return Config.from_yaml(target, overrides)


def train_tokenizer(
    source: str,
    *,
    vocab_size: int = 4096,
    out: Path = Path("tokenizer.json"),
    text_key: str = "text",
    overwrite: bool = False,
    quiet: bool = False,
) -> str:
    """Trains a byte-level BPE on a text and writes it as a tokenizer.json; says what came of it.

    Byte pair encoding (Sennrich et al., 2016) of UTF-8 bytes, words cut as GPT-2 cuts them (Radford et al., 2019), by
    Hugging Face's `tokenizers`. Any text comes back as it was; token 0 is <|endoftext|>. The same text gives the same
    file, byte for byte.

    Raises:
        UsageError: the file is there, or the vocabulary would be smaller than the bytes.
        DataError: the text cannot be read, or `tokenizers` is not installed.
    """
    if source.endswith((".yaml", ".yml")) or (source in names() and not Path(source).exists()):
        raise UsageError(f"{source}: is a configuration; name the text itself, as its data.source does")
    if vocab_size < LEAST_VOCABULARY:
        raise UsageError(f"--vocab-size {vocab_size}: must be at least {LEAST_VOCABULARY}, 256 bytes and {END}")
    if out.is_dir():
        raise UsageError(f"--out {out}: is a folder; name a file, such as {out / 'tokenizer.json'}")
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out}: exists; choose another, or give --overwrite to replace it")
    found = find_source(source)
    tokenizer = library().Tokenizer(library().models.BPE())
    tokenizer.pre_tokenizer = library().pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library().decoders.ByteLevel()
    trainer = library().trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=library().pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with Bar(f"learning from {found.description}", quiet) as bar:
        total, done = sum(document.size for document in found.documents), 0

        def progress(size: int) -> None:
            nonlocal done
            done += size
            bar(done, max(done, total))  # a gzip file has more text than bytes

        tokenizer.train_from_iterator(_training_texts(found, text_key, progress), trainer=trainer)
    if not done:
        raise DataError(f"data.source: there is no text in {found.description}")
    content = (tokenizer.to_str(pretty=True) + "\n").encode("utf-8")
    size = HFTokenizer(content).vocab_size  # what cannot be read is not written
    staging.write_bytes(out, content)
    fewer = "" if size == vocab_size else f" (of the {vocab_size:,} wanted: the text has no more pairs to join)"
    return (
        f"{size:,} tokens{fewer} from {done / 1e6:,.1f} MB of {found.description}, in {out}\n"
        f"train with it: --set data.tokenizer={out} --set model.vocab_size={size}"
    )


def _training_texts(source: Source, text_key: str, progress: Callable[[int], None]) -> Iterator[list[str]]:
    """Yields the text of a source in chunks, each split at end-of-text tokens. Files that are not text are left out."""
    for document in source.documents:
        try:
            with Reader(document) as reader:
                for chunk in reader.chunks(text_key=text_key):
                    progress(len(chunk.text.encode()))
                    yield [part for part in chunk.text.split(END) if part]
        except NotTextError:
            if source.sole:
                raise
