"""Every public name is documented, and every public name is in `__all__`."""

import inspect
import re
import typing

import pytest
from public import NAMESPACES

import bilevax as bx

PUBLIC = {
    f"{namespace}.{name}": getattr(module, name)
    for namespace, module in NAMESPACES.items()
    for name in module.__all__
    if inspect.isfunction(getattr(module, name)) or inspect.isclass(getattr(module, name))
    if getattr(module, name).__module__.startswith("bilevax")  # an alias is documented where it comes from
}
SAMPLERS = (bx.sampling.full, bx.sampling.per_step)  # all of one signature, which their module documents
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value) and value not in SAMPLERS}
COSTLESS = (bx.curvature.damped, bx.sampling.minibatch)


def sections(docstring):
    """The Google sections of a docstring by their titles; "Cost: one gradient" is a section as well."""
    parts = re.split(r"^(Args|Returns|Raises|Cost|Reference|Attributes|Example):", docstring, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_summary_and_example(subtests):
    for name, value in PUBLIC.items():
        with subtests.test(name):
            docstring = inspect.getdoc(value)
            assert "tuple(" not in docstring.splitlines()[0].lower(), "the docstring that NamedTuple writes by itself"
            assert re.match(r"[A-Z∇].+\.$", docstring.splitlines()[0])
            assert ">>> " in sections(docstring)["Example"]


def expected_sections(function):
    """Those for which there is something to say: arguments, a result, a refusal in the function itself, a cost."""
    signature = inspect.signature(function)
    code = inspect.getsource(inspect.unwrap(function)).replace(function.__doc__, "")
    says = {
        "Args": signature.parameters,
        "Returns": signature.return_annotation not in (None, "None", typing.NoReturn),
        "Raises": re.search(r"\braise\b|\bchecks\.", code),
        "Cost": function not in COSTLESS,
        "Example": True,
    }
    return {section for section, something in says.items() if something}


def test_sections(subtests):
    for name, function in FUNCTIONS.items():
        with subtests.test(name):
            found = sections(inspect.getdoc(function))
            assert expected_sections(function) <= set(found)


def test_no_section_says_nothing(subtests):
    for name, value in PUBLIC.items():
        with subtests.test(name):
            for title, text in sections(inspect.getdoc(value)).items():
                empty = ("",) if title == "Cost" else ("", "none", "nothing")
                assert text.strip().strip(".()").lower() not in empty
                assert not re.search(r">>> .*\._fields(\[.*\])?$", text, flags=re.M)


def test_every_argument_is_documented(subtests):
    for name, function in FUNCTIONS.items():
        with subtests.test(name):
            documented = re.findall(r"^  (\w+): ", sections(inspect.getdoc(function)).get("Args", ""), flags=re.M)
            assert documented == list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", NAMESPACES)
def test_all_is_sorted_and_complete(name):
    namespace = NAMESPACES[name]
    names = namespace.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), name.islower(), name))
    assert {name for name in dir(namespace) if not name.startswith("_")} == set(names)
    assert all(hasattr(namespace, name) for name in names)
    if hasattr(namespace, "__path__"):  # a folder has nothing but what is public
        assert {
            name
            for name, value in vars(namespace).items()
            if not name.startswith("_") and not inspect.ismodule(value) and value is not getattr(typing, name, None)
        } <= set(names)
