"""`icenet bench`: the list of the measurements."""

from __future__ import annotations

import click

from icenet.cli import bench_inference, bench_training
from icenet.cli.options import CommandGroup, examples


@click.group(
    cls=CommandGroup,
    epilog=examples("icenet bench decode", "icenet bench all gpt2", "icenet bench memory"),
)
def bench() -> None:
    """Measure memory and speed on this machine.

    Measures every installed backend, or the one given with --backend, each in a separate process. decode, prefill,
    batch, load, start and all also measure mlx-lm and transformers, if they are installed, on the same weights, and
    quantized measures mlx-lm.
    """


for command in (  # in the order of the help
    bench_inference.decode_command,
    bench_inference.prefill_command,
    bench_inference.batch_command,
    bench_inference.quantized_command,
    bench_inference.speculative_command,
    bench_inference.load_command,
    bench_inference.convert_command,
    bench_inference.start_command,
    bench_inference.all_command,
    bench_training.train_command,
    bench_training.guide_command,
    bench_training.cpu_command,
    bench_training.memory_command,
    bench_training.step_command,
    bench_training.dropout_command,
    bench_training.port_command,
):
    bench.add_command(command)
