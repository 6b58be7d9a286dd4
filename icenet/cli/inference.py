"""`icenet generate`, `chat`, `eval`, `embed` and `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from icenet.cli.options import (
    PATH,
    TEXT_OPTIONS,
    averaged_option,
    backend_option,
    command,
    device_option,
    draft_options,
    dtype_option,
    examples,
    generation_options,
    json_option,
    overwrite_option,
    precision_option,
    quantize_options,
    show,
    show_json,
    template_option,
    to_list,
    trust_option,
)
from icenet.core.messages import options_of_command
from icenet.core.report import streams


@command(
    "generate",
    epilog=examples(
        'icenet generate runs/quickstart/mlx --prompt "def main("',
        "icenet generate runs/mine --prompt-file intro.txt --temperature 0.8 --top-k 50 --seed 1",
        "icenet generate runs/mine --backend torch --temperature 0",
        "icenet generate SmolLM2-1.7B --draft SmolLM2-135M --prompt-file intro.txt",
        "icenet generate MODEL --prompt-file book.txt --save-prompt-cache book.safetensors",
        "icenet generate MODEL --prompt-file book-and-question.txt --prompt-cache book.safetensors",
        'icenet generate SmolLM2-1.7B --prompt "The sea" --quantize 4',
    ),
)
@click.argument("model", type=PATH)
@click.option("--prompt", help="Text to continue.")
@click.option("--prompt-file", type=PATH, help="File with the text to continue; - for standard input.")
@click.option(
    "--add-special-tokens/--no-add-special-tokens",
    default=None,
    help="Put tokens around the prompt as the tokenizer does, such as a beginning-of-text token.",
)
@generation_options
@draft_options
@click.option(
    "--prompt-cache", type=PATH, metavar="FILE", help="Do not read again the beginning of the prompt in FILE."
)
@click.option(
    "--save-prompt-cache",
    type=PATH,
    metavar="FILE",
    help="Write what the model has read of the prompt to FILE, for --prompt-cache.",
)
@overwrite_option
@averaged_option
@backend_option
@device_option
@dtype_option
@quantize_options
@click.option("--json", "as_json", is_flag=True, help="Print text, tokens and finish reason as JSON.")
@trust_option
def generate_command(
    model: Path,
    prompt: str | None,
    prompt_file: Path | None,
    averaged: bool,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    draft: Path | None,
    num_draft_tokens: int | None,
    prompt_cache: Path | None,
    save_prompt_cache: Path | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Continue a text with a trained model.

    MODEL is a run, a checkpoint, a saved model or a Hugging Face folder. Options that are not given take their values
    from the generation section of the model's config. The output ends at an end-of-text token, before a stop text, or
    at the maximum number of tokens; --json also prints which of them it was.

    The text is continued as it is: icenet chat applies the chat template of a model.

    With --draft, a smaller model with the same tokenizer proposes tokens, and MODEL reads several of them at a time.
    The text is the same. --save-prompt-cache writes what MODEL has read of a prompt. With --prompt-cache, a prompt
    that begins with the same text is read from there on, on either backend.
    """
    from icenet.commands import generate
    from icenet.core.generation.prompts import read_prompt

    if prompt is not None and prompt_file is not None:
        raise click.UsageError("give either --prompt or --prompt-file")
    text = read_prompt(prompt_file) if prompt_file is not None else prompt or ""
    speedups = generate.Speedups(draft, num_draft_tokens, prompt_cache, save_prompt_cache, overwrite)
    options |= {"averaged": averaged, "speedups": speedups}
    if as_json:
        show_json(generate.generate(model, text, backend, device, dtype, **options))
        return
    for piece in generate.stream(model, text, backend, device, dtype, **options):
        streams.write(piece, end="")


@command(
    "chat",
    epilog=examples(
        "icenet chat SmolLM2-135M-Instruct",
        'icenet chat MODEL --message "What is the capital of France?"',
        'icenet chat MODEL --system "Answer in one word." --temperature 0.7 --seed 1',
        "icenet chat MODEL --backend torch --template-option enable_thinking=false",
        "icenet chat SmolLM2-1.7B-Instruct --draft SmolLM2-135M-Instruct",
        "icenet chat SmolLM2-1.7B-Instruct --quantize 4",
    ),
)
@click.argument("model", type=PATH)
@click.option(
    "--message", "messages", multiple=True, metavar="TEXT", help="Answer this message and exit. Repeatable, in turn."
)
@click.option("--system", metavar="TEXT", help="Message before the conversation that describes the task.")
@generation_options
@draft_options
@template_option
@averaged_option
@backend_option
@device_option
@dtype_option
@quantize_options
@trust_option
def chat_command(
    model: Path,
    messages: tuple[str, ...],
    system: str | None,
    template_options: dict[str, Any],
    averaged: bool,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    draft: Path | None,
    num_draft_tokens: int | None,
    **options: Any,
) -> None:
    """Chat with a model that has a chat template.

    MODEL is a Hugging Face folder, a run, a checkpoint or a saved model. Each line is a message; /help lists the
    commands. Ctrl-C stops an answer. Ctrl-D, /exit or Ctrl-C twice end the chat. If the standard input is no
    terminal, its lines are the messages.

    Options that are not given take their values from generation_config.json or from the generation section of the
    model's config.
    """
    from icenet.commands.chat import chat

    chat(
        model,
        messages,
        system=system,
        backend=backend,
        device=device,
        dtype=dtype,
        averaged=averaged,
        template_options=template_options,
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        **options,
    )


