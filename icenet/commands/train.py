"""`icenet train`: what is printed at the end."""

from __future__ import annotations

from typing import Any


def print_result(result: Any) -> None:
    """Says on standard output what a training run came to (a `trainer.Result`) and what to do with it."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    validation = f", validation loss {result.validation_loss:.4f}" if result.validation_loss is not None else ""
    if result.validation_accuracy is not None:
        validation += f", accuracy {result.validation_accuracy:.2%}"
    console.print(f"step {result.step}: loss {result.loss:.4f}{validation}", markup=False)
    console.print(f"run         {result.run}", markup=False)
    console.print(f"checkpoint  {result.checkpoint}", markup=False)
    plot = str(result.plot) if result.plot else "none: pip install 'icenet[plot]' draws one"
    console.print(f"plot        {plot}", markup=False)
