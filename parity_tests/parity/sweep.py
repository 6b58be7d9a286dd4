"""Small random configurations over every option of every model family, and the checks of one configuration.

Each is built, compared layer by layer (forward and backward) and converted. One in three is trained, saved, resumed.
A case depends only on its seed and index. The default tests check a few (`test_sweep.py`). As a program this file
checks many of them with each instruction set of the processor, and counts the false alarms, or plants faults and
counts those that are found:

    python parity_tests/parity/sweep.py --seed 7 --count 2000 --jobs 2
    python parity_tests/parity/sweep.py --seed 7 --faults 10

An alarm is repeated with the printed environment and `--only INDEX`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from icenet.commands.convert import convert_model
from icenet.core import rng
from icenet.core.config import FAMILIES, Config, ImageModelConfig, ModelConfig, cnn_plan
from icenet.core.engine import Batch
from icenet.core.runs import checkpoint
from icenet.core.weights import files as weight_files
from icenet.parity.configuration.engines import Engines, build
from icenet.parity.configuration.report import Report
from icenet.parity.configuration.run import compare_engines, random_batch, unequal

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
YES_NO = (True, False)
PRECISIONS = ("fp32",) * 6 + ("bf16", "fp16")
OPTIMIZERS = ("adamw", "sgd", "adamw", "adafactor", "adamw", "muon", "adamw", "lion", "adamw", "adam")
LEARNING_RATE = 1e-2
SCALINGS: tuple[dict[str, Any] | None, ...] = (
    {"type": "linear", "factor": 3.0},
    {"type": "llama3", "factor": 8.0, "original_length": 16},
    {"type": "yarn", "factor": 4.0, "original_length": 16},
    None,
    {"type": "dynamic", "factor": 4.0, "original_length": 8},
    {"type": "longrope", "factor": 4.0, "original_length": 8},
)


# ---- random cases -------------------------------------------------------------------------------------------


class Draw(random.Random):
    """The random numbers of one case.

    `cycle` goes through options in a shuffled order, so that any `len(options)` consecutive cases of a family cover
    them all. Independent draws would need many more cases.
    """

    def __init__(self, seed: int, index: int) -> None:
        super().__init__(f"{seed} {index}")
        self._seed = seed
        self.number, family = divmod(index, len(FAMILIES))
        self.family = list(FAMILIES)[family]

    def cycle(self, name: str, options: Sequence[Any]) -> Any:
        round_number, position = divmod(self.number, len(options))
        order = random.Random(f"{self._seed} {self.family} {name} {round_number}")
        return order.sample(list(options), len(options))[position]


def transformer(draw: Draw) -> dict[str, Any]:
    heads = draw.randint(1, 4)
    head_size = draw.choice([size for size in range(1, 14) if heads * size % 2 == 0])
    model = {
        "hidden_size": heads * head_size,
        "num_layers": draw.randint(1, 2),
        "num_heads": heads,
        "max_seq_length": draw.choice([16, 33]),
        "activation": draw.cycle("activation", ACTIVATIONS),
        "feed_forward_multiplier": draw.randint(1, 4),
        "norm_position": draw.cycle("norm_position", ["pre", "post", "sandwich", "branch"]),
        "causal": draw.cycle("causal", YES_NO),
    }
    return {**model, **transformer_options(draw, model)}


def transformer_options(draw: Draw, model: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of later families of transformers."""
    layers, heads = model["num_layers"], model["num_heads"]
    options: dict[str, Any] = {
        "positions": draw.cycle("positions", ["sinusoidal", "learned", "rotary", "none"]),
        "rotary_theta": draw.choice([10000.0, 300.0]),
        "rotary_fraction": draw.choice([1.0, 0.5]),
        "rotary_pairs": draw.cycle("rotary_pairs", ["half", "interleaved"]),
        "head_size": draw.choice([None, 4, 8]),
        "num_kv_heads": draw.choice([None, 1]) if heads > 1 else None,
        "query_key_norm": draw.cycle("query_key_norm", ["none", "head", "all"]),
        "norm": draw.cycle("norm", ["layer_norm", "rms_norm"]),
        "norm_eps": draw.choice([1e-5, 1e-3]),
        "feed_forward": draw.cycle("feed_forward", ["plain", "gated"]),
        "feed_forward_size": draw.choice([None, 5]),
    }
    for name in ("attention_bias", "attention_output_bias", "feed_forward_bias", "norm_offset"):
        options[name] = draw.cycle(name, YES_NO)
    options["norm_offset"] &= options["norm"] == "rms_norm"
    output = draw.cycle("output", ["tied", "plain", "bias", "tied"])
    options |= {"tie_embeddings": output == "tied", "output_bias": output == "bias"}
    options["parallel_residual"] = draw.cycle("parallel_residual", YES_NO) and model["norm_position"] == "pre"
    for name in ("attention_scale", "attention_softcap", "logit_softcap", "embedding_scale"):
        options[name] = draw.cycle(name, [None, None, 0.7])
    if count := draw.cycle("num_experts", [None, None, None, None, 1, 2, 3, 6]):
        options |= {"num_experts": count, "experts_per_token": min(count, draw.cycle("experts_per_token", [1, 2]))}
        options["expert_size"] = draw.cycle("expert_size", [None, 3])
        options["expert_layers"] = draw.cycle("expert_layers", [None, [layers - 1]])
        options["normalize_expert_weights"] = draw.cycle("normalize_expert_weights", YES_NO)
        options["router_aux_loss_coef"] = draw.cycle("router_aux_loss_coef", [0.0, 0.5])
    if sliding := draw.cycle("sliding_window", ["all", "some", None, None]):
        options |= {"sliding_window": draw.randint(1, 6), "causal": True}
        options["layer_types"] = None if sliding == "all" else ["sliding", "full"][:layers]
    if options["positions"] == "rotary":  # once in four cases, so that each scaling is in 24
        options |= rotary_options(draw, layers)
    return options | encoder_options(draw, {**model, **options})


