"""Curvature and individual gradients of any model in nearly one backward pass."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from assay.curvature.capture import Capture, plain_kernels
from assay.curvature.chunks import count_samples, pieces, slice_samples
from assay.curvature.first_order import FIRST_ORDER, first_order
from assay.curvature.hessian import FEWEST_PROBES, HESSIAN, hessian_diagonals
from assay.curvature.kfra import kfra
from assay.curvature.objective import Objective, find_objective
from assay.curvature.plan import Plan
from assay.curvature.quantities import Quantities, average
from assay.curvature.second_order import EXACT, MONTE_CARLO, second_order
from assay.functional import call_model, select_parameters

QUANTITIES = (*FIRST_ORDER, *EXACT, *MONTE_CARLO, "kfra", *HESSIAN)
"""Names of all quantities."""

Selection = Iterable[str] | Callable[[str], bool] | None


@dataclass(frozen=True)
class Settings:
    """The arguments of `compute` that every pass needs."""

    quantities: frozenset[str]
    mc_samples: int | None
    generator: torch.Generator | None
    params: Selection
    kfac_approx: str
    max_features: int
    batch_dim: int
    out: Mapping[str, Mapping[str, Any]]
    piece: bool = False

    def __post_init__(self) -> None:
        if self.mc_samples is not None and self.mc_samples < 1:
            raise ValueError(f"mc_samples must be at least 1, got {self.mc_samples}")
        if self.kfac_approx not in ("expand", "reduce"):
            raise ValueError(f"kfac_approx must be 'expand' or 'reduce', got {self.kfac_approx!r}")

    def only(self, quantities: frozenset[str]) -> "Settings":
        """With other quantities."""
        return replace(self, quantities=quantities)

    def earlier(self, quantity: str, name: str) -> Any:
        """A result of an earlier call that may be written over."""
        return self.out.get(quantity, {}).get(name)

    def buffer(self, quantity: str, name: str, parameter: Tensor, samples: int) -> Tensor | None:
        """The same if it is a tensor of the right kind."""
        found = self.earlier(quantity, name)
        if not isinstance(found, Tensor) or found.dtype != parameter.dtype:
            return None
        shape = found.shape[1:] if quantity == "grad_batch" else found.shape
        fits = shape == parameter.shape and found.device == parameter.device
        if quantity == "grad_batch":
            fits = fits and len(found) == samples
        return found if fits and found.is_contiguous() and not found.requires_grad else None


def compute(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    quantities: Iterable[str] = FIRST_ORDER,
    *,
    mc_samples: int | None = None,
    generator: torch.Generator | None = None,
    params: Selection = None,
    chunk_size: int | None = None,
    out: Mapping[str, Mapping[str, Any]] | None = None,
    scale: str = "samples",
    curvature_samples: Tensor | None = None,
    kfac_approx: str = "expand",
    max_features: int = 4096,
    batch_dim: int = 0,
) -> Quantities:
    r"""Individual gradients, their statistics, and curvature of a model on one mini-batch.

    With the loss L = (1/N) Σ ℓ_n of N samples, g_n = ∇ℓ_n, S_n S_nᵀ the Hessian of ℓ_n in the
    model's output and J_n the output's Jacobian:

    | name | value | shape |
    |---|---|---|
    | `grad` | ∇L | as the parameter |
    | `grad_batch` | g_n | `(N, *shape)` |
    | `batch_l2` | ‖g_n‖² | `(N,)` |
    | `second_moment` | (1/N) Σ g_n² | as the parameter |
    | `variance` | (1/N) Σ (g_n − mean g)² | as the parameter |
    | `diag_ggn`, `diag_ggn_mc` | diagonal of G = (1/N) Σ J_nᵀ S_n S_nᵀ J_n | as the parameter |
    | `kfac`, `kflr`, `kfra` | Kronecker approximation of G's blocks | `KroneckerFactors` |
    | `diag_hessian` | diagonal of ∇²L | as the parameter |
    | `diag_hessian_mc` | its unbiased estimate from random signs | `assay.functional.Estimate` |

    `kfac` and the quantities in `_mc` are random: S_n is replaced by `mc_samples` gradients at
    labels drawn from the model (by random signs for `diag_hessian_mc`), unbiased. For a loss that
    is a sum over samples, `grad` and curvature are those of the sum, the rest stays.

    `variance` is mean g² − (mean g)² where that keeps at least a 64th of mean g². For a parameter
    with an entry where it does not, individual gradients are formed, some at a time, and the mean
    of (g − mean g)² taken: that costs about what they cost. So it is never negative, zero for one
    sample or equal gradients, and with ε the dtype's precision its relative error is some 100 ε or
    ε |mean g| / √variance, whichever is larger; the latter is that of individual gradients.

    The model may be any module: what happens to each parameter is watched at the level of torch
    functions, and autograd carries gradients through everything between. A parameter that is used
    several times has its gradients added before they are squared. Linear maps, convolutions,
    transposed ones, embeddings, norms, sums, products, attention and recurrent layers have rules;
    any other function is differentiated sample by sample; what even that cannot do costs one
    backward pass a sample. The Kronecker quantities have the exact block for biases and scales, and
    its diagonal for larger parameters that are no matrix of a linear map or are used in several
    ways. Nothing of the graph is kept, `.grad` and buffers in evaluation mode stay as they are.

    Under autocast, factors are in the dtype of the parameters. A frozen parameter has no entry in
    the result; one that the loss does not depend on has zeros. Not run on GPU here.

    Args:
        model: any module; a `DistributedDataParallel` is taken for what it wraps.
        loss_fn: `(output, targets) -> L`, or -> the N terms ℓ_n. Second-order quantities need its
            value to come from one call of `CrossEntropyLoss`, `MSELoss` or `BCEWithLogitsLoss`, or
            their functions, wherever that call is. A callable that returns a scalar has to be a
            mean or a sum over samples; this is checked if the outputs can be cut into samples.
        inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        targets: what `loss_fn` takes second.
        quantities: names from the table.
        mc_samples: draws, for the random quantities; by default 1, and 2 for `diag_hessian_mc`, the
            fewest that have a standard error.
        generator: of the draws.
        params: names or a predicate on names; default all that require a gradient.
        chunk_size: samples a pass; the result is that of the whole batch.
        out: an earlier result whose tensors may be written over instead of making new ones: new
            memory costs more than the arithmetic. Keep what this call returns, not `out`.
        scale: `"samples"`, or `"loss"`: g_n is replaced by what the sample contributes to ∇L
            (g_n / N for a mean), and moments are sums: second_moment Σ (g_n/N)², variance
            (1/N) Σ (g_n/N − mean)², as in BackPACK.
        curvature_samples: indices of samples; curvature is that of the loss on these alone.
        kfac_approx: `"expand"` (a layer's positions count as independent) or `"reduce"` (they are
            averaged first).
        max_features: largest block kept dense for a parameter that is no matrix of a linear map;
            also KFRA's largest layer.
        batch_dim: dimension of the inputs that counts samples.

    Returns:
        Quantity → parameter → value.

    Raises:
        TypeError: if `inputs` hold no tensor.
        ValueError: if the batch is empty; the loss is not finite (NaN in the inputs), not a mean or
            sum over samples, or, for second order, none of those listed; a BatchNorm is in training
            mode and more than `grad` is asked for; a name is unknown; a named parameter is frozen;
            `kfra` is asked of a model that is no chain; `diag_hessian_mc` with `mc_samples=1`; a
            parameter is in the loss itself (a penalty) and the loss returns no terms ℓ_n.

    Example:
        >>> import torch
        >>> from assay import curvature
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> q = curvature.compute(model, torch.nn.functional.cross_entropy, x, y,
        ...                       ["grad_batch", "diag_ggn", "kflr"])
        >>> q["grad_batch"]["weight"].shape
        torch.Size([4, 2, 3])
        >>> one = curvature.compute(model, torch.nn.functional.cross_entropy, x[:1], y[:1],
        ...                         ["diag_ggn", "kflr"])
        >>> block = one["kflr"]["weight"].to_dense()  # exact for a single sample
        >>> torch.allclose(block.diagonal(), one["diag_ggn"]["weight"].flatten(), atol=1e-6)
        True

    Reference:
        Dangel, Kunstner, Hennig, "BackPACK: Packing more into Backprop", ICLR 2020.
    """
    wanted = check_quantities(quantities)
    if scale not in ("samples", "loss"):
        raise ValueError(f"scale must be 'samples' or 'loss', got {scale!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    model = unwrapped(model)
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs  # pytrees know no other
    settings = Settings(
        wanted, mc_samples, generator, params, kfac_approx, max_features, batch_dim, out or {}
    )
    samples = count_samples(inputs, batch_dim)
    curved = wanted - set(FIRST_ORDER)
    if curvature_samples is not None and curved:
        first = compute_chunked(
            model, loss_fn, inputs, targets, settings.only(wanted & set(FIRST_ORDER)), chunk_size
        ) if wanted & set(FIRST_ORDER) else Quantities({}, samples, "mean", samples)  # fmt: skip
        some = slice_samples(inputs, curvature_samples, samples, batch_dim)
        some_targets = slice_samples(targets, curvature_samples, samples, 0)
        second = compute_chunked(
            model, loss_fn, some, some_targets, settings.only(curved), chunk_size
        )
        result = first.merged(second)
    else:
        result = compute_chunked(model, loss_fn, inputs, targets, settings, chunk_size)
    return result.scaled_to_loss() if scale == "loss" else result


def check_quantities(quantities: Iterable[str]) -> frozenset[str]:
    """The names as a set.

    Args:
        quantities: names.

    Raises:
        ValueError: if one is unknown or there is none.
    """
    names = [quantities] if isinstance(quantities, str) else list(quantities)
    unknown = [name for name in names if name not in QUANTITIES]
    if unknown or not names:
        raise ValueError(f"quantities must be some of {QUANTITIES}, got {names}")
    return frozenset(names)


def unwrapped(model: nn.Module) -> nn.Module:
    """What a `DistributedDataParallel` or a compiled module wraps.

    Args:
        model: any module.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def compute_chunked(
    model: nn.Module,
    loss_fn: Callable,
    inputs: Any,
    targets: Any,
    settings: Settings,
    chunk_size: int | None,
) -> Quantities:
    """`compute` for checked arguments, some samples at a time."""
    samples = count_samples(inputs, settings.batch_dim)
    if chunk_size is None or chunk_size >= samples:
        result = _one_pass(model, loss_fn, inputs, targets, settings)
        return _only(result, settings.quantities)
    if "kfra" in settings.quantities:
        raise ValueError("kfra averages over the whole batch at every layer: no chunk_size")
    extended = replace(settings, out={}, piece=True)
    if "variance" in settings.quantities:
        extended = extended.only(settings.quantities | {"grad"})
    parts = []
    for piece in pieces(samples, chunk_size):
        some = slice_samples(inputs, piece, samples, settings.batch_dim)
        some_targets = slice_samples(targets, piece, samples, 0)
        parts.append(_one_pass(model, loss_fn, some, some_targets, extended))
    return _only(average(parts), settings.quantities)


