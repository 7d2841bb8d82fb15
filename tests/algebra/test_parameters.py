"""Parameters from signatures: what a method takes, what a value must be, what a refusal says."""

import inspect
from typing import Annotated, Literal

import pytest
import torch
from algebra.operands import draw

from extensions_built_in.zit_merge.algebra.declared import declared
from extensions_built_in.zit_merge.algebra.methods import METHODS
from extensions_built_in.zit_merge.algebra.parameters import PER, Parameter, Within, paragraphs, parameters_of

EVERY = [(m, p) for m, method in METHODS.items() for p in method.parameters]
every = pytest.mark.parametrize(("method", "name"), EVERY)
NAN, INF = float("nan"), float("inf")


def apply(method, **parameters):
    """A method on two random LoRAs."""
    function = METHODS[method].function
    if METHODS[method].is_linear:
        parameters.pop("per", None)  # of who makes the Gram matrix
        gram = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
        return function(gram, torch.tensor([1.0, 0.5], dtype=torch.float64), **parameters)
    merged = function([draw(12, 10, 2, 1), draw(12, 10, 2, 2)], **parameters)
    return merged.up.double() @ merged.down.double()


# --- the registry --------------------------------------------------------------------------------------------------------------


def test_the_methods_by_name():
    assert set(METHODS) == {
        *("sum", "average", "normalize", "slerp", "nuslerp", "karcher"),
        *("ties", "dare_linear", "dare_ties", "della", "tsv", "project", "shared_once"),
    }
    assert all(method.function.__name__ == name for name, method in METHODS.items())


def test_what_each_method_takes():
    assert {name: list(method.parameters) for name, method in METHODS.items()} == {
        "sum": [],
        "average": [],
        "normalize": ["per"],
        "slerp": ["per"],
        "nuslerp": ["per"],
        "karcher": ["per", "max_iter", "tol"],
        "ties": ["density"],
        "dare_linear": ["density", "seed"],
        "dare_ties": ["density", "seed"],
        "della": ["density", "epsilon", "seed"],
        "tsv": [],
        "project": ["mu", "yields", "components"],
        "shared_once": ["tau"],
    }
    assert [n for n, m in METHODS.items() if m.takes == 2] == ["slerp", "nuslerp", "project"]
    assert {n: m.parameters["per"].default for n, m in METHODS.items() if m.per} == {
        "normalize": "file",
        "slerp": "module",
        "nuslerp": "module",
        "karcher": "module",
    }
    assert PER.default == "module"  # of another method's `per`, the shared one is not changed


@pytest.mark.parametrize("method", METHODS)
def test_what_is_read_from_the_text_is_what_the_function_has(method):
    entry = METHODS[method]
    assert parameters_of(declared(entry.module)[entry.name]) == parameters_of(entry.function)
    assert entry.doc == entry.function.__doc__


@pytest.mark.parametrize("density", [0.01, 0.4, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.15, 0.2, 0.8, 1.0])
def test_della_refuses_what_its_check_refuses(density, epsilon):
    def said(function, *args):
        try:
            function(*args)
        except ValueError as e:
            return str(e)
        return ""

    given = {"density": density, "epsilon": epsilon}
    assert said(METHODS["della"].check, given) == said(lambda: apply("della", **given))