def encoder_options(draw: Draw, model: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of BERT and its successors, some of which decoders may have."""
    options: dict[str, Any] = {
        "token_types": draw.cycle("token_types", [0, 0, 2]),
        "embedding_norm": draw.cycle("embedding_norm", YES_NO),
        "position_offset": draw.cycle("position_offset", [0, 2]) if model["positions"] == "learned" else 0,
        "output": draw.cycle("head", ["linear", "transform", "linear", "none"]),
    }
    if model["tie_embeddings"]:
        options["output_bias"] = draw.cycle("output_bias", YES_NO)
    if options["output"] == "none":
        options |= {"tie_embeddings": False, "output_bias": False, "logit_softcap": None}
    if not model["causal"]:
        options |= {"relative_buckets": draw.cycle("relative_buckets", [4, None, 8]), "relative_max_distance": 9}
    return options


def rotary_options(draw: Draw, layers: int) -> dict[str, Any]:
    number, size = draw.number // 4, draw.choice([4, 8])
    scaling = SCALINGS[number % len(SCALINGS)]
    options: dict[str, Any] = {"head_size": size, "rotary_scaling": scaling}
    if scaling is not None and scaling["type"] in ("dynamic", "longrope"):
        options["rotary_fraction"] = 1.0
    if scaling is not None and scaling["type"] == "longrope":
        factors = [float(pair + 1) for pair in range(size // 2)]
        options["rotary_scaling"] = {**scaling, "short_factors": factors, "long_factors": factors[::-1]}
    if number % 2 == 0:
        options |= {"sliding_window": 4, "causal": True, "layer_types": ["sliding", "full"][:layers]}
        options["sliding_rotary_theta"] = 50.0
    if number % 3 == 0:
        options["rotary_layers"] = [0]
    return options


def recurrent(draw: Draw) -> dict[str, Any]:
    direction = draw.cycle("direction", ["forward", "forward, tied", "bidirectional"])
    return {
        "hidden_size": draw.randint(1, 24),
        "num_layers": draw.randint(1, 2),
        "bidirectional": direction == "bidirectional",
        "activation": draw.cycle("activation", ["tanh", "relu"]) if draw.family == "rnn" else "tanh",
        "tie_embeddings": direction == "forward, tied",
    }


def cnn(draw: Draw) -> dict[str, Any]:
    depths = None
    if draw.cycle("stage_depths", YES_NO):
        depths = [draw.randint(1, 2) for _ in range(draw.randint(1, 2))]
    model: dict[str, Any] = {
        "num_layers": sum(depths) if depths else draw.randint(1, 3),
        "activation": draw.cycle("activation", ACTIVATIONS),
        "image_channels": draw.choice([1, 2, 3, 5]),
        "stem": draw.cycle("stem", ["conv3", "conv3", "conv7"]),
        "base_channels": draw.randint(2, 9),
        "block": draw.cycle("block", ["alternating", "conv", "basic", "bottleneck"]),
        "stage_depths": depths,
        "classifier": draw.cycle("classifier", ["hidden", "linear"]),
        "hidden_size": draw.randint(2, 24),
        "first_stage_stride": draw.cycle("first_stage_stride", [1, 1, 2]),
        "bottleneck_stride": draw.cycle("bottleneck_stride", ["conv3", "conv1"]),
    }
    num_stages = len(depths) if depths else min(model["num_layers"], 4)
    given_widths = draw.cycle("stage_widths", YES_NO)
    model["stage_widths"] = [draw.randint(2, 12) for _ in range(num_stages)] if given_widths else None
    if model["classifier"] == "linear":  # then hidden_size is the width of the last stage
        plain: Any = ModelConfig(type="cnn", **{**model, "classifier": "hidden"})
        model["hidden_size"] = cnn_plan.blocks(plain)[-1].outputs
    return model


def vit(draw: Draw) -> dict[str, Any]:
    patch, heads, head_size = draw.randint(1, 5), draw.randint(1, 3), draw.randint(2, 8)
    has_head_size = draw.cycle("head_size", YES_NO)
    poolings = [("token", "none"), ("mean", "none"), ("token", "token"), ("token", "classifier")]
    pooling, distillation = draw.cycle("pooling", poolings)
    return {
        "image_size": patch * draw.randint(1, 3) + draw.randint(0, patch - 1),
        "patch_size": patch,
        "image_channels": draw.choice([1, 2, 3, 5]),
        "pooling": pooling,
        "distillation": distillation,
        "hidden_size": draw.randint(3, 24) if has_head_size else heads * head_size,
        "num_layers": draw.randint(1, 2),
        "num_heads": heads,
        "head_size": head_size if has_head_size else None,
        "attention_bias": draw.cycle("attention_bias", YES_NO),
        "activation": draw.cycle("activation", ACTIVATIONS),
        "feed_forward_size": draw.choice([None, 5, 17]),
        "norm_eps": draw.choice([1e-6, 1e-3]),
    }


def case(
    seed: int, index: int, precisions: Sequence[str] = PRECISIONS, compiled: bool = False
) -> tuple[Config, dict[str, Any]]:
    """Returns a configuration, and the sizes of its batches.

    Args:
        seed, index: The case depends on these only.
        precisions: Values of `mixed_precision`, each as often as it is in the list.
        compiled: Whether one in eight models is compiled. On a CPU, MLX compiles each new kernel with g++, one second
            for each of 30 to 50 kernels.
    """
    draw = Draw(seed, index)
    model = {"transformer": transformer, "cnn": cnn, "vit": vit}.get(draw.family, recurrent)(draw)
    model |= {
        "type": draw.family,
        "dropout": draw.cycle("dropout", [0.0, 0.1, 0.3, 0.5]),
        "vocab_size": draw.choice([2, 7, 83]),
        "compile_model": compiled and draw.cycle("compile_model", [True] + [False] * 7),
    }
    training = {
        "mixed_precision": draw.cycle("mixed_precision", precisions),
        "gradient_checkpointing": draw.cycle("gradient_checkpointing", [True, False, False, False]),
        "optimizer": draw.cycle("optimizer", OPTIMIZERS),
        "weight_decay": draw.choice([0.0, 0.1]),
        "max_grad_norm": draw.choice([None, 0.1, 1.0]),
    }
    config = Config.from_dict({"seed": draw.randrange(2**40), "device": "cpu", "model": model, "training": training})
    rows = draw.choice([1, 2, 3, 4])
    if not isinstance(config.model, ImageModelConfig):
        padded = draw.cycle("padded", [True, False])
        return config, {"rows": rows, "length": draw.choice([1, 2, 5, 11]), "padded": padded}
    smallest = config.model.smallest_size
    size = [side if draw.family == "vit" else side + draw.randint(0, 7) for side in smallest]
    return config, {"rows": max(rows, 2), "size": size}  # batch norm needs two values per channel


def batch_of(config: Config, sizes: Mapping[str, Any], step: int = 0) -> Batch:
    """Returns the batch of a step: images, or tokens, padded on the left if `sizes["padded"]`."""
    key = config.seed + 1 + step
    if "size" in sizes:
        shape = (sizes["rows"], *sizes["size"], config.model.image_channels)  # type: ignore[attr-defined]
        labels = rng.uniform(rng.key(key, "labels"), (sizes["rows"],)) * config.model.vocab_size
        return {"inputs": rng.normal(rng.key(key, "images"), shape), "labels": labels.astype(np.int32)}
    batch = random_batch(config.with_overrides(f"seed={key}"), sizes["rows"], sizes["length"])
    if sizes["padded"]:
        rows, length = batch["inputs"].shape
        real = 1 + (rng.uniform(rng.key(key, "real"), (rows, 1)) * length).astype(np.int32)  # 1 to length
        mask = np.arange(length) >= length - real
        batch["labels"] = np.where(mask, batch["labels"], -100).astype(np.int32)
        batch["attention_mask"] = mask.astype(np.int32)
    return batch


# ---- checks -------------------------------------------------------------------------------------------------


class CheckFailed(AssertionError):
    """A check of a case failed; the message has the verdict and the configuration."""


def check_case(
    config: Config, sizes: Mapping[str, Any], folder: Path, resumed_from: str | None = None, convert: bool = True
) -> float:
    """Compares the backends on a configuration, converts its weights, and resumes a run.

    Args:
        config: The configuration.
        sizes: The sizes of its batches.
        folder: An empty folder.
        resumed_from: Backend of the first two steps of a run that all engines resume; None for no run.
        convert: Whether to convert the weights.

    Returns:
        The largest ratio of an error to the noise.

    Raises:
        CheckFailed: A check failed.
    """
    model, training = config.model.model_dump(), config.training.model_dump(exclude_defaults=True)
    label = "\n" + json.dumps({"seed": config.seed, "model": model, "training": training, "batch": sizes})

    def require(condition: object, problem: str) -> None:
        if not condition:
            raise CheckFailed(problem + label)

    engines = build(config)
    report = compare_engines(engines, batch_of(config, sizes), step=3)
    require(report.passed, report.verdict())
    require(not unequal(engines.mlx.weights(), engines.torch.weights()), "the engines' weights differ afterwards")
    gradients = {row.path for row in report.sections[-2].rows if row.kind == "gradient"}
    expected = {path for path in engines.torch.weights() if not path.rpartition(".")[2].startswith("running_")}
    require(gradients == expected, "not every parameter has a gradient")
    if convert and (problem := conversion_problem(engines, folder)):
        require(False, problem)
    if resumed_from is None:
        return worst_ratio(report)
    first = engines.torch if resumed_from == "torch" else engines.mlx
    for step in range(2):
        result = first.read(first.train_step(batch_of(config, sizes, step), step, LEARNING_RATE))
        if not result.finite and config.training.mixed_precision == "fp16":
            return worst_ratio(report)  # gradients above 65504, which the comparison has judged, cannot be resumed
        require(result.finite, f"step {step} is not finite")
    saved = checkpoint.load(checkpoint.save(folder / "run", config, 2, first.weights(), first.optimizer_state(), {}))
    weights, state = dict(saved.weights), dict(saved.optimizer)
    for engine in engines:
        engine.set_weights(weights)
        engine.set_optimizer_state(state)
    for engine in engines[:2]:
        require(not unequal(engine.weights(), weights), f"{engine.backend} has other weights than the checkpoint")
        require(not unequal(engine.optimizer_state(), state), f"{engine.backend} has another state")
    resumed = compare_engines(engines, batch_of(config, sizes, 2), step=2)
    require(resumed.passed, "resumed: " + resumed.verdict())
    return max(worst_ratio(report), worst_ratio(resumed))


def worst_ratio(report: Report) -> float:
    return report.worst[1].ratio if report.worst else 0.0


def conversion_problem(engines: Engines, folder: Path) -> str:
    """Converts weights to MLX's form and back: the bits are the same, and the MLX form equals the MLX model.

    Returns:
        The difference, or an empty string.
    """
    config = engines.torch.config
    weights = engines.torch.weights()
    source = checkpoint.save(folder / "start", config, 0, weights, engines.torch.optimizer_state(), {})
    mlx_form, back = folder / "mlx.safetensors", folder / "back.safetensors"
    settings = str(source / "config.yaml")
    convert_model(source / "model.safetensors", mlx_form, "mlx", None, settings, False)
    convert_model(mlx_form, back, "canonical", None, settings, False)
    loaded = {path: np.array(array) for path, array in mx.load(str(mlx_form)).items()}
    parameters = {path: np.array(array) for path, array in tree_flatten(engines.mlx.model.parameters())}
    if len(loaded) != len(weights) or unequal(loaded, {path: parameters[path] for path in loaded}):
        return "the MLX form is not the MLX model"
    returned = weight_files.read(back)
    return "the conversion changed the weights" if unequal(dict(returned), weights) else ""


def resumed(index: int) -> str | None:
    """Returns the backend whose run the case resumes, if any."""
    return None if index % 3 else ("torch", "mlx")[index % 2]


# ---- instruction sets ---------------------------------------------------------------------------------------


@contextmanager
def reordered_products() -> Iterator[None]:
    """Changes the order of the sums in MLX's linear layers while the context is open, as another processor does.

    The inner axis is permuted, and its second half is summed before the first.
    """
    from icenet.nn import linear as module
    from icenet.nn import recurrent

    original = module.linear

    def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None, *_: object) -> mx.array:
        size = x.shape[-1]
        order = mx.array(rng.permutation(rng.key(0, "order", size), size))
        first, second = order[: size // 2], order[size // 2 :]
        y = original(x[..., second], weight[:, second], bias)
        return y + original(x[..., first], weight[:, first]) if size > 1 else y

    module.linear = recurrent.linear = linear
    try:
        yield
    finally:
        module.linear = recurrent.linear = original


def environments() -> list[dict[str, str]]:
    """Returns environment variables that restrict the instructions of PyTorch and of its BLAS on this processor.

    ORDER=permuted is read by this program: MLX with `reordered_products`.
    """
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    torch_sets, mkl_sets = ["default", "avx2"], ["SSE4_2", "AVX", "AVX2"]
    if "avx512f" in flags:
        torch_sets.append("avx512")
        mkl_sets.append("AVX512")
    found = [
        {"ATEN_CPU_CAPABILITY": torch, "MKL_ENABLE_INSTRUCTIONS": mkl, "OMP_NUM_THREADS": threads}
        for torch, mkl, threads in itertools.product(torch_sets, mkl_sets, ("1", "2"))
    ]
    for torch in torch_sets:
        common = {"ATEN_CPU_CAPABILITY": torch, "OMP_NUM_THREADS": "1"}
        found += [{**common, "MKL_CBWR": mode} for mode in ("COMPATIBLE", "AVX2")]
        found += [{**common, "ICENET_BLAS": "none"}, {**common, "ORDER": "permuted"}]
    return found


def sweep(seed: int, first: int, count: int, order: str) -> Iterator[dict[str, Any]]:
    """Checks cases; yields for each its index, ratio, seconds, and its problem, if any."""
    with reordered_products() if order else nullcontext():
        for index in range(first, first + count):
            began, problem, ratio = time.process_time(), "", 0.0
            with tempfile.TemporaryDirectory() as folder:
                try:
                    ratio = check_case(*case(seed, index), Path(folder), resumed(index), convert=False)
                except CheckFailed as error:
                    problem = str(error)
            yield {"index": index, "ratio": ratio, "seconds": time.process_time() - began, "problem": problem}


def run_environments(seed: int, count: int, jobs: int) -> int:
    """Divides the cases among the environments, a process each; prints a table. Returns the number of alarms."""
    chosen = environments()
    edges = [count * number // len(chosen) for number in range(len(chosen) + 1)]

    def run(variables: dict[str, str], first: int, end: int) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, __file__, "--seed", str(seed), "--only", f"{first}:{end}"]
        given = {**os.environ, "MKL_NUM_THREADS": variables["OMP_NUM_THREADS"], **variables}
        return subprocess.run(arguments, env=given, stdout=subprocess.PIPE, text=True, check=False)

    alarms, checked, worst, seconds = 0, 0, 0.0, 0.0
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(run, chosen, edges, edges[1:])
        for variables, expected, result in zip(chosen, map(int.__sub__, edges[1:], edges), results, strict=True):
            lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
            found = [line for line in lines if line["problem"]]
            ratio = max((line["ratio"] for line in lines), default=0.0)
            name = " ".join(f"{key}={value}" for key, value in variables.items())
            print(f"{len(lines):5} cases, {len(found)} alarms, largest ratio {ratio:.2f}: {name}", flush=True)
            for line in found:
                print(f"  --seed {seed} --only {line['index']}: {line['problem']}", flush=True)
            if len(lines) < expected:
                print(f"  the process ended early with code {result.returncode}", flush=True)
                alarms += 1
            alarms, checked, worst = alarms + len(found), checked + len(lines), max(worst, ratio)
            seconds += sum(line["seconds"] for line in lines)
    print(f"{checked} cases in {len(chosen)} environments, {alarms} false alarms, largest ratio {worst:.2f}")
    print(f"{seconds:.0f} seconds of CPU time")
    return alarms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="the cases depend on it (default: 1)")
    parser.add_argument("--count", type=int, default=200, help="number of cases (default: 200)")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes at a time (default: 1)")
    parser.add_argument("--only", metavar="FIRST:END", help="check these cases in this process and its environment")
    parser.add_argument("--faults", type=int, metavar="N", help="plant each fault in N cases instead")
    given = parser.parse_args()
    if given.faults:
        import planted

        return planted.main(given.seed, given.faults)
    if given.only is None:
        return int(run_environments(given.seed, given.count, given.jobs) > 0)
    first, _, end = given.only.partition(":")
    count = int(end) - int(first) if end else 1
    problems = 0
    for line in sweep(given.seed, int(first), count, os.environ.get("ORDER", "")):
        print(json.dumps(line), flush=True)
        problems += bool(line["problem"])
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