def _only(result: Quantities, quantities: frozenset[str]) -> Quantities:
    entries = {name: result[name] for name in QUANTITIES if name in quantities}
    return Quantities(entries, result.samples, result.reduction, result.weight)


def _one_pass(
    model: nn.Module, loss_fn: Callable, inputs: Any, targets: Any, settings: Settings
) -> Quantities:
    params = select_parameters(model, settings.params)
    per_sample = settings.quantities != {"grad"}
    if per_sample:
        refuse_batch_statistics(model)
    samples = count_samples(inputs, settings.batch_dim)
    capture = Capture(
        params,
        model.parameters(),
        model.buffers(),
        trace=needs_trace(settings.quantities),
        per_sample=per_sample,
    )
    try:
        with torch.inference_mode(False), torch.enable_grad():
            inputs, targets = pytree.tree_map_only(Tensor, _ordinary, (inputs, targets))
            capture.mark_inputs((inputs, targets), samples)
            with watched(model, settings.quantities), capture:
                output = call_model(model, inputs)
                value = loss_fn(output, targets)
            objective = find_objective(
                loss_fn, value, output, targets, capture.record, samples, settings.batch_dim,
                piece=settings.piece,
            )  # fmt: skip
            del output, value
            with without_autocast():
                return evaluate(capture, objective, params, settings, last=True)
    finally:
        capture.forget()


