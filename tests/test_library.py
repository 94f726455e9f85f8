"""One test over the whole library: every public component, every experiment."""

import copy
import dataclasses
import doctest
import importlib
import inspect
import pickle
import pkgutil
import re
import textwrap
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import assay
from assay.lab import Result, find_experiment, run_experiment, slugs
from assay.lab.experiment import PRESET_NAMES

# The command line and the evidence are not components; kernels are reached through them.
_NOT_COMPONENTS = {"cli", "__main__", "experiments", "kernels"}


def _rooms() -> list[ModuleType]:
    names = [m.name for m in pkgutil.iter_modules(assay.__path__) if m.name not in _NOT_COMPONENTS]
    return [importlib.import_module(f"assay.{name}") for name in names]


def _components() -> dict[str, object]:
    found = {}
    for room in _rooms():
        assert hasattr(room, "__all__"), f"{room.__name__} has no __all__"
        for name in room.__all__:
            found[f"{room.__name__}.{name}"] = getattr(room, name)
    return found


COMPONENTS = {
    name: thing
    for name, thing in _components().items()
    if inspect.isclass(thing) or inspect.isfunction(thing)
}


def _is_exception(thing: object) -> bool:
    return inspect.isclass(thing) and issubclass(thing, BaseException)


def _signature_owner(thing):
    """What takes the arguments and may refuse them: the function, or the class's constructor."""
    if not inspect.isclass(thing):
        return [thing]
    if _is_protocol(thing):
        return []
    makers = [vars(thing).get(name) for name in ("__init__", "__post_init__")]
    return [maker for maker in makers if inspect.isfunction(maker)]


def _source(function) -> str:
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except OSError:
        return ""  # what `dataclass` writes has no source, and refuses nothing


def _parameters(thing) -> list[str]:
    if _is_protocol(thing):
        return []
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return []
    return [p for p in signature.parameters if p not in ("self", "args", "kwargs")]


@pytest.mark.parametrize("name", COMPONENTS)
def test_docstring_tells_arguments_errors_and_an_example(name):
    thing = COMPONENTS[name]
    text = inspect.getdoc(thing) or ""
    summary = text.partition("\n")[0]
    assert summary.endswith((".", ":")), f"the summary is not a sentence: {summary!r}"
    if _is_exception(thing):
        return
    parameters = _parameters(thing)
    if parameters:
        assert "Args:" in text
        section = text.partition("Args:")[2]
        for parameter in parameters:
            assert re.search(rf"^\s+\*{{0,2}}{parameter}\b", section, re.M), (
                f"Args says nothing of {parameter}"
            )
    source = "".join(map(_source, _signature_owner(thing)))
    if re.search(r"^\s+raise [A-Z]\w*(Error|Exit)?\(", source, re.M):
        assert "Raises:" in text, "it raises and does not say what"
    if not inspect.isabstract(thing) and not _is_protocol(thing):
        assert ">>>" in text, "it shows no example"


@pytest.mark.parametrize("name", COMPONENTS)
def test_example_runs_and_what_it_makes_survives_copies(name):
    thing = COMPONENTS[name]
    module = importlib.import_module(thing.__module__)
    finder = doctest.DocTestFinder(recurse=False)
    for test in finder.find(thing, thing.__name__, module=module):
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        with torch.random.fork_rng():
            runner.run(test, clear_globs=False)
        assert runner.failures == 0, f"the example of {name} does not give what it says"
        made = [v for v in test.globs.values() if inspect.isclass(thing) and type(v) is thing]
        if _has_state(thing) and not inspect.isabstract(thing):
            assert made, f"the example of {name} binds no instance of it to a name"
            for instance in made:
                _survives(instance)


def _has_state(thing) -> bool:
    return inspect.isclass(thing) and hasattr(thing, "state_dict") and not _is_protocol(thing)


def _is_protocol(thing) -> bool:
    return getattr(thing, "_is_protocol", False)


def _survives(instance) -> None:
    state = instance.state_dict()
    twin = copy.deepcopy(instance)
    _assert_same(twin.state_dict(), state)
    twin.load_state_dict(copy.deepcopy(state))
    _assert_same(twin.state_dict(), state)
    if isinstance(instance, nn.Module | Optimizer):
        _assert_same(pickle.loads(pickle.dumps(instance)).state_dict(), state)
    if isinstance(instance, nn.Module):
        twin.double()
        for key, value in twin.state_dict().items():
            assert not value.is_floating_point() or value.dtype == torch.float64, key


def _assert_same(one, other) -> None:
    assert isinstance(other, dict) if isinstance(one, dict) else type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            _assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            _assert_same(a, b)
    elif isinstance(one, int | float | str | bool | type(None)):
        assert one == other


@pytest.mark.parametrize("slug", slugs())
class TestExperiment:
    """What every experiment has to have."""

    def test_card_is_complete(self, slug):
        experiment = find_experiment(slug)
        paper = experiment.paper
        assert paper.slug == slug
        assert all((paper.title, paper.authors, paper.summary, paper.url.startswith("https://")))
        assert 2015 <= paper.year <= 2022
        assert importlib.import_module(f"assay.{paper.topic}")
        assert paper.components, "a paper without a component that a user can import"
        for name in paper.components:
            assert name in COMPONENTS, f"{name} is not a public component"

    def test_claims_have_bounds_and_say_how_they_are_measured(self, slug):
        claims = find_experiment(slug).claims
        assert sum(claim.expect is not None for claim in claims) >= 3
        assert len({claim.id for claim in claims}) == len(claims)
        for claim in claims:
            assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", claim.id)
            assert claim.statement
            assert claim.how, f"{claim.id} does not say how it is measured"

    def test_presets_are_settings_of_one_kind(self, slug):
        experiment = find_experiment(slug)
        assert tuple(experiment.presets) == PRESET_NAMES
        kinds = {type(config) for config in experiment.presets.values()}
        assert len(kinds) == 1
        (kind,) = kinds
        assert dataclasses.is_dataclass(kind)
        assert kind.__dataclass_params__.frozen
        for preset, config in experiment.presets.items():
            values = {f.name: _as_text(getattr(config, f.name)) for f in dataclasses.fields(config)}
            assert experiment.config(preset, values) == config

    def test_smoke_run_measures_every_claim(self, slug, tmp_path):
        result = run_experiment(find_experiment(slug), preset="smoke", directory=tmp_path)
        assert Result.read(tmp_path) == result
        assert not result.failed_exact, [c.id for c in result.failed_exact]
        missing = [c.id for c in result.claims if c.kind != "paper" and not c.measurements]
        assert not missing, f"claims without a measurement: {missing}"
        for figure in result.figures:
            assert (tmp_path / figure.file).exists()
            assert figure.caption
        # Twenty seconds on two free cores; the machine that tests may be busier than that.
        assert result.provenance.seconds < 60


def _as_text(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
