"""The card: what the network is made of, layer by layer, and what one sample costs."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.flop_counter import FlopCounterMode

from assay.curvature.capture import plain_kernels
from assay.examine.budget import Budget
from assay.examine.differentiable import differentiable, fitting, layer_of
from assay.examine.panel import Finding, Metric, Panel, Picture, panel
from assay.examine.sample import Sample
from assay.functional import repeatable
from assay.lab.figures import subplots
from assay.lab.numerals import number, percent
from assay.lab.result import Cell

ROWS = 160  # of the table of layers
BARS = 14  # of the figure
FIRST, MOST = 8, 256  # samples of the batch that shows which parameters get a gradient
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # told apart by everybody (Okabe, Ito)


@panel("card", title="Card", order=0, share=0.2)
def card(model: nn.Module, data: Sample, budget: Budget) -> Panel:
    """Layers, parameters, multiply-adds, memory, and structure that does nothing."""
    user = model.get_submodule("model") if "model" in dict(model.named_children()) else model
    weights = _Weights(user)
    # A copy: a view would count as memory all the samples that share its storage.
    forward = _watch(model, user, data.train.x[:1].clone(), budget)
    layers = list(_layers(user, weights, forward))
    silent = _silent(model, data, budget)
    inventory = _inventory(user)
    tables: dict[str, list[dict[str, Cell]]] = {
        "Layers": _layer_rows(layers, budget),
        "Inventory": inventory.rows(),
        "Types of numbers": weights.rows(),
    }
    if weights.tied:
        tables["Tied weights"] = [{"used as": ", ".join(names)} for names in weights.tied]
    if silent is not None and silent.rows():
        tables["Without gradient"] = silent.rows()
    return Panel(
        metrics=[
            *_size_metrics(weights, layers),
            *_cost_metrics(forward),
            *inventory.metrics(),
            *([] if silent is None else silent.metrics()),
        ],
        reading=(
            "Where the parameters are is seldom where the arithmetic is: linear layers hold "
            "weights, convolutions and attention reuse theirs at every position. Activations are "
            "for one sample; training multiplies them by the batch, and adds to the weights their "
            "gradients and the optimizer's state (two more copies for Adam)."
        ),
        method=(
            "Counted on one forward pass of one sample in evaluation mode. Multiply-adds are those "
            "of matrix products, convolutions, attention and recurrent layers (torch's "
            "FlopCounterMode, two FLOPs each); elementwise arithmetic and norms are not counted. "
            "Activation memory is that of all distinct tensors that modules return."
            + ("" if silent is None else f" {silent.method}")
        ),
        reference={"PyTorch, FlopCounterMode": "https://docs.pytorch.org/docs/stable/index.html"},
        figures=_figures(layers),
        tables=tables,
        findings=[
            *_normalisation_findings(user),
            *_weight_findings(weights, layers),
            *([] if silent is None else silent.findings()),
        ],
    )


# -- what is held ------------------------------------------------------------------------------


class _Weights:
    """Every parameter and buffer once, and the names that share one."""

    def __init__(self, model: nn.Module) -> None:
        names: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        self.first = {group[0] for group in names.values()}
        self.tied = [group for group in names.values() if len(group) > 1]
        self.parameters = dict(model.named_parameters())
        self.buffers = dict(model.named_buffers())
        self.frozen = {name for name, p in self.parameters.items() if not p.requires_grad}

    @property
    def count(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    @property
    def frozen_count(self) -> int:
        return sum(self.parameters[name].numel() for name in self.frozen)

    @property
    def bytes(self) -> int:
        return sum(_bytes(t) for t in (*self.parameters.values(), *self.buffers.values()))

    def rows(self) -> list[dict[str, Cell]]:
        found: dict[tuple[str, str, str], list[Tensor]] = {}
        for kind, tensors in (("parameters", self.parameters), ("buffers", self.buffers)):
            for t in tensors.values():
                found.setdefault((kind, _dtype(t), str(t.device)), []).append(t)
        return [
            {"what": kind, "dtype": dtype, "device": device, "tensors": len(tensors),
             "numbers": sum(t.numel() for t in tensors), "bytes": sum(map(_bytes, tensors))}
            for (kind, dtype, device), tensors in found.items()
        ]  # fmt: skip


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


# -- what a forward pass does ------------------------------------------------------------------


@dataclass
class _Call:
    """What a module did in the forward pass: without what its children did."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtype: str = ""
    bytes: int = 0
    flops: int = 0
    calls: int = 0


