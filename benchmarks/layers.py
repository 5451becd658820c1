"""What shoal's own operators take beside torch's, layer by layer: milliseconds on one thread, and rounding.

The layers are those of ResNet-18 for 32 × 32 pictures and of networks alike, channels_last, 32 pictures: 3 × 3 convolutions by
Winograd's filtering (output, gradient of the input, gradient of the weight), and BatchNorm with shortcut and ReLU (both ways).
Both sides run in turn in one process; processor time of the thread, the shortest of each round, the median of the rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.common import Group, Result  # noqa: E402

LAYERS = ((16, 32), (32, 32), (64, 32), (128, 16), (256, 8), (512, 4), (64, 56), (256, 14), (512, 7))
"""(channels in and out, rows and columns)."""
IMAGES = 32
TORCH, SHOAL = "torch", "shoal"
Work = Callable[[], Any]
Pass = tuple[str, Work, Work, Work]


def convolution(channels: int, size: int) -> list[Pass]:
    """(name, torch's, shoal's, the same in float64) of the three passes of a convolution."""
    import torch

    from shoal.kernels.winograd import conv3x3

    last = torch.channels_last
    torch.manual_seed(0)
    x = torch.randn(IMAGES, channels, size, size).relu().contiguous(memory_format=last)
    weight = torch.randn(channels, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
    upstream = torch.randn_like(x)

    def passes(operator: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[Work]:
        given = [t.to(dtype).contiguous(memory_format=last) for t in (x, weight)]
        slope = upstream.to(dtype)

        def forward() -> torch.Tensor:
            return operator(*given)

        def gradient(of: int) -> Work:
            own = [t.detach().requires_grad_(k == of) for k, t in enumerate(given)]
            output = operator(*own)
            return lambda: torch.autograd.grad(output, own[of], slope, retain_graph=True)[0]

        return [forward, gradient(0), gradient(1)]

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, weight, padding=1)

    names = ("output", "gradient of input", "gradient of weight")
    ways = passes(plain, torch.float32), passes(conv3x3, torch.float32), passes(plain, torch.float64)
    return [(name, *works) for name, *works in zip(names, *ways, strict=True)]  # type: ignore[misc]


def norm(channels: int, size: int) -> list[Pass]:
    """The same of BatchNorm, shortcut and ReLU, forward and backward together."""
    import torch
    from torch.nn import functional

    from shoal.kernels.batchnorm import batch_norm, fits

    torch.manual_seed(0)
    tensors = [torch.randn(IMAGES, channels, size, size).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    scale = torch.rand(channels), torch.randn(channels)

    def work(ours: bool, dtype: torch.dtype) -> Work:
        x, more, slope = (t.to(dtype) for t in tensors)
        given = [x.requires_grad_(), *(s.to(dtype).requires_grad_() for s in scale), more.requires_grad_()]

        def both() -> torch.Tensor:
            if ours and fits(x):
                y = batch_norm(*given[:3], (None, None), 0.0, 1e-5, more, True)
            else:
                y = functional.relu(functional.batch_norm(x, None, None, *given[1:3], True) + more)
            return torch.autograd.grad(y, given, slope)[0]

        return both

    return [("BatchNorm, shortcut, ReLU", work(False, torch.float32), work(True, torch.float32), work(False, torch.float64))]


def shortest_ms(works: Sequence[Work], times: int) -> list[float]:
    """The shortest processor time of each, run in turn."""
    best = [float("inf")] * len(works)
    for _ in range(times):
        for k, work in enumerate(works):
            start = time.thread_time()
            work()
            best[k] = min(best[k], (time.thread_time() - start) * 1e3)
    return best


def error(found: Any, truth: Any) -> float:
    """The largest difference by the largest value."""
    return float((found.double() - truth).abs().max() / truth.abs().max())


def measure(channels: int, size: int, repeats: int, times: int) -> dict[str, dict[str, Result]]:
    """By pass, what both sides took, one number a round, and their rounding in the details."""
    found = {}
    for name, theirs, ours, exact in [*convolution(channels, size), *norm(channels, size)]:
        truth = exact()
        rounding = {side: error(work(), truth) for side, work in ((TORCH, theirs), (SHOAL, ours))}
        rounds = [shortest_ms((theirs, ours), times) for _ in range(repeats)]
        found[name] = {
            side: Result(side, [values[k] for values in rounds], [{"error": rounding[side]}])
            for k, side in enumerate((TORCH, SHOAL))
        }
    print(f"{layer_name(channels, size)}: done", file=sys.stderr, flush=True)
    return found


def layer_name(channels: int, size: int) -> str:
    return f"{channels} channels, {size} × {size}"


def table_of(layer: str, found: Mapping[str, Mapping[str, Result]]) -> Any:
    """One row a pass."""
    from rich.table import Table

    table = Table(title=layer, title_justify="left")
    table.add_column("pass")
    for heading in ("torch ms", "shoal ms", "× torch", "error of torch", "of shoal"):
        table.add_column(heading, justify="right")
    for name, sides in found.items():
        torch_ms, shoal_ms = (sides[side].median or 0.0 for side in (TORCH, SHOAL))
        errors = [f"{sides[side].details[0]['error']:.1e}" for side in (TORCH, SHOAL)]
        table.add_row(name, f"{torch_ms:.2f}", f"{shoal_ms:.2f}", f"{torch_ms / shoal_ms:.2f}", *errors)
    return table


def draw(path: Path, caption: str, found: Mapping[str, Mapping[str, Mapping[str, Result]]]) -> None:
    """How many times as fast each pass of each layer is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axis = pyplot.subplots(figsize=(10, 4.4))
    passes = list(next(iter(found.values())))
    for k, name in enumerate(passes):
        ratios = [(sides[name][TORCH].median or 0.0) / (sides[name][SHOAL].median or 1.0) for sides in found.values()]
        axis.bar([place + 0.2 * (k - 1.5) for place in range(len(found))], ratios, 0.2, label=name)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(found)), [layer.replace(" channels, ", "\n") for layer in found])
    axis.set_ylabel("torch's time / shoal's, one thread")
    axis.legend(fontsize=8)
    drawing.text(0.01, 0.01, caption, fontsize=6)
    drawing.tight_layout(rect=(0, 0.04, 1, 1))
    drawing.savefig(path, dpi=130)
    pyplot.close(drawing)


def main() -> int:
    options = common.arguments(__doc__.splitlines()[0] if __doc__ else "").parse_args()
    machine = common.hardware()
    import torch

    torch.set_num_threads(1)
    layers = LAYERS[3:5] if options.quick else LAYERS
    repeats, times = (1, 3) if options.quick else (options.repeats, 10)
    found = {layer_name(*layer): measure(*layer, repeats, times) for layer in layers}
    groups = [
        Group(title=f"{layer}: {name}", results=sides, references=[TORCH], less_is_better=True)
        for layer, passes in found.items() for name, sides in passes.items()
    ]  # fmt: skip
    tables = [table_of(layer, passes) for layer, passes in found.items()]
    name = "layers_quick" if options.quick else "layers"

    def picture(path: Path, caption: str) -> None:
        draw(path, caption, found)

    whole = common.report(name, groups, "ms", vars(options), machine, (), tables, picture)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
