"""The parameters of a module as one vector, and directions in their space."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterLayout:
    """Where each parameter of a module sits in one flat vector.

    A parameter that several places of the module share (tied weights, or one sub-module
    registered twice) is counted once, under the first of its names.

    Args:
        names: names of the distinct parameters, in the order of `named_parameters()`.
        shapes: their shapes.
        aliases: pairs `(name of a further place, name in names)` of tied parameters.

    Raises:
        ValueError: if the three do not fit together.

    Example:
        >>> import torch
        >>> from assay.functional import ParameterLayout
        >>> model = torch.nn.Linear(3, 2)
        >>> layout = ParameterLayout.of(model)
        >>> layout.numel
        8
        >>> vector = layout.flatten(model)
        >>> torch.equal(layout.unflatten(vector)["weight"], model.weight)
        True
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    _sizes: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes):
            raise ValueError(
                f"names and shapes must be of one length, got {len(self.names)} names and "
                f"{len(self.shapes)} shapes"
            )
        for place, name in self.aliases:
            if name not in self.names:
                raise ValueError(f"aliases: {place!r} refers to {name!r}, which is not in names")
        object.__setattr__(self, "_sizes", tuple(shape.numel() for shape in self.shapes))

    @classmethod
    def of(cls, module: nn.Module) -> "ParameterLayout":
        """The layout of `module`'s parameters, frozen ones included.

        Args:
            module: any module.

        Returns:
            The layout; it holds no tensors.
        """
        first: dict[int, str] = {}
        shapes: list[torch.Size] = []
        aliases: list[tuple[str, str]] = []
        # named_modules() visits a sub-module that is registered twice only once, so that each
        # place that holds a parameter has one name.
        for prefix, owner in module.named_modules():
            for attribute, parameter in owner._parameters.items():
                if parameter is None:
                    continue
                place = f"{prefix}.{attribute}" if prefix else attribute
                if id(parameter) in first:
                    aliases.append((place, first[id(parameter)]))
                else:
                    first[id(parameter)] = place
                    shapes.append(parameter.shape)
        return cls(tuple(first.values()), tuple(shapes), tuple(aliases))

    @classmethod
    def over(cls, tensors: Mapping[str, Tensor]) -> "ParameterLayout":
        """The layout of some named tensors, e.g. those of `select_parameters`.

        Args:
            tensors: by name, in the order of the vector.

        Returns:
            The layout; it holds no tensors.
        """
        return cls(tuple(tensors), tuple(t.shape for t in tensors.values()))

    @property
    def numel(self) -> int:
        """Length of the vector."""
        return sum(self._sizes)

    def flatten(self, tensors: Mapping[str, Tensor] | nn.Module) -> Float[Tensor, " p"]:
        """One vector of all parameters, a copy that autograd follows.

        Args:
            tensors: a module, or a mapping from names to tensors (a `state_dict`, gradients by
                name, ...); entries that the layout does not know are ignored.

        Returns:
            The vector `(P,)`.

        Raises:
            ValueError: names the first tensor that is missing or has another shape, dtype kind
                or dtype.
        """
        found: Mapping[str, Tensor]
        if isinstance(tensors, nn.Module):
            found = dict(tensors.named_parameters())
        else:
            found = tensors
        pieces: list[Tensor] = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in found:
                raise ValueError(f"no tensor named {name!r}; expected one of shape {tuple(shape)}")
            tensor = found[name]
            if tensor.shape != shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
                )
            if not tensor.is_floating_point():
                raise ValueError(f"{name!r} has dtype {tensor.dtype}, expected a real float dtype")
            if pieces and tensor.dtype != pieces[0].dtype:
                raise ValueError(
                    f"{name!r} has dtype {tensor.dtype}, but {self.names[0]!r} has "
                    f"{pieces[0].dtype}; expected one dtype for all (module.to(dtype) makes it so)"
                )
            pieces.append(tensor.reshape(-1))
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def unflatten(
        self, vector: Float[Tensor, "*k p"], *, aliases: bool = False
    ) -> dict[str, Tensor]:
        """The parameters as views into `vector`, by name.

        Args:
            vector: `(P,)`, or `(..., P)` for many weight vectors at once.
            aliases: also list each further place of a tied parameter, as
                `torch.func.functional_call(..., tie_weights=False)` needs it.

        Returns:
            Tensors of shape `(..., *shape)`.

        Raises:
            ValueError: if the last dimension of `vector` is not P.
        """
        if vector.shape[-1] != self.numel:
            raise ValueError(
                f"vector has {vector.shape[-1]} entries, expected {self.numel}, the number of "
                "parameters of the layout"
            )
        # One split: its backward is one concatenation, where slices would add up P-sized tensors.
        pieces = vector.split(self._sizes, dim=-1)
        lead = vector.shape[:-1]
        tensors = {
            name: piece.view((*lead, *shape))
            for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)
        }
        if aliases:
            tensors.update({place: tensors[name] for place, name in self.aliases})
        return tensors


