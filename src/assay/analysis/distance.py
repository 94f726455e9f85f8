"""How far inputs are from the decision boundary of a classifier."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from assay.analysis.boundary_geometry import between
from assay.analysis.classifier import frozen, logits_of
from assay.functional.bisection import bisect

TINY = 1e-30  # keeps a slope of zero from being divided by


@dataclass(frozen=True, eq=False)
class BoundaryDistance:
    """The nearest points of another class that `boundary_distance` found.

    Args:
        distance: Euclidean distance of each input to its point, `(N,)`; infinite where none was
            found.
        point: inputs on the far side of the boundary, `(N, ...)`; the input itself where it lies on
            the boundary, at distance 0.
        predicted: the class of each input, `(N,)`.
        other: the class of its point, `(N,)`.

    Example:
        >>> import torch
        >>> from assay.analysis import boundary_distance
        >>> found = boundary_distance(torch.nn.Identity(), torch.tensor([[2.0, 0.0]]))
        >>> found.found, found.other
        (tensor([True]), tensor([1]))
    """

    distance: Float[Tensor, " n"]
    point: Float[Tensor, "n ..."]
    predicted: Int[Tensor, " n"]
    other: Int[Tensor, " n"]

    @property
    def found(self) -> Bool[Tensor, " n"]:
        """Where another class was reached."""
        return self.distance.isfinite()


def boundary_distance(
    model: nn.Module,
    x: Tensor,
    *,
    candidates: int = 10,
    max_iter: int = 50,
    overshoot: float = 0.02,
    refinements: int = 2,
    rtol: float = 1e-6,
    batch_size: int = 256,
) -> BoundaryDistance:
    r"""Distance of each input to the nearest input that the model takes for another class.

    1. DeepFool: with k the class of x and g_j = f_k − f_j the lead over class j, the input steps to
       the nearest of the linearised boundaries,

           z ← z − (1 + overshoot) g_j ∇g_j / ‖∇g_j‖²,   j = argmin_j g_j / ‖∇g_j‖,

       until another class wins.
    2. Bisection between x and z finds the boundary on that segment.
    3. A refinement looks from x along the boundary's normal at the point found, no farther than
       before: at the nearest point of a smooth boundary both directions are the same.

    What is found is always a point of another class, so that the distance is an upper bound of the
    smallest one: evaluated again in batches of the same shape, the model gives each point another
    class. (Other shapes add up in another order, so that a point may be back by a rounding error.)
    The distance is that one for linear classifiers, min_j |g_j(x)| / ‖w_k − w_j‖, up to `rtol`.

    The model is evaluated in evaluation mode and left as it was.

    Args:
        model: a classifier, see `Classifier`, that treats inputs of a batch independently.
        x: inputs `(N, ...)`, floating point.
        candidates: the most probable other classes to look at in each step, each a backward pass.
        max_iter: steps after which an input counts as having no boundary.
        overshoot: by how much each step goes beyond the linearised boundary, relative to it.
        refinements: how often to look along the normal.
        rtol: relative tolerance of the distance along its direction.
        batch_size: inputs at a time.

    Returns:
        A `BoundaryDistance`.

    Raises:
        ValueError: if `x` is not floating point `(N, ...)` and finite, or an option is out of
            range.

    Example:
        >>> import torch
        >>> from assay.analysis import boundary_distance
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> boundary_distance(model, torch.tensor([[0.5, 7.0], [-3.0, 1.0]])).distance
        tensor([0.5000, 3.0000])

    Reference:
        S.-M. Moosavi-Dezfooli, A. Fawzi, P. Frossard, "DeepFool: a simple and accurate method to
        fool deep neural networks", CVPR 2016. https://arxiv.org/abs/1511.04599
    """
    if x.ndim < 2 or not x.is_floating_point() or not bool(x.isfinite().all()):
        raise ValueError(
            f"x must be finite floating-point inputs (N, ...), got {tuple(x.shape)} {x.dtype}"
        )
    for name, value, least in (
        ("candidates", candidates, 1),
        ("max_iter", max_iter, 1),
        ("refinements", refinements, 0),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for name, value in (("overshoot", overshoot), ("rtol", rtol)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    parts = []
    with frozen(model):
        for part in x.detach().split(batch_size):
            search = _Search(model, part, candidates, overshoot, rtol)
            search.step_across(max_iter)
            search.bisect()
            for _ in range(refinements):
                search.along_the_normal()
            search.stay_across()
            parts.append(search.found())
    return BoundaryDistance(*map(torch.cat, zip(*parts, strict=True)))


class _Search:
    """One batch: inputs `x` of the classes `own`, and points `z` beyond the boundary."""

    def __init__(
        self, model: nn.Module, x: Tensor, candidates: int, overshoot: float, rtol: float
    ) -> None:
        self.model, self.x = model, x
        self.overshoot, self.rtol = overshoot, rtol
        with torch.no_grad():
            logits = logits_of(model, x)
        self.own = logits.argmax(1)
        self.candidates = min(candidates, logits.shape[1] - 1)
        self.z = x.clone()
        self.crossed = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def leads(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Lead of each row's class over the candidates that come nearest to it, and which."""
        own = self.own[rows].unsqueeze(1)
        others = logits.scatter(1, own, -torch.inf).topk(self.candidates, dim=1)
        return logits.gather(1, own) - others.values, others.indices

    def step_across(self, max_iter: int) -> None:
        rows = torch.arange(len(self.x), device=self.x.device)
        for _ in range(max_iter + 1):
            with torch.enable_grad():
                z = self.z[rows].requires_grad_()
                leads, _ = self.leads(logits_of(self.model, z), rows)
                across = leads.detach().amin(1) <= 0
                self.crossed[rows[across]] = True
                if bool(across.all()):
                    return
                step, length = _nearest_plane(leads, z)
            # A lead of a few units in the last place makes a step that rounding would swallow.
            smallest = 8 * torch.finfo(z.dtype).eps * z.detach().flatten(1).norm(dim=1)
            scale = (1 + self.overshoot) * length + smallest
            moving = ~across & length.isfinite()
            moved = z.detach() - step * _column(scale, z)
            rows = rows[moving]
            if len(rows) == 0:
                return
            self.z[rows] = moved[moving]

    @torch.no_grad()
    def bisect(self, end: Tensor | None = None, chosen: Tensor | None = None) -> None:
        """Move the points of some rows onto the boundary between `x` and `end`."""
        rows = (self.crossed if chosen is None else chosen).nonzero().squeeze(1)
        end = self.z if end is None else end

        def behind(position: Tensor, places: Tensor) -> Tensor:
            index = rows[places]
            logits = logits_of(self.model, between(self.x[index], end[index], position))
            return -self.leads(logits, index)[0].amin(1)

        low = torch.zeros(len(rows), dtype=self.x.dtype, device=self.x.device)
        found = bisect(behind, low, low + 1, rtol=self.rtol, max_iter=60)
        self.z[rows] = between(self.x[rows], end[rows], found.high)

    def along_the_normal(self) -> None:
        rows = torch.arange(len(self.x), device=self.x.device)
        with torch.enable_grad():
            z = self.z.detach().requires_grad_()
            lead = self.leads(logits_of(self.model, z), rows)[0][:, 0]
            slope = torch.autograd.grad(lead.sum(), z)[0]
        with torch.no_grad():
            norm = slope.flatten(1).norm(dim=1)
            reach = (self.z - self.x).flatten(1).norm(dim=1)
            end = self.x - slope * _column(reach / norm.clamp(min=TINY), slope)
            leads, _ = self.leads(logits_of(self.model, end), rows)
            self.bisect(end, self.crossed & (norm > 0) & (leads.amin(1) <= 0))

    @torch.no_grad()
    def stay_across(self) -> None:
        """Push points on until the whole batch, evaluated at once, puts them in another class.

        The bisection evaluates what is open only, in smaller batches that round differently, and
        takes a tie for a crossing; the classifier gives a tie to the first class.
        """
        start, away = self.z.clone(), self.z - self.x
        moved = self.crossed & away.flatten(1).any(1)
        push = 2 * torch.finfo(self.z.dtype).eps
        back = moved & self.home()
        while bool(back.any()) and push < 1:
            self.z[back] = (start + push * away)[back]
            back = moved & self.home()
            push *= 2
        self.crossed &= ~back

    def home(self) -> Tensor:
        """Which points the model puts in the class of their inputs."""
        return logits_of(self.model, self.z).argmax(1) == self.own

    @torch.no_grad()
    def found(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        distance = (self.z - self.x).flatten(1).norm(dim=1)
        distance = distance.masked_fill(~self.crossed, torch.inf)
        rows = torch.arange(len(self.x), device=self.x.device)
        _, others = self.leads(logits_of(self.model, self.z), rows)
        return distance, self.z, self.own, others[:, 0]


def _nearest_plane(leads: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Unit normal and distance of the nearest linearised boundary; infinite if there is none."""
    normal = torch.zeros_like(z)
    nearest = torch.full((len(z),), torch.inf, dtype=z.dtype, device=z.device)
    count = leads.shape[1]
    for j in range(count):  # one slope at a time: all of them are `count` times the inputs
        (slope,) = torch.autograd.grad(leads[:, j].sum(), z, retain_graph=j + 1 < count)
        norm = slope.flatten(1).norm(dim=1)
        length = torch.where(norm > 0, leads[:, j].detach() / norm, torch.inf).to(z.dtype)
        closer = length < nearest
        nearest = torch.where(closer, length, nearest)
        normal[closer] = (slope * _column(1 / norm.clamp(min=TINY), slope))[closer]
    return normal, nearest


def _column(values: Tensor, like: Tensor) -> Tensor:
    """One value a sample, to multiply samples of any shape with."""
    return values.view(-1, *[1] * (like.ndim - 1))