@pytest.mark.parametrize("method", METHODS)
def test_the_flags_are_true(method):
    entry = METHODS[method]
    names = [p.name for p in inspect.signature(entry.function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert names == (["gram", "weights"] if entry.is_linear else ["deltas"])
    if not entry.is_linear:
        assert not (entry.is_mean or entry.is_spherical or entry.per)
        return
    gram = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
    ratios = torch.tensor([1.0, 0.5], dtype=torch.float64)
    same = torch.allclose(entry.function(gram, 3 * ratios), entry.function(gram, ratios))
    assert same == entry.is_mean
    depends = not torch.allclose(entry.function(torch.diag(gram.diagonal()), ratios), entry.function(gram, ratios))
    assert depends == bool(entry.per)  # "empty where the ratios are all that it needs"
    try:
        entry.function(gram, torch.tensor([1.0, -0.5], dtype=torch.float64))
        refused = False
    except ValueError:
        refused = True
    assert refused == entry.is_spherical
    assert entry.is_mean or not entry.is_spherical


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_what_it_is(method):
    doc = paragraphs(METHODS[method].function.__doc__)
    assert doc[""].strip()
    for title in ("Formula", "Source", "Use"):
        assert doc[title].strip(), title
        assert "\n\n" not in doc[title]
    assert set(doc) <= {"", "Formula", "Source", "Use", "Args", "Raises"}


# --- every parameter -----------------------------------------------------------------------------------------------------------


@every
def test_the_default_is_in_its_own_range_and_accepted(method, name):
    parameter = METHODS[method].parameters[name]
    assert parameter.name == name
    assert parameter.trouble(parameter.default) == ""
    assert isinstance(parameter.default, parameter.kind)
    assert torch.equal(apply(method, **{name: parameter.default}), apply(method))


@every
def test_it_has_a_meaning(method, name):
    text = METHODS[method].parameters[name].text
    assert text[0].isupper()
    assert text.endswith(".")
    assert "\n" not in text
    assert "  " not in text


@every
def test_it_has_a_range_or_choices(method, name):
    parameter = METHODS[method].parameters[name]
    assert bool(parameter.choices) != bool(parameter.within)
    assert parameter.kind in ((str,) if parameter.choices else (int, float))


@every
def test_the_ends_of_the_range_are_taken_by_the_method_too(method, name):
    parameter = METHODS[method].parameters[name]
    if parameter.choices:
        values = list(parameter.choices)
    else:
        low, high, above = parameter.within
        values = [low + 1e-3 if above else low, *([high] if high < INF else [1000])]
    for value in values:
        value = value if parameter.choices else parameter.kind(value)
        assert parameter.trouble(value) == ""
        if method == "della" and name in ("density", "epsilon"):
            continue  # together they must stay probabilities
        assert torch.isfinite(apply(method, **{name: value})).all()


@every
@pytest.mark.parametrize("value", [None, True, False, "0.5", "", [], [0.5], {}, NAN, INF, -INF, 1j, "sideways"])
def test_what_is_no_value_is_refused(method, name, value):
    said = METHODS[method].parameters[name].trouble(value)
    assert said.startswith("must be ")
    assert said.endswith(f", not {value!r}")


@every
def test_what_is_out_of_range_is_refused(method, name):
    parameter = METHODS[method].parameters[name]
    if parameter.choices:
        return
    low, high, above = parameter.within
    wrong = [low - 1, *([low] if above else []), *([high + 1] if high < INF else [])]
    for value in wrong:
        said = parameter.trouble(parameter.kind(value))
        assert said == f"must be {parameter.within}, not {parameter.kind(value)!r}"
    if parameter.kind is int:
        assert parameter.trouble(low + 0.5) == f"must be a whole number, not {low + 0.5!r}"
    elif high >= 1:
        assert parameter.trouble(1) == ""  # a whole number is a number


# --- the sentences -------------------------------------------------------------------------------------------------------------


def test_the_sentences():
    density, seed = METHODS["della"].parameters["density"], METHODS["della"].parameters["seed"]
    mu, yields = METHODS["project"].parameters["mu"], METHODS["project"].parameters["yields"]
    assert density.trouble(0) == "must be above 0 and at most 1, not 0"
    assert density.trouble(1.5) == "must be above 0 and at most 1, not 1.5"
    assert density.trouble("half") == "must be a finite number, not 'half'"
    assert density.trouble(NAN) == "must be a finite number, not nan"
    assert seed.trouble(1.0) == "must be a whole number, not 1.0"
    assert mu.trouble(-0.1) == "must be from 0, not -0.1"
    assert mu.trouble(1e300) == ""
    assert yields.trouble("neither") == "must be one of first, second, both, not 'neither'"
    assert PER.trouble("block") == "must be one of module, layer, file, not 'block'"


@pytest.mark.parametrize(
    ("within", "text", "inside", "outside"),
    [
        (Within(0), "from 0", [0, 1, 1e9], [-1e-9, NAN]),
        (Within(0, 1), "from 0 to 1", [0, 0.5, 1], [-1e-9, 1.0001, NAN]),
        (Within(0, 1, above=True), "above 0 and at most 1", [1e-9, 1], [0, 1.0001, NAN]),
        (Within(0.5, above=True), "above 0.5", [0.6, 1e9], [0.5, 0]),
        (Within(1, 10_000), "from 1 to 10000", [1, 10_000], [0, 10_001]),
    ],
)
def test_ranges(within, text, inside, outside):
    assert str(within) == text
    assert all(within.holds(value) for value in inside)
    assert not any(within.holds(value) for value in outside)


def test_a_large_whole_number_is_said_in_all_its_digits():
    # nobody can tell what is allowed from 4.29497e+09
    assert METHODS["della"].parameters["seed"].trouble(2**32) == "must be from 0 to 4294967295, not 4294967296"


# --- signatures and docstrings -------------------------------------------------------------------------------------------------


def example(deltas, plain=None, *, rate: Annotated[float, Within(0, 1)] = 0.5, side: Literal["a", "b"] = "b", count: int = 3):  # noqa: D417
    """A summary.

    Formula: a line
        and another
    Use: Note: a colon within, and rate: another.

    Args:
        deltas: Not a parameter.
        rate: How fast,
            in two lines.
        side: Which: one of two.

    Raises:
        ValueError: Never.
    """


def test_parameters_are_the_keyword_only_arguments():
    assert parameters_of(example) == {
        "rate": Parameter("rate", 0.5, float, Within(0, 1), text="How fast, in two lines."),
        "side": Parameter("side", "b", str, choices=("a", "b"), text="Which: one of two."),
        "count": Parameter("count", 3, int),
    }
    assert list(parameters_of(example)) == ["rate", "side", "count"]
    assert parameters_of(example)["count"].trouble(-5) == ""
    assert parameters_of(lambda x: x) == {}


def test_paragraphs_of_a_docstring():
    found = paragraphs(example.__doc__)
    assert list(found) == ["", "Formula", "Use", "Args", "Raises"]
    assert found[""].strip() == "A summary."
    assert [line.strip() for line in found["Formula"].splitlines()] == ["a line", "and another"]
    assert found["Use"].strip() == "Note: a colon within, and rate: another."
    assert found["Args"].strip().splitlines()[-1].startswith("side")
    assert found["Raises"].strip() == "ValueError: Never."
