"""Serves one request at a time with low latency: an expanded MLP is compiled, and on a GPU captured as a CUDA graph.

    python examples/serve.py --hidden 14336 --inputs 4096

Two others are timed beside it: the dense MLP that it came from, which has as many non-zero weights, and the wide dense
one, which computes the same. A CUDA graph wants its input at a fixed place in memory, so each request is copied there.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fpe


def served(model: nn.Module, x: Tensor, quick: bool) -> Callable[[Tensor], Tensor]:
    """A function of a request that runs the compiled model; on a GPU, by replaying a captured CUDA graph."""
    model.requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if quick else "inductor")
    place = x.clone()
    with torch.inference_mode():
        for _ in range(3):  # compiles the model, and does all that is done once before the capture
            result = compiled(place)
    if not x.is_cuda:
        return torch.inference_mode()(compiled)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        result = compiled(place)

    def replay(request: Tensor) -> Tensor:
        place.copy_(request)
        graph.replay()
        return result.clone()

    return replay


def microseconds(run: Callable[[Tensor], Tensor], x: Tensor, requests: int) -> float:
    """Median time of a request, in microseconds."""
    times = []
    for _ in range(requests):
        begin = time.perf_counter()
        run(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times)


def main() -> None:
    """Prints a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--alpha", type=int, default=2, help="children of a neuron")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="small sizes, and a compiler that generates no code")
    options = parser.parse_args()
    inputs, hidden = (64, 128) if options.quick else (options.inputs, options.hidden)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, inputs)).to(device, dtype).eval()
    wide = fpe.expand(dense, options.alpha, resparsify="partition", generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, inputs, device=device, dtype=dtype)
    models = {"dense": dense, "expanded": wide, "wide dense": fpe.to_dense(wide)}
    runs = {name: served(model, x, options.quick) for name, model in models.items()}
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(runs["expanded"](x), runs["wide dense"](x), rtol=tolerance, atol=tolerance)
    print(f"batch 1, {inputs} -> {hidden} -> {inputs}, {dtype} on {device}")
    for name, run in runs.items():
        spent = microseconds(run, x, 20 if options.quick else options.requests)
        print(f"{name:10} {fpe.nonzeros(models[name]):12} weights {spent:10.1f} us a request")


if __name__ == "__main__":
    main()