def _ordinary(tensor: Tensor) -> Tensor:
    """One that gradients may depend on, also if it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def evaluate(
    capture: Capture,
    objective: Objective,
    params: Mapping[str, Tensor],
    settings: Settings,
    *,
    last: bool = False,
) -> Quantities:
    """All quantities of one captured pass.

    Args:
        capture: of the forward pass.
        objective: its loss.
        params: the selected parameters.
        settings: what is wanted.
        last: whether nobody needs the graph afterwards, so that it may be let go of on the way.
    """
    wanted = settings.quantities
    found: dict[str, dict[str, Any]] = {}
    if wanted == {"grad"}:
        gradient = torch.autograd.grad(
            objective.loss, list(params.values()), retain_graph=True, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        found["grad"] = dict(zip(params, gradient, strict=True))
        return Quantities(found, objective.samples, objective.reduction, objective.weight)
    plan = Plan(capture.record, objective, dict(params))
    first, second = wanted & set(FIRST_ORDER), wanted & {*EXACT, *MONTE_CARLO}
    doubtful = plan.doubtful
    curved: dict[str, dict[str, Any]] = {}
    if second and not doubtful:
        # Before there are results of first order: many columns at once take memory.
        curved = _second_order(plan, settings)
    # Second order alone needs no gradient, unless a rule has to be checked with one.
    if first or doubtful:
        consume = last and plan.simple and wanted == first | second
        cotangent = torch.full_like(objective.loss, objective.per_sample_scale)
        gradients = plan.gradients([objective.loss], [cotangent], retain_graph=not consume)
        with torch.no_grad():
            plan.check(gradients)
        if first:
            found |= first_order(plan, gradients, first, settings.buffer, consume=consume)
        del gradients
    if second and doubtful:
        curved = _second_order(plan, settings)
    found |= curved
    steps, inputs = capture.record.steps or [], capture.inputs
    if "kfra" in wanted:
        found["kfra"] = kfra(plan, steps, inputs, max_features=settings.max_features)
    if wanted & set(HESSIAN):
        found |= hessian_diagonals(
            plan,
            steps,
            inputs,
            wanted,
            probes=settings.mc_samples or FEWEST_PROBES,
            generator=settings.generator,
        )
    return Quantities(found, objective.samples, objective.reduction, objective.weight)


def _second_order(plan: Plan, settings: Settings) -> dict[str, dict[str, Any]]:
    return second_order(
        plan,
        settings.quantities,
        mc_samples=settings.mc_samples or 1,
        generator=settings.generator,
        kfac_approx=settings.kfac_approx,
        max_features=settings.max_features,
        buffer=settings.earlier,
    )


def needs_trace(quantities: frozenset[str]) -> bool:
    """Whether every call has to be recorded, not only those with parameters.

    Args:
        quantities: that are computed.
    """
    return bool(quantities & {"kfra", "diag_hessian"})


@contextlib.contextmanager
def watched(model: nn.Module, quantities: frozenset[str]) -> Iterator[None]:
    """Eager kernels, which can be differentiated as often as the quantities need.

    Args:
        model: that is called inside.
        quantities: that are computed.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(plain_kernels())
        if quantities & set(HESSIAN):
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Products of gradients and activations in full precision."""
    with torch.autocast("cpu", enabled=False):
        if torch.cuda.is_available():
            with torch.autocast("cuda", enabled=False):
                yield
        else:
            yield


def refuse_batch_statistics(model: nn.Module) -> None:
    """Individual gradients do not exist where samples are normalised together.

    Args:
        model: any module.

    Raises:
        ValueError: naming the first BatchNorm in training mode.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(
            module, nn.modules.instancenorm._InstanceNorm
        ):
            if not module.training and module.running_mean is not None:
                continue
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) normalises with the statistics "
                "of the batch, so that a sample has no gradient of its own: call .eval() on it"
            )