@dataclass
class _Forward:
    """One sample's forward pass."""

    calls: dict[str, _Call]
    flops: int | None
    activation_bytes: int
    saved_bytes: int | None


def _recurrent_flops(x: Any, w_ih: Any, w_hh: Any, *_: Any, **__: Any) -> int:
    """Of a recurrent layer in oneDNN's kernel, which torch's counter does not know."""
    return 2 * math.prod(x[:2]) * (math.prod(w_ih) + math.prod(w_hh))


def _counter() -> FlopCounterMode:
    kernel = getattr(torch.ops.aten, "mkldnn_rnn_layer", None)
    return FlopCounterMode(
        display=False, custom_mapping={} if kernel is None else {kernel: _recurrent_flops}
    )


def _watch(model: nn.Module, user: nn.Module, x: Tensor, budget: Budget) -> _Forward:
    """Shapes, arithmetic and memory of a forward pass, by layer."""
    counter = _counter()
    try:
        calls, activations = _call_by_layer(model, user, x, counter)
        flops: int | None = counter.get_total_flops()
    except NotImplementedError:  # an operation that lets no mode look on
        budget.note("The model has operations whose arithmetic cannot be counted.")
        calls, activations = _call_by_layer(model, user, x, None)
        flops = None
    return _Forward(calls, flops, activations, _saved_bytes(model, x, budget))


def _call_by_layer(
    model: nn.Module, user: nn.Module, x: Tensor, counter: FlopCounterMode | None
) -> tuple[dict[str, _Call], int]:
    calls: dict[str, _Call] = {}
    open_calls: list[list[int]] = []  # FLOPs at its start, and those of its children
    kept: dict[int, Any] = {x.untyped_storage().data_ptr(): None}
    total = 0
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def so_far() -> int:
        return 0 if counter is None else counter.get_total_flops()

    def before(*_: Any) -> None:
        open_calls.append([so_far(), 0])

    def after(name: str) -> Callable:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            nonlocal total
            start, inner = open_calls.pop()
            spent = so_far() - start
            if open_calls:
                open_calls[-1][1] += spent
            call = calls.setdefault(name, _Call())
            call.flops += spent - inner
            call.calls += 1
            for t in _tensors(output):
                call.shapes.append(tuple(t.shape))
                call.dtype = _dtype(t)
                storage = t.untyped_storage()
                # Storages are kept until the end: a freed one's address would be used again.
                if storage.data_ptr() not in kept and storage.data_ptr() not in weights:
                    kept[storage.data_ptr()] = storage
                    call.bytes += storage.nbytes()
                    total += storage.nbytes()

        return hook

    handles = []
    try:
        for name, module in user.named_modules():
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after(name)))
        with plain_kernels(), repeatable(model), torch.no_grad():
            if counter is None:
                model(x)
            else:
                with counter:
                    model(x)
    finally:
        for handle in handles:
            handle.remove()
    return calls, total


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (t for t in output.values() if isinstance(t, Tensor))
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def _saved_bytes(model: nn.Module, x: Tensor, budget: Budget) -> int | None:
    """What autograd keeps of one sample's forward pass for the backward pass."""
    kept: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with differentiable(model) as net, repeatable(net):
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        weights |= {b.untyped_storage().data_ptr() for b in net.buffers()}
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                net(fitting(net, x))
        except RuntimeError:
            budget.note("The model cannot be differentiated: what training keeps is not known.")
            return None
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


# -- layers ------------------------------------------------------------------------------------