@command(
    "eval",
    epilog=examples(
        "icenet eval runs/quickstart/mlx --text book.txt",
        "icenet eval SmolLM2-135M-Instruct/ --text stdlib --max-tokens 100000 --backend torch",
        "icenet eval model/ --text wiki.jsonl --length 2048 --stride 512 --json",
        "icenet eval model/ --text wiki.jsonl --quantize 4",
    ),
)
@click.argument("model", type=PATH)
@click.option("--text", "source", required=True, help="A text file, a folder, a glob or stdlib, as data.source.")
@click.option("--length", type=click.IntRange(1), help="Tokens in a window. Default: the model's, at most 1,024.")
@click.option("--stride", type=click.IntRange(1), help="Distance of two windows. Default: they do not overlap.")
@click.option("--max-tokens", type=click.IntRange(1), help="Evaluate only this number of tokens.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Windows that are computed together."
)
@click.option("--text-key", default="text", show_default=True, help="Key of the text in JSON Lines files.")
@click.option(
    "--errors",
    type=click.Choice(["stop", "skip", "replace"]),
    default="stop",
    show_default=True,
    help="What to do with files and characters that cannot be used.",
)
@quantize_options
@averaged_option
@backend_option
@device_option
@dtype_option
@click.option("--quiet", is_flag=True, help="Show no progress.")
@json_option
@trust_option
@options_of_command({**TEXT_OPTIONS, "data.source": "--text"})
def eval_command(model: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Print the perplexity of a text.

    MODEL is a run, a checkpoint, a saved model or a Hugging Face folder. The text is divided into windows, and each
    token is predicted once, from those before it in its window.
    """
    from icenet.commands import eval as evaluation

    show(evaluation.evaluate(model, quiet=quiet or as_json, **options), as_json)


@command(
    "embed",
    epilog=examples(
        "icenet embed all-MiniLM-L6-v2/ sentences.txt --out vectors.npz",
        "icenet embed Qwen3-Embedding-0.6B/ queries.txt --out queries.npy --prompt-name query",
        "icenet embed model/ corpus.jsonl --text-key body --out corpus.npy --batch-size 128 --dtype bf16",
        "icenet embed model/ - --out vectors.npy --pooling cls --normalize",
    ),
)
@click.argument("model", type=PATH)
@click.argument("file", type=PATH)
@click.option("--out", required=True, type=PATH, help="File to write: .npz (embeddings and texts) or .npy.")
@click.option("--text-key", help="Key of the text in each object of a JSON Lines file. Default: text.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Number of texts that are computed together.",
)
@click.option(
    "--pooling",
    multiple=True,
    callback=to_list,
    type=click.Choice(["cls", "max", "mean", "mean_sqrt_length", "weighted_mean", "last"]),
    help="How the tokens of a text become one vector. Repeat to concatenate. Default: that of the model, or mean.",
)
@click.option("--normalize/--no-normalize", default=None, help="Divide each vector by its length.")
@click.option("--max-seq-length", type=click.IntRange(1), help="Number of tokens after which a text is cut.")
@click.option("--prompt", help="Text to put in front of each text.")
@click.option("--prompt-name", help="Which of the model's prompts to put in front of each text.")
@backend_option
@device_option
@dtype_option
@overwrite_option
@click.option("--quiet", is_flag=True, help="Show no progress.")
@trust_option
def embed_command(
    model: Path,
    file: Path,
    out: Path,
    text_key: str | None,
    batch_size: int,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    overwrite: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compute one vector for each text of a file.

    MODEL is a folder of sentence-transformers or Hugging Face, a run or a saved model. FILE has one text per line, or
    is a JSON Lines file (.jsonl); - is the standard input.
    """
    from icenet.commands.embed import embed

    text = embed(
        model,
        file,
        out,
        text_key=text_key,
        batch_size=batch_size,
        overwrite=overwrite,
        backend=backend,
        device=device,
        dtype=dtype,
        options=options,
        quiet=quiet,
    )
    streams.write(text)


@command(
    "predict",
    epilog=examples(
        "icenet predict runs/cnn-digits seven.png",
        "icenet predict runs/mine photos/ --top-k 5 --backend torch",
        "icenet predict runs/mine photos/ --json > classes.json",
        "icenet predict microsoft/resnet-50 photo.jpg",
    ),
)
@click.argument("model", type=PATH)
@click.argument("images", type=PATH, nargs=-1, required=True)
@click.option(
    "--top-k", type=click.IntRange(1), default=3, show_default=True, help="Number of classes to print per image."
)
@averaged_option
@backend_option
@device_option
@precision_option
@json_option
@trust_option
def predict_command(
    model: Path,
    images: tuple[Path, ...],
    top_k: int,
    averaged: bool,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Classify images with a trained model.

    MODEL is a run, a checkpoint, a saved model or a Hugging Face folder. IMAGES are files or folders.
    """
    from icenet.commands import predict

    show(predict.predict(model, images, backend, device, top_k, averaged, dtype), as_json)
