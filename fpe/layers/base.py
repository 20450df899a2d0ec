"""What the layers have in common: sizes, the wide view, a mask that may move, and a checked state dict."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrize import is_parametrized

from fpe.kernels.checks import check_tensor

from .dense_form import dense_weight, forget
from .placement import exports_to_onnx, of_constant_size, of_the_batch, on, overwrite, tensors_of, whole
from .state import Header, checksum, decode, encode, layer_entries

Topology = Any  # what a kind's constructor takes: a Partition, a mask
Self = TypeVar("Self", bound="ExpandedLinear")
Held = TypeVar("Held")


class ExpandedLinear(nn.Module):
    """What the FPE layers have in common: sizes, the wide view, and a checked state dict.

    A layer has one trained weight, ``edge_weight``, and a topology: which edges its entries are. The topology is not a
    buffer. It follows the weight from device to device, is never on ``"meta"`` (a layer that is built there knows its
    edges), and is the layer's extra state in a state dict (:mod:`fpe.layers.state`).

    Attributes:
        in_features: Width of the input.
        out_features: Width of the output.
        backend: Which implementation runs, as the layer's operation takes it: ``"auto"``, ``"triton"``, ``"cpu"``,
            ``"eager"``, and for some layers others.
        edge_weight: The weights of the edges, in the layer's own form.
        bias: ``[out_features]``, or ``None``.
        fingerprint: A hash of the topology, eight numbers from 0 to 255, in a buffer that is not saved.
            ``DistributedDataParallel`` copies it from the first process, and the first forward after that raises if
            the processes' topologies differ. After buffers of models with different masks were averaged, the first
            forward in eval mode raises.
        keeps_dense: Whether a CPU keeps the dense weight between calls, see :mod:`.dense_form`.
        share: Computes this process's part of a layer that several processes share (:mod:`fpe.parallel`); otherwise
            ``None``.
        made_of: Names of the weight and of a tensor that is replaced whenever the topology changes.
    """

    KIND: ClassVar[int]
    """The layer's place in :data:`fpe.layers.KINDS`."""
    STORED: ClassVar[tuple[str, ...]]
    """The attributes that hold the topology: tensors or named tuples of them."""
    keeps_dense: bool = True
    share: "Callable[[Any, Tensor], Tensor] | None" = None
    made_of: ClassVar[tuple[str, ...]] = ("edge_weight", "_index")
    edge_weight: nn.Parameter
    bias: nn.Parameter | None
    fingerprint: Tensor

    def __init__(self, in_features: int, out_features: int, backend: str) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.backend = backend
        self._stamped: int | None = None  # version of the fingerprint that is known to be right; None: never ask
        self._asked = False
        self._topology_device = torch.device("cpu")

    def _build(self, shape: tuple[int, ...], bias: bool, topology: Topology, **factory: Any) -> None:
        """Makes the parameters and takes the topology; the last thing that a constructor does."""
        self.edge_weight = nn.Parameter(torch.empty(shape, **factory))
        self.bias = nn.Parameter(torch.empty(self.out_features, **factory)) if bias else None
        self.register_buffer("fingerprint", torch.empty(8, device=self.edge_weight.device), persistent=False)
        self._set_topology(topology)
        self.reset_parameters()

    # How edges lie, and how they may move (:class:`fpe.Rewiring`)

    @property
    def planes(self) -> tuple[int, int]:
        """Planes of children along the outputs and along the inputs."""
        return 1, 1

    @property
    def unit(self) -> tuple[int, int]:
        """``(bn, bk)`` of the edges that move together: a single edge unless a layer says otherwise."""
        return 1, 1

    @property
    def exchanges(self) -> bool:
        """Whether edges may only exchange owners inside a group of four inputs, as 2:4 demands."""
        return False

    def may_hold(self) -> Tensor | None:
        """Which entries of :meth:`wide_weight` an edge may move to; ``None`` if the structure forbids none."""
        return None

    # The function

    def forward(self, x: Tensor) -> Tensor:
        """Computes ``x @ weight.T + bias`` from the edges.

        Args:
            x: ``[..., in_features]``, of the weight's dtype and on its device.

        Returns:
            ``[..., out_features]``.

        Raises:
            ValueError: ``x`` is not a tensor of that width, or the requested backend cannot run.
            TypeError: ``x`` has another dtype than the weight.
            RuntimeError: The topology differs from another replica's (``fingerprint``), or the model is being exported
                to ONNX.
        """
        stamped, compiling = self._stamped, torch.compiler.is_compiling()
        if (
            stamped is not None and not compiling and self._buffers["fingerprint"]._version != stamped  # type: ignore[union-attr]
        ):
            self._check_replica()
        if self.share is not None:
            return self.share(self, x)
        dense = None if compiling else dense_weight(self, x)
        if dense is not None:
            return linear(x, dense, self.bias)
        if not isinstance(x, Tensor) or x.shape[-1:] != (self.in_features,):
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{type(self).__name__}: the input must have shape [..., {self.in_features}], got {got}")
        if compiling and exports_to_onnx():
            raise RuntimeError(f"{type(self).__name__}: ONNX has no such operation; export fpe.to_dense(model)")
        return self._multiply(x)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module; refuses a parameter named ``weight``, as tools like ``torchao.quantize_`` set it."""
        if name == "weight":
            self._refuse_weight()
        super().register_parameter(name, param)

    def _multiply(self, x: Tensor) -> Tensor:
        """The layer's own operation, for an input of the right width."""
        raise NotImplementedError

    def beats_wide(self, x: Tensor) -> bool:
        """Whether the layer's operation was measured to be faster than its dense weight, for such an input on a CPU."""
        return False

    def masked_copy(self) -> Tensor | None:
        """:meth:`wide_weight`, made in the quickest way on a CPU; ``None`` if the layer's operation is quicker."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """:meth:`wide_weight`, for code that reads the ``weight`` of an ``nn.Linear``.

        It is computed at each access, so writing to it changes nothing: train ``edge_weight``, and write with
        :meth:`set_wide_weight`.
        """
        return self.wide_weight()

    @weight.setter
    def weight(self, value: object) -> None:
        self._refuse_weight()

    def _refuse_weight(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: weight is made of edge_weight and cannot be replaced; to quantize, take "
            "fpe.to_dense(model), or write with set_wide_weight"
        )

    def wide_weight(self) -> Tensor:
        """The weight of the equivalent dense layer, ``[out_features, in_features]``, differentiable."""
        raise NotImplementedError

    def kept(self) -> Tensor:
        """Which entries of :meth:`wide_weight` exist, bool ``[out_features, in_features]``."""
        raise NotImplementedError

    def set_wide_weight(self, weight: Tensor) -> None:
        """Takes the weights of the kept edges from a dense weight ``[out_features, in_features]``.

        Raises:
            TypeError: ``weight`` is not a tensor.
            ValueError: It has another shape.
        """
        raise NotImplementedError

    def _check_weight(self, method: str, weight: object, shape: tuple[int, int]) -> None:
        """Raises unless a weight that a method is given has a shape."""
        check_tensor(f"{type(self).__name__}.{method}", "weight", weight, shape, any_dtype=True)

    @property
    def nonzeros(self) -> int:
        """Number of weights that the layer keeps."""
        return int(self.kept().sum())

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` that computes the same function at the wide size."""
        weight = self.wide_weight()
        dense = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        dense.weight.copy_(weight)
        dense.weight.requires_grad_(any(p.requires_grad for n, p in self.named_parameters() if n != "bias"))
        if self.bias is not None:
            dense.bias.copy_(whole(self.bias))
            dense.bias.requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)

    def reset_parameters(self, fan_in: int | None = None) -> None:
        """Draws weights and bias uniformly, as an ``nn.Linear`` does; entries that are no edges are zero.

        Args:
            fan_in: Inputs of that ``nn.Linear``. Default: those of the parent, or of the wide layer if there is no
                parent.
        """
        fan_in = self._fan_in() if fan_in is None else fan_in
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
        self.clear_removed()

    def _fan_in(self) -> int:
        return self.in_features

    # The weights of the edges: a parameter, a shard of one, or what a parametrization computes

    @torch.no_grad()
    def clear_removed(self) -> None:
        """Sets the stored values of removed edges to zero."""
        removed = self._removed()
        if removed is not None and not self.edge_weight.is_meta:
            self.set_edge_weight(whole(self.edge_weight).masked_fill(removed, 0))

    @torch.no_grad()
    def set_edge_weight(self, value: Tensor) -> None:
        """Takes a value of the shape of ``edge_weight``, in which entries that are no edges are zero already."""
        if is_parametrized(self, "edge_weight"):
            self.edge_weight = value  # type: ignore[assignment] # through the parametrization's right_inverse
        else:
            overwrite(self.edge_weight, value)

    def _removed(self) -> Tensor | None:
        """Returns which entries of ``edge_weight`` are not edges, or ``None`` if all are."""
        raise NotImplementedError

    def _entries(self, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """Returns a layer's entries of a state dict in the present form, by their own names."""
        return layer_entries(state, prefix)

    def rewire(self, kept: Tensor, *followers: Tensor) -> None:
        """Takes another mask with as many edges, as :class:`fpe.Rewiring` makes it; in place.

        Edges that stay keep their weight. New edges begin at zero.

        Args:
            kept: The new :meth:`kept`, bool ``[out_features, in_features]``.
            followers: Tensors of the weight parameter's shape that belong to it entry by entry, as an optimizer's
                moments; edges keep their entries, new ones begin at zero there too.

        Raises:
            ValueError: The mask is one that the layer cannot have.
        """
        raise NotImplementedError

    # The topology

    def _header(self) -> Header:
        return Header(self.KIND, self.in_features, self.out_features)

    def _set_topology(self, topology: Topology) -> None:
        """Takes the edges; a subclass stores them in its own form and calls :meth:`_topology_is`."""
        raise NotImplementedError

    @classmethod
    def _parse(cls, header: Header, words: Tensor) -> Topology:
        """The topology that an extra state describes.

        Raises:
            ValueError: It describes none.
        """
        raise NotImplementedError

    @classmethod
    def _of(cls: type[Self], header: Header, topology: Any, bias: bool, **factory: Any) -> Self:
        """Returns a layer with a topology and newly drawn weights."""
        raise NotImplementedError

    def _topology_is(self, words: Tensor) -> None:
        """Remembers the topology as the state dict has it, and marks the layer with its fingerprint."""
        self._encoded = encode(self._header(), words)
        self._follow_weight()

    def _follow_weight(self) -> None:
        weight = self.edge_weight
        if weight.is_meta:
            self._hold()
            return
        self._topology_device = weight.device
        for name in self.STORED:
            setattr(self, name, of_constant_size(on(getattr(self, name), weight.device)))
        self._hold()
        with torch.no_grad():
            self.fingerprint.copy_(self._own_fingerprint())
        self._stamped = None if self.fingerprint.is_inference() else self.fingerprint._version
        self._asked = False

    def settle(self) -> None:
        """Follows the weight after tensors on ``"meta"`` were replaced one by one, as transformers loads models."""
        if self.fingerprint.is_meta and not self.edge_weight.is_meta:
            self.fingerprint = torch.empty(8, device=self.edge_weight.device)
        self._follow_weight()

    def _hold(self) -> None:
        held = [t for name in self.STORED for t in tensors_of(getattr(self, name)).values()]
        # With labels of a seed, the tensor that goes to the state dict is the only one that holds the topology.
        self._topology_tensors, self._index = tuple(held), held[0] if held else self._encoded

    def _own_fingerprint(self) -> Tensor:
        """Returns numbers 0 .. 255, exact in every float type: averaging a model with itself keeps them."""
        return checksum(self._encoded).view(1).view(torch.uint8).float()

    def topology_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that hold the topology; they are replaced whenever it changes or moves."""
        return self._topology_tensors

    def _beside(self, weight: Tensor, held: Held) -> Held:
        """A stored form of the topology on the device of a weight."""
        if weight.device == self._topology_device:
            return held
        if type(weight) is nn.Parameter and not torch.compiler.is_compiling():
            self._follow_weight()  # FSDP2 moves parameters by itself
        return on(held, weight.device)

    def _check_replica(self) -> None:
        """Raises where another topology's fingerprint has been written here.

        It is asked at the first forward after a write, and in eval mode after every write.
        """
        mark = self.fingerprint
        if mark.is_meta or type(mark) is not Tensor:
            return
        if torch._C._functorch.is_batchedtensor(mark):
            mark = of_the_batch(mark)
        elif self.training and self._asked:  # DistributedDataParallel writes in every step; an answer waits for the GPU
            return
        else:
            self._stamped, self._asked = mark._version, True
        if bool((mark.cpu() - self._own_fingerprint()).abs().max() > 0.5):
            raise RuntimeError(
                f"{type(self).__name__}: the buffers of a layer with other edges were written into this one: by "
                "DistributedDataParallel, where processes expanded with different seeds, by an average over models "
                "whose masks differ, or by vmap over such models. Give every process or model the same generator, or "
                "load one state into all"
            )

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        forget(self)
        super()._apply(fn, recurse)
        self._follow_weight()
        return self

    # The state dict: ``edge_weight``, ``bias`` and the extra state, all tensors, so that safetensors takes it too

    def get_extra_state(self) -> Tensor:
        """What the layer is and where its edges are: int64, a copy, so that writing to it changes nothing."""
        return self._encoded.clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the topology of another layer of the same kind, sizes and number of stored weights.

        Raises:
            ValueError: ``state`` is not such a topology, or is damaged.
        """
        self._set_topology(self._topology_of(state, "_extra_state"))

    def _topology_of(self, state: object, name: str) -> Topology:
        header, words = decode(state, name)
        if header != self._header():
            raise ValueError(
                f"state dict: '{name}' should be of {self._header().told()}, got {header.told()}; where the state is "
                "right, build the model from it with fpe.restore"
            )
        try:
            topology = self._parse(header, words)
        except ValueError as error:
            raise ValueError(f"state dict: '{name}' is damaged: {error}") from error
        self._fit(topology, name)
        return topology

    def _fit(self, topology: Topology, name: str) -> None:
        """Raises if the layer has no room for a topology."""

    def check_state(self, state: Mapping[str, Any], prefix: str = "") -> None:
        """Raises unless the entries under ``prefix`` can be loaded. Entries may be missing.

        Raises:
            ValueError: An entry has another shape, or the topology is damaged or does not fit. Nothing was loaded.
        """
        own = self._entries(state, prefix)
        if "_extra_state" in own:
            self._topology_of(own["_extra_state"], f"{prefix}_extra_state")
        for name, parameter in self.named_parameters(recurse=False):
            if name in own:
                check_shape(prefix + name, own[name], parameter)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], prefix: str = "") -> "ExpandedLinear":
        """Builds the layer whose entries stand under ``prefix``, weights included.

        Raises:
            ValueError: The entries are no state of an FPE layer.
        """
        own = layer_entries(state, prefix)
        header, words = decode(own.get("_extra_state"), f"{prefix}_extra_state")
        weight = own.get("edge_weight")
        if not 0 <= header.kind < len(_kinds()) or not isinstance(weight, Tensor):
            raise ValueError(
                f"state dict: expected the weight of an FPE layer at '{prefix}edge_weight' and its kind at "
                f"'{prefix}_extra_state', got {type(weight).__name__} and {header.kind}"
            )
        kind = _kinds()[header.kind]
        try:
            topology = kind._parse(header, words)
            layer = kind._of(header, topology, "bias" in own, device="meta", dtype=weight.dtype)
            layer.to_empty(device=weight.device).load_state_dict(own)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"state dict: the entries under '{prefix}' are damaged: {error}") from error
        return layer

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *reports: Any
    ) -> None:
        self.check_state(state_dict, prefix)
        current = {prefix + name: value for name, value in self._entries(state_dict, prefix).items()}
        super()._load_from_state_dict(current, prefix, local_metadata, strict, *reports)
        self._follow_weight()
        self.clear_removed()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Refuses a model that an earlier version pickled; its state dict can be loaded."""
        if "_encoded" not in state:
            raise ValueError(
                f"{type(self).__name__}: this model was pickled whole by an earlier version; save its state_dict() "
                "with that version and rebuild it with fpe.restore"
            )
        super().__setstate__(state)

    # What is printed

    def _repr_details(self) -> str:
        return ""

    def extra_repr(self) -> str:
        """Sizes, structure and the share of weights kept."""
        total = max(self.in_features * self.out_features, 1)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self._repr_details()}"
            f"nonzeros={self.nonzeros} ({self.nonzeros / total:.1%}), bias={self.bias is not None}"
        )


def _kinds() -> tuple[type[ExpandedLinear], ...]:
    from . import KINDS

    return KINDS


def check_shape(name: str, got: object, wanted: Tensor) -> None:
    """Raises unless an entry of a state dict is a tensor of the shape of another."""
    shape = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
    if shape != list(wanted.shape):
        raise ValueError(f"state dict: '{name}' should be {list(wanted.shape)}, got {shape}")


def check_known(op: str, name: str, value: object, dtype: torch.dtype) -> Tensor:
    """Returns a matrix of a dtype whose entries are known, as topologies are given.

    Raises:
        TypeError: It is not a tensor, or of another dtype.
        ValueError: It is not a matrix, or is on ``"meta"``.
    """
    if not isinstance(value, Tensor) or value.dtype != dtype:
        raise TypeError(f"{op}: {name} must be a {dtype} tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.dim() != 2:
        raise ValueError(f"{op}: {name} must be a matrix, got shape {list(value.shape)}")
    if value.is_meta:
        raise ValueError(f"{op}: {name} is on 'meta', where it says nothing of the edges; only weights may be there")
    return value