@dataclass
class _Layer:
    name: str
    kind: str
    parameters: int
    frozen: int
    tied: bool
    dtype: str
    call: _Call

    @property
    def row(self) -> dict[str, Cell]:
        shapes = list(dict.fromkeys(self.call.shapes))
        remarks = [f"called {self.call.calls} times"] if self.call.calls > 1 else []
        remarks += ["tied"] if self.tied else []
        remarks += ["frozen"] if self.frozen else []
        remarks += [] if self.call.calls or not self.parameters else ["not called as a module"]
        return {
            "layer": self.name,
            "type": self.kind,
            "output": ", ".join(" × ".join(map(str, s[1:])) for s in shapes[:2]) or None,
            "parameters": self.parameters,
            "multiply-adds": self.call.flops // 2,
            "activation bytes": self.call.bytes,
            "dtype": self.dtype or None,
            "remarks": "; ".join(remarks),
        }  # fmt: skip


def _layers(model: nn.Module, weights: _Weights, forward: _Forward) -> Iterator[_Layer]:
    """Modules with parameters of their own or arithmetic, and called ones without children."""
    for name, module in model.named_modules():
        call = forward.calls.get(name, _Call())
        own = {f"{name}.{key}" if name else key: p
               for key, p in module.named_parameters(recurse=False)}  # fmt: skip
        if not own and not call.flops and (any(True for _ in module.children()) or not call.calls):
            continue
        counted = {key: p for key, p in own.items() if key in weights.first}
        yield _Layer(
            name or "(the model itself)",
            type(module).__name__,
            sum(p.numel() for p in counted.values()),
            sum(p.numel() for p in counted.values() if not p.requires_grad),
            any(key in group for key in own for group in weights.tied),
            ", ".join(dict.fromkeys(_dtype(p) for p in own.values())) or call.dtype,
            call,
        )


def _layer_rows(layers: list[_Layer], budget: Budget) -> list[dict[str, Cell]]:
    if len(layers) <= ROWS:
        return [layer.row for layer in layers]
    largest = sorted(layers, key=lambda layer: (layer.parameters, layer.call.flops), reverse=True)
    kept = {id(layer) for layer in largest[:ROWS]}
    budget.note(f"The table shows the {ROWS} largest of {len(layers)} layers.")
    return [layer.row for layer in layers if id(layer) in kept]


# -- what kinds there are ----------------------------------------------------------------------

_KINDS: dict[str, tuple[str, Callable[[nn.Module], bool]]] = {
    "linear_layers": ("Linear layers", lambda m: isinstance(m, nn.Linear)),
    "convolutions": ("Convolutions", lambda m: isinstance(m, _ConvNd)),
    "embeddings": ("Embeddings", lambda m: isinstance(m, nn.Embedding | nn.EmbeddingBag)),
    "batchnorms": ("BatchNorm layers", lambda m: isinstance(m, _BatchNorm)),
    "layernorms": (
        "LayerNorm and like layers",
        lambda m: isinstance(m, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm),
    ),
    "dropouts": ("Dropout layers", lambda m: isinstance(m, _DropoutNd)),
    "attentions": ("Attention layers", lambda m: "attention" in type(m).__name__.lower()),
    "recurrents": ("Recurrent layers", lambda m: isinstance(m, nn.RNNBase | nn.RNNCellBase)),
}


@dataclass
class _Inventory:
    kinds: dict[str, list[tuple[str, nn.Module]]]

    def rows(self) -> list[dict[str, Cell]]:
        return [
            {"kind": _KINDS[key][0], "count": len(found), "settings": _settings(found)}
            for key, found in self.kinds.items()
            if found
        ]

    def metrics(self) -> list[Metric]:
        return [
            Metric(
                key, _KINDS[key][0], len(found), "modules, counted",
                "How many modules of this kind there are.",
            )
            for key, found in self.kinds.items()
            if found
        ]  # fmt: skip


def _inventory(model: nn.Module) -> _Inventory:
    modules = list(model.named_modules())
    kinds = {key: [(n, m) for n, m in modules if test(m)] for key, (_, test) in _KINDS.items()}
    # A block around an attention layer that is called so itself does not count twice.
    attentions = kinds["attentions"]
    kinds["attentions"] = [
        (name, m) for name, m in attentions
        if not any(other != name and other.startswith(f"{name}." if name else "")
                   for other, _ in attentions)
    ]  # fmt: skip
    return _Inventory(kinds)


