"""`icenet convert`: converts the weights of a model between the forms of MLX and PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from icenet.core.conversion import convert


def convert_model(
    source: Path,
    destination: Path,
    to: str,
    source_form: str | None,
    config: str | None,
    overwrite: bool,
    averaged: bool = False,
    *,
    key: str | None = None,
    strip_prefix: Sequence[str] = (),
    quantize: int | None = None,
    group_size: int | None = None,
) -> str:
    """Converts weights. Returns a summary in text.

    Args:
        source, destination, to, source_form, config, overwrite, averaged, key, strip_prefix, quantize, group_size:
            See `icenet.core.conversion.convert.convert_model`.
    """
    done = convert.convert_model(
        source,
        destination,
        to,
        source_form=source_form,
        config=config,
        key=key,
        strip_prefix=strip_prefix,
        averaged=averaged,
        overwrite=overwrite,
        quantize=quantize,
        group_size=group_size,
    )
    lines = [f"from  {done.source}", f"to    {done.destination}"]
    if done.left_out:
        lines.append(f"left out: {', '.join(done.left_out)}")
    if done.note:
        lines.append(f"note: {done.note}")
    return "\n".join(lines)
