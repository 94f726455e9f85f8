"""Any classifier as a function: its logits, its predictions, its embedding; frozen meanwhile."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from assay.functional import evaluating


class Classifier(nn.Module):
    """A model of any kind as a function from inputs `(N, ...)` to logits `(N, C)`.

    What analyses a classifier takes a plain `nn.Module` whose output is a tensor of logits, or has
    them as `output.logits` or `output["logits"]`. Wrap a model in this class if it is called in
    another way, or if it wants inputs that are standardised first: the analysis then happens in
    the space of the raw inputs.

    Args:
        model: the classifier.
        call: `(model, x) -> output`; default `model(x)`.
        preprocess: applied to the inputs before the model sees them, e.g. a standardisation;
            differentiable.

    Raises:
        TypeError: in a forward pass, if the output holds no tensor of logits.
        ValueError: in a forward pass, if the logits are not of shape `(N, C)` with C ≥ 2.

    Example:
        >>> import torch
        >>> from assay.analysis import Classifier
        >>> class Named(torch.nn.Linear):
        ...     def forward(self, pixels):
        ...         return {"scores": super().forward(pixels)}
        >>> scores = lambda model, x: model(pixels=x)["scores"]
        >>> Classifier(Named(4, 3), call=scores)(torch.zeros(2, 4)).shape
        torch.Size([2, 3])

        A single logit of two classes is the second one if the first is 0:

        >>> second = lambda model, x: torch.nn.functional.pad(model(x), (1, 0))
        >>> Classifier(torch.nn.Linear(4, 1), call=second)(torch.zeros(2, 4)).shape
        torch.Size([2, 2])

        The inputs may also be what a model makes of token ids: with a transformer of Hugging Face,
        `call=lambda model, x: model(inputs_embeds=x)` on
        `x = model.get_input_embeddings()(ids).detach()`.

        >>> classifier = Classifier(torch.nn.Linear(4, 3), preprocess=torch.nn.LayerNorm(4))
        >>> classifier(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        call: Callable[[nn.Module, Tensor], Any] | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.call = call
        self.preprocess = preprocess

    def forward(self, x: Tensor) -> Tensor:
        """The logits `(N, C)` of inputs `(N, ...)`."""
        if self.preprocess is not None:
            x = self.preprocess(x)
        output = self.model(x) if self.call is None else self.call(self.model, x)
        return as_logits(output)


def embedding_of(
    model: nn.Module, layer: str = "auto", *, batch_size: int = 256
) -> Callable[[Tensor], Tensor]:
    """The embedding of a classifier: what enters its last linear layer.

    Args:
        model: a classifier, see `Classifier`.
        layer: `"auto"` for the `nn.Linear` that a forward pass calls last, or the name of a module
            (`model.named_modules()`); its input is the embedding.
        batch_size: inputs a forward pass.

    Returns:
        A function from inputs `(N, ...)` to embeddings `(N, d)`. It raises a `RuntimeError` if no
        such layer is called.

    Raises:
        ValueError: if there is no module of that name, or for `"auto"` no `nn.Linear` at all.

    Example:
        >>> import torch
        >>> from assay.analysis import embedding_of
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> embedding_of(model)(torch.rand(5, 4)).shape
        torch.Size([5, 8])
        >>> embedding_of(model, "0")(torch.rand(5, 4)).shape
        torch.Size([5, 4])
    """
    modules = dict(model.named_modules())
    if layer == "auto":
        watched = [module for module in modules.values() if isinstance(module, nn.Linear)]
        if not watched:
            raise ValueError(f"the model has no nn.Linear: name a layer, one of {list(modules)}")
    elif layer in modules:
        watched = [modules[layer]]
    else:
        raise ValueError(f"the model has no layer {layer!r}; it has {list(modules)}")
    seen: dict[str, Any] = {}

    def remember(_: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if tensors:
            seen["input"] = tensors[0]

    @torch.no_grad()
    def embed(x: Tensor) -> Tensor:
        handles = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in watched]
        parts = []
        try:
            # Compiled code does not see the hooks.
            with frozen(model), torch.compiler.set_stance("force_eager"):
                for part in x.split(batch_size):
                    seen.clear()
                    logits_of(model, part)
                    if "input" not in seen:
                        raise RuntimeError(f"the forward pass does not call the layer {layer!r}")
                    parts.append(seen["input"].detach().flatten(1).to(x.device))
        finally:
            for handle in handles:
                handle.remove()
            seen.clear()
        return torch.cat(parts)

    return embed


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for the parameters; gradients still reach the inputs."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if recurrent:
            # cuDNN's recurrent kernels have a backward pass in training mode only.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        try:
            for p in trainable:
                p.requires_grad_(False)
            yield
        finally:
            for p in trainable:
                p.requires_grad_(True)


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Logits on the device of `x`, in single precision or better."""
    device = next((p.device for p in model.parameters()), x.device)
    logits = as_logits(model(x.to(device))).to(x.device)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def batched_logits(model: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
    """The same, a batch at a time; NaN, of which no class could be told, is refused."""
    logits = torch.cat([logits_of(model, part) for part in x.split(batch_size)])
    if bool(logits.isnan().any()):
        count = int(logits.isnan().any(1).sum())
        raise ValueError(f"the model's logits are NaN for {count} of {len(x)} inputs")
    return logits


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """The predicted classes, a batch at a time and without gradients."""
    return batched_logits(model, x).argmax(1)


def check_inputs(name: str, x: Tensor) -> None:
    """Refuse inputs between which there is no way to go, or that are not finite."""
    if not x.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point inputs (N, ...), got {x.dtype}: turn pixels into "
            "floats, token ids into embeddings, with Classifier(model, call=lambda model, x: "
            "model(inputs_embeds=x))"
        )
    if x.ndim < 2:
        raise ValueError(f"{name} must be inputs (N, ...), got shape {tuple(x.shape)}")
    if x.numel() and not all(end.isfinite() for end in x.aminmax()):
        raise ValueError(f"{name} holds values that are not finite")


def as_logits(output: Any) -> Tensor:
    """The logits in what a model returned."""
    if isinstance(output, Mapping):
        logits = output.get("logits")
    else:
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return logits, or an output that has them as .logits, got "
            f"{type(output).__name__}: wrap it in Classifier(model, call=...), e.g. with "
            "call=lambda model, x: model(x)[0] if they come first"
        )
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits must be of shape (N, C) with C ≥ 2, got {tuple(logits.shape)}: wrap the model "
            "in Classifier(model, call=...), with call=lambda model, x: "
            "torch.nn.functional.pad(model(x), (1, 0)) if it gives one logit (N, 1) of two classes"
        )
    return logits