def _settings(found: list[tuple[str, nn.Module]]) -> str:
    described = Counter(str(module.extra_repr()) for _, module in found)
    parts = [f"{text} ({n} ×)" if n > 1 else text for text, n in described.most_common(3) if text]
    return "; ".join(parts) + (" …" if len(described) > 3 else "")


# -- structure that does nothing ---------------------------------------------------------------


@dataclass
class _Silent:
    """Parameters that no gradient reaches on a batch."""

    unused: dict[str, int]  # tensors: name -> numbers
    dead_units: dict[str, tuple[int, int]]  # layers: name -> dead of all
    numbers: int
    samples: int

    @property
    def method(self) -> str:
        return (
            f"What gets no gradient was looked for with a random combination of the outputs of "
            f"{self.samples} train samples, so that a saturated loss does not hide a live part; a "
            "unit is a row of a linear layer or a channel of a convolution."
        )

    def rows(self) -> list[dict[str, Cell]]:
        rows: list[dict[str, Cell]] = [
            {"what": name, "kind": "whole tensor", "without gradient": n, "of": n}
            for name, n in self.unused.items()
        ]
        rows += [
            {"what": name, "kind": "units", "without gradient": dead, "of": n}
            for name, (dead, n) in self.dead_units.items()
            if dead
        ]
        return rows[:ROWS]

    @property
    def units(self) -> tuple[int, int]:
        return (sum(dead for dead, _ in self.dead_units.values()),
                sum(n for _, n in self.dead_units.values()))  # fmt: skip

    def metrics(self) -> list[Metric]:
        dead, units = self.units
        how = f"gradient exactly 0 or absent, on {self.samples} train samples"
        found = [
            Metric(
                "dead_parameters", "Parameters in tensors without gradient",
                sum(self.unused.values()), how,
                "Numbers that training cannot change: unused, detached or behind dead units.",
                better="low",
            )
        ]  # fmt: skip
        if units:
            found.append(
                Metric(
                    "dead_units", "Share of units without gradient", dead / units, how,
                    "Rows and channels that answered alike to all of these samples.",
                    better="low",
                )
            )  # fmt: skip
        return found

    def findings(self) -> list[Finding]:
        found = []
        if self.unused:
            n, share = sum(self.unused.values()), sum(self.unused.values()) / self.numbers
            names = ", ".join(list(self.unused)[:3]) + (" …" if len(self.unused) > 3 else "")
            found.append(
                Finding(
                    f"{number(n)} parameters ({percent(share)}) get no gradient: {names}.",
                    "They are not used, are cut off by a detach, or lie behind units that are "
                    "always off; remove them, or repair the path to the output.",
                    min(0.7, 0.35 + share),
                )
            )
        dead, units = self.units
        if dead:
            worst, (a, b) = max(self.dead_units.items(), key=lambda e: e[1][0] / max(1, e[1][1]))
            found.append(
                Finding(
                    f"{dead} of {units} units answer to none of {self.samples} samples, most in "
                    f"layer {worst} ({a} of {b}).",
                    "A unit that is never on learns nothing and costs as much as the others: "
                    "prune it, or use a smaller step, another initialisation or a leaky unit.",
                    min(0.7, 0.1 + dead / units + (0.2 if 2 * a > b else 0.0)),
                )
            )
        return found