def parameters_to_vector(module: nn.Module) -> Float[Tensor, " p"]:
    """All parameters of a module in one vector, tied ones once.

    Unlike `torch.nn.utils.parameters_to_vector`, it takes the module, which is what knows the
    names: a wrong dtype is reported with the name of the parameter.

    Args:
        module: any module whose parameters have one floating dtype.

    Returns:
        A detached copy `(P,)`.

    Raises:
        ValueError: if the parameters are of several dtypes or not of a floating one.

    Example:
        >>> import torch
        >>> from assay.functional import parameters_to_vector
        >>> parameters_to_vector(torch.nn.Linear(3, 2)).shape
        torch.Size([8])
    """
    return ParameterLayout.of(module).flatten(module).detach()


@torch.no_grad()
def vector_to_parameters(vector: Float[Tensor, " p"], module: nn.Module) -> None:
    """Write a vector into the parameters of a module, in place; tied parameters stay tied.

    Args:
        vector: `(P,)`, in the order of `parameters_to_vector`.
        module: the module to change.

    Raises:
        ValueError: if the length of `vector` is not the number of parameters.

    Example:
        >>> import torch
        >>> from assay.functional import parameters_to_vector, vector_to_parameters
        >>> model = torch.nn.Linear(3, 2)
        >>> vector_to_parameters(torch.arange(8.0), model)
        >>> parameters_to_vector(model)
        tensor([0., 1., 2., 3., 4., 5., 6., 7.])
    """
    tensors = ParameterLayout.of(module).unflatten(vector)
    for name, parameter in module.named_parameters():
        parameter.copy_(tensors[name])


def call_with_vector(
    module: nn.Module,
    vector: Float[Tensor, " p"],
    *inputs: object,
    layout: ParameterLayout | None = None,
) -> Any:
    """`module(*inputs)` as if its parameters were those in `vector`.

    A pure function of `vector`: differentiable, and it may run under `torch.func.vmap`. In contrast
    to a bare `torch.func.functional_call`, a sub-module that is registered under two names gets its
    own parameters back afterwards (torch 2.13 leaves the substitutes in it).

    Args:
        module: any module; its buffers are used as they are.
        vector: `(P,)`, in the order of `parameters_to_vector`.
        *inputs: what the module's forward takes.
        layout: `ParameterLayout.of(module)`, to save computing it at each call.

    Returns:
        What the module returns.

    Raises:
        ValueError: if the length of `vector` is not the number of parameters.

    Example:
        >>> import torch
        >>> from assay.functional import call_with_vector
        >>> line = torch.nn.Linear(1, 1)
        >>> call_with_vector(line, torch.tensor([2.0, 1.0]), torch.tensor([[3.0]]))
        tensor([[7.]])
    """
    layout = ParameterLayout.of(module) if layout is None else layout
    tensors = layout.unflatten(vector, aliases=True)
    return torch.func.functional_call(module, tensors, inputs, tie_weights=False)


def random_direction(
    module: nn.Module, *, generator: torch.Generator | None = None
) -> Float[Tensor, " p"]:
    """A standard normal vector in the parameter space of a module.

    Args:
        module: gives length, dtype and device.
        generator: source of randomness, on the module's device; default torch's own.

    Returns:
        The direction `(P,)`, not normalised.

    Raises:
        ValueError: if the parameters are of several dtypes or not of a floating one.

    Example:
        >>> import torch
        >>> from assay.functional import random_direction
        >>> random_direction(torch.nn.Linear(3, 2), generator=torch.Generator()).shape
        torch.Size([8])
    """
    vector = parameters_to_vector(module)
    return torch.randn(vector.shape, generator=generator, dtype=vector.dtype, device=vector.device)


@torch.no_grad()
def filter_normalize(direction: Float[Tensor, " p"], module: nn.Module) -> Float[Tensor, " p"]:
    r"""Give each filter of a direction the norm of the module's filter.

    With d the direction and w the weights, the filter j of layer i becomes
    d_ij ‖w_ij‖ / ‖d_ij‖. A filter is what makes one output: a row of a matrix, `weight[j]` of a
    convolution. Parameters with fewer than two dimensions (biases, scales of norms) are set to
    zero: a loss can be made to look as sharp or flat as one likes along them.

    Args:
        direction: `(P,)`, in the order of `parameters_to_vector`.
        module: the module at whose weights the direction starts.

    Returns:
        The normalised direction `(P,)`. A filter that is zero in `direction` stays zero.

    Raises:
        ValueError: if the length of `direction` is not the number of parameters.

    Example:
        >>> import torch
        >>> from assay.functional import filter_normalize, random_direction
        >>> model = torch.nn.Linear(3, 2)
        >>> d = filter_normalize(random_direction(model), model)
        >>> torch.allclose(d[:6].view(2, 3).norm(dim=1), model.weight.norm(dim=1))
        True
        >>> d[6:]
        tensor([0., 0.])

    Reference:
        Li, Xu, Taylor, Studer, Goldstein, "Visualizing the Loss Landscape of Neural Nets",
        NeurIPS 2018.
    """
    layout = ParameterLayout.of(module)
    weights = layout.unflatten(layout.flatten(module))
    normalized: dict[str, Tensor] = {}
    for name, d in layout.unflatten(direction).items():
        if d.ndim < 2:
            normalized[name] = torch.zeros_like(d)
            continue
        rows = d.flatten(1)
        norms = rows.norm(dim=1, keepdim=True)
        target = weights[name].flatten(1).norm(dim=1, keepdim=True)
        scale = torch.where(norms > 0, target / norms, torch.zeros_like(norms))
        normalized[name] = (rows * scale).view_as(d)
    return layout.flatten(normalized)
