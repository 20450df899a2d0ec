"""Sparse matmuls of Fixed Parameter Expansion, on GPUs and CPUs.

Symbols follow the GEMM convention: ``M`` rows of activations, ``K`` input features, ``N`` output
features of the **parent** layer, ``alpha`` children for each parent neuron.

The operations and what they compute:

    split_matmul(x[M,K], w[N,K], labels, alpha)    y[m,a,n] = sum_k x[m,k] * w[n,k] * (labels[n,k] == a)
    merge_matmul(z[M,alpha,K], w[N,K], labels)     y[m,n] = sum_k z[m,labels[n,k],k] * w[n,k]
    partition_grad(dy[M,alpha,N], x[M,K], labels)  dw[n,k] = sum_m dy[m,labels[n,k],n] * x[m,k]
    masked_matmul(x[M,K], values, kept)            y = x @ W.T for any mask; values[nnz], a bit a position
    unpack_values(values[nnz], kept)               w[N,K], zero where no entry exists
    pack_values(w[N,K], kept)                      values[nnz], the gradient of unpack_values
    block_matmul(x[M,K], values, layout)           y = x @ W.T for a block-masked W[N,K]
    block_matmul_t(dy[M,N], values, layout)        dx = dy @ W
    block_grad(dy[M,N], x[M,K], layout)            dW = dy.T @ x on the kept blocks only
    expanded_mlp(x, w1, labels1, w2)               split, activation and the next layer in one launch
    semi_structured_matmul(x, values, layout)      y[m,c] = x[m] @ W[c].T for a 2:4 W[children,N,K]
    semi_structured_matmul_t(dy, values, layout)   dx[m] = sum_c dy[m,c] @ W[c]
    semi_structured_grad(dy, x, layout)            dW[c] = dy[:,c].T @ x at the stored places only

Each family is closed under differentiation: the backward pass of an operation is made of the others.
Every operation has an eager twin in plain PyTorch, ``<op>_eager``, with the same operands and no ``kept`` or
``backend``. Only ``masked_matmul`` has none, because it is a split into one child on kept values. The twin is right in
any floating dtype. It is the definition that tests and benchmarks compare with.

Names in the device code follow one grammar: ``x_ptr`` is a tensor's pointer and ``stride_xm`` its stride along M;
``pid_n`` is a program's coordinate; ``offs_k`` are offsets inside a dimension and ``mask_k`` their bounds; ``BLOCK_N``
is a tile's size and ``acc`` an accumulator. Shape names come before meta-parameters; launches pass keywords after the
pointers; a tile load carries its shape as a comment.
"""

if __name__ == "kernels":
    # In the root of a checkout, `import kernels` finds this folder before Hugging Face's package of that name. If
    # theirs is installed, it is imported instead; otherwise this is an empty namespace.
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    _root = Path(__path__[0]).resolve().parent
    _theirs = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry).resolve() != _root])
    del __file__, __path__[:]
    if _theirs is not None and _theirs.loader is not None and _theirs.origin is not None:
        sys.modules[__name__] = importlib.util.module_from_spec(_theirs)
        _theirs.loader.exec_module(sys.modules[__name__])
else:
    from . import flops
    from .bitmap import Bitmap, SeededHoles, pack_values, pack_values_eager, unpack_values, unpack_values_eager
    from .block import (
        BlockLayout,
        block_grad,
        block_grad_eager,
        block_matmul,
        block_matmul_eager,
        block_matmul_t,
        block_matmul_t_eager,
    )
    from .dispatch import UnsupportedError
    from .mlp import expanded_mlp, expanded_mlp_eager
    from .partition import (
        HOLE,
        PackedLabels,
        SeededLabels,
        masked_matmul,
        merge_matmul,
        merge_matmul_eager,
        partition_grad,
        partition_grad_eager,
        split_matmul,
        split_matmul_eager,
    )
    from .semi_structured import (
        SemiStructuredLayout,
        semi_structured_compress,
        semi_structured_compress_eager,
        semi_structured_grad,
        semi_structured_grad_eager,
        semi_structured_matmul,
        semi_structured_matmul_eager,
        semi_structured_matmul_t,
        semi_structured_matmul_t_eager,
    )

    flops.register()

    __all__ = [
        "HOLE",
        "Bitmap",
        "BlockLayout",
        "PackedLabels",
        "SeededHoles",
        "SeededLabels",
        "SemiStructuredLayout",
        "UnsupportedError",
        "block_grad",
        "block_grad_eager",
        "block_matmul",
        "block_matmul_eager",
        "block_matmul_t",
        "block_matmul_t_eager",
        "expanded_mlp",
        "expanded_mlp_eager",
        "masked_matmul",
        "merge_matmul",
        "merge_matmul_eager",
        "pack_values",
        "pack_values_eager",
        "partition_grad",
        "partition_grad_eager",
        "semi_structured_compress",
        "semi_structured_compress_eager",
        "semi_structured_grad",
        "semi_structured_grad_eager",
        "semi_structured_matmul",
        "semi_structured_matmul_eager",
        "semi_structured_matmul_t",
        "semi_structured_matmul_t_eager",
        "split_matmul",
        "split_matmul_eager",
        "unpack_values",
        "unpack_values_eager",
    ]