def _silent(model: nn.Module, data: Sample, budget: Budget) -> _Silent | None:
    """Which trainable parameters get no gradient; None if the model cannot be differentiated."""
    order = data.draw("train", MOST, "card")
    with differentiable(model) as net, repeatable(net):
        params: dict[str, Tensor] = {
            name: p for name, p in net.named_parameters() if p.requires_grad
        }
        places = {f"{name}.weight".removeprefix("."): (module, name)
                  for name, module in net.named_modules()
                  if isinstance(module, nn.Linear | _ConvNd)}  # fmt: skip
        alive = {name: torch.zeros(_units(p, places.get(name, (None,))[0]), dtype=torch.bool,
                                   device=p.device) for name, p in params.items()}  # fmt: skip
        generator = data.generator("card")
        done = 0
        while done < len(order):
            stop = min(len(order), max(FIRST, 2 * done))
            x = fitting(net, order.x[done:stop])
            try:
                gradients, cost = budget.timed(lambda x=x: _gradients(net, x, params, generator))
            except RuntimeError:
                return None
            for name, gradient in gradients.items():
                if gradient is not None:
                    rows = _by_unit(gradient, places.get(name, (None,))[0])
                    alive[name] |= (rows != 0).flatten(1).any(1)
            done = stop
            if 2.5 * cost > budget.left:
                break
    if done < min(MOST, len(order)):
        budget.note(f"Dead parameters were looked for on {done} samples only.")
    unused = {name.removeprefix("model."): params[name].numel()
              for name, mask in alive.items() if not mask.any()}  # fmt: skip
    units = {layer_of(name): (int((~mask).sum()), len(mask))
             for name, mask in alive.items() if name in places and mask.any()}  # fmt: skip
    return _Silent(unused, units, sum(p.numel() for p in params.values()), done)


def _gradients(
    net: nn.Module, x: Tensor, params: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor | None]:
    with torch.enable_grad():
        out = net(x)
        weights = torch.randn(out.shape, generator=generator).to(out)
        found = torch.autograd.grad((out * weights).sum(), list(params.values()), allow_unused=True)
    return dict(zip(params, found, strict=True))


def _units(p: Tensor, module: nn.Module | None) -> int:
    return len(_by_unit(p.detach(), module))


def _by_unit(t: Tensor, module: nn.Module | None) -> Tensor:
    """One row a unit of a linear layer or convolution; a single one for anything else."""
    if module is None:
        return t.reshape(1, -1)
    if getattr(module, "transposed", False):
        t = t.transpose(0, 1)  # (in, out / groups, ...): channels of groups fall together
    return t.flatten(1)


# -- figures and findings ----------------------------------------------------------------------


def _size_metrics(weights: _Weights, layers: list[_Layer]) -> list[Metric]:
    counted = "counted, each tensor once"
    found = [
        Metric("parameters", "Parameters", weights.count, counted,
               "Numbers that training sets, tied ones counted once."),
        Metric("trainable_parameters", "Trainable parameters",
               weights.count - weights.frozen_count, counted,
               "Those that require a gradient."),
        Metric("layers", "Layers with parameters",
               sum(1 for layer in layers if layer.parameters), "counted",
               "Modules with parameters of their own."),
        Metric("weight_bytes", "Weight memory", weights.bytes, "parameters and buffers",
               "What the network occupies; training adds gradients and optimizer state.",
               unit="bytes"),
    ]  # fmt: skip
    if weights.tied:
        found.append(
            Metric("tied_parameters", "Tied parameters",
                   sum(weights.parameters[group[0]].numel() for group in weights.tied), counted,
                   "Numbers that several layers use.")
        )  # fmt: skip
    return found


def _cost_metrics(forward: _Forward) -> list[Metric]:
    found = []
    if forward.flops is not None:
        how = "torch's FlopCounterMode on one sample"
        found += [
            Metric("flops", "FLOPs of one sample's forward pass", forward.flops, how,
                   "Two a multiply-add; a training step takes about three times as many a sample.",
                   unit="FLOPs", better="low"),
            Metric("multiply_adds", "Multiply-adds of one sample", forward.flops // 2, how,
                   "What papers often call FLOPs."),
        ]  # fmt: skip
    found.append(
        Metric("activation_bytes", "Activations of one sample", forward.activation_bytes,
               "distinct tensors that modules returned, one sample", unit="bytes",
               reading="Written once in a forward pass; inference may free them on the way.")
    )  # fmt: skip
    if forward.saved_bytes is not None:
        found.append(
            Metric("saved_bytes", "Kept for the backward pass", forward.saved_bytes,
                   "tensors that autograd saved of one sample, without weights; evaluation mode",
                   "Times the batch size, this is what training adds to the memory.", unit="bytes",
                   better="low")
        )  # fmt: skip
    return found


def _figures(layers: list[_Layer]) -> list[Picture]:
    columns: list[tuple[str, str, Callable[[_Layer], float]]] = [
        ("parameters", BLUE, lambda layer: layer.parameters),
        ("multiply-adds", ORANGE, lambda layer: layer.call.flops),
        ("activations", GREEN, lambda layer: layer.call.bytes),
    ]
    totals = [max(1.0, sum(map(value, layers))) for _, _, value in columns]

    def shares(layer: _Layer) -> list[float]:
        return [100 * value(layer) / total
                for (_, _, value), total in zip(columns, totals, strict=True)]  # fmt: skip

    chosen = {id(layer) for layer in sorted(layers, key=lambda e: max(shares(e)))[-BARS:]}
    shown = [layer for layer in layers if id(layer) in chosen]
    if not shown:
        return []
    figure, axes = subplots(1, 3, width=8.0, height=1.2 + 0.24 * len(shown), sharey=True)
    for column, (axis, (label, colour, _)) in enumerate(zip(axes, columns, strict=True)):
        axis.barh(range(len(shown)), [shares(layer)[column] for layer in shown], color=colour)
        axis.set_title(label)
        axis.set_xlabel("% of the network")
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(shown)), [f"{_short(e.name)} ({e.kind})" for e in shown])
    axes[0].invert_yaxis()
    rest = len(layers) - len(shown)
    return [
        Picture(
            "shares",
            figure,
            "Where parameters, arithmetic and activations of one sample are, from input to output"
            + (f"; {rest} smaller layers are left out." if rest else "."),
        )
    ]


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _normalisation_findings(model: nn.Module) -> list[Finding]:
    unset, batch = [], []
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, _InstanceNorm):
            continue
        mean, var = module.running_mean, module.running_var
        if mean is None or var is None:
            batch.append(name)
        elif not mean.any() and bool((var == 1).all()):
            unset.append(name)
    found = []
    if unset:
        found.append(
            Finding(
                f"{len(unset)} BatchNorm layers have the statistics that they were born with "
                f"(mean 0, variance 1), the first is {unset[0]}.",
                "They were never in training mode, or their buffers were not saved: in evaluation "
                "mode they normalise nothing. Load the buffers, or estimate them anew "
                "(assay.functional.update_bn).",
                0.85,
            )
        )
    if batch:
        found.append(
            Finding(
                f"{len(batch)} BatchNorm layers keep no statistics, the first is {batch[0]}.",
                "They normalise with the batch even in evaluation mode, so an answer depends on "
                "the samples beside it.",
                0.5,
            )
        )
    return found


def _weight_findings(weights: _Weights, layers: list[_Layer]) -> list[Finding]:
    found = []
    if weights.frozen and weights.count:
        share = weights.frozen_count / weights.count
        found.append(
            Finding(
                f"{percent(share)} of the parameters are frozen ({number(weights.frozen_count)}"
                f" of {number(weights.count)}).",
                "Fine if it was meant; a forgotten freeze keeps a network from learning."
                if share < 1
                else "The network was loaded for inference; panels that need gradients take all.",
                0.15,
            )
        )
    dtypes = {_dtype(p) for p in weights.parameters.values() if p.is_floating_point()}
    if len(dtypes) > 1:
        found.append(
            Finding(
                f"Parameters are of {len(dtypes)} types of numbers: {', '.join(sorted(dtypes))}.",
                "Mixed types are easily an accident of loading; see the table.",
                0.25,
            )
        )
    broad = [layer for layer in layers if layer.parameters > 0.8 * max(1, weights.count)]
    if broad and len(layers) > 3:
        layer = broad[0]
        flops = sum(other.call.flops for other in layers)
        cost = f" and {percent(layer.call.flops / flops, 2)} of the arithmetic" if flops else ""
        found.append(
            Finding(
                f"Layer {layer.name} holds {percent(layer.parameters / weights.count, 2)} of the "
                f"parameters{cost}.",
                "Pruning, factorising or quantising this layer alone sets the size of the network.",
                0.1,
            )
        )
    return found
