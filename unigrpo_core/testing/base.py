"""What the conformance classes share: which component, its options, expected failures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from unigrpo_core.catalog import Catalog, Component, load_catalog
from unigrpo_core.errors import PluginError, did_you_mean
from unigrpo_core.plugin import Provider
from unigrpo_core.recipe.slots import Slot
from unigrpo_core.testing.light import light_to_build, light_to_import
from unigrpo_core.testing.watch import no_global_draws


@cache
def installed() -> Catalog:
    """What is installed, looked up once."""
    return load_catalog()


class Conformance:
    """Base of all: the facts that a subclass states, and the checks of every kind.

    A subclass states ``use``, the name in the catalog, or ``provider``; and ``options`` as a recipe
    would state them. Options that only a running test knows, such as a temporary file, come from
    overriding the fixture ``given``.

    ``expected_failures`` maps the name of a check to the reason why it fails. Such a check must
    fail: one that passes is a failure too.
    """

    slot: ClassVar[type[Slot]]
    use: ClassVar[str] = ""
    provider: ClassVar[Provider | None] = None
    options: ClassVar[Mapping[str, Any]] = {}
    expected_failures: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        checks = [name for name in dir(cls) if name.startswith("test_")]
        for name, reason in cls.expected_failures.items():
            if name not in checks:
                hint = did_you_mean(name, checks)
                raise TypeError(f"{cls.__name__}.expected_failures: no check is {name!r}{hint}")
            if not isinstance(reason, str) or not reason.strip():
                raise TypeError(f"{cls.__name__}.expected_failures: {name!r} needs a reason")

    @pytest.fixture(autouse=True)
    def _expected(self, request: pytest.FixtureRequest) -> None:
        reason = self.expected_failures.get(request.function.__name__)
        if reason:
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))

    @pytest.fixture
    def given(self) -> Mapping[str, Any]:
        """The options, as a recipe would state them."""
        return self.options

    @pytest.fixture
    def component(self, given: Mapping[str, Any]) -> Any:
        """What the provider builds; new for every check."""
        return self.build(given)

    def listed(self) -> Component:
        """The provider given, else what the catalog finds."""
        if self.provider is not None:
            return Component(self.slot.kind, self.provider, "given", "-")
        if not self.use:
            raise TypeError(f"{type(self).__name__} must state use or provider")
        return installed().find(self.slot.kind, self.use)

    def found(self) -> Provider:
        return self.listed().provider

    def stated(self, given: Mapping[str, Any]) -> Any:
        """The options, validated as a recipe's are."""
        return self.found().options.model_validate_json(json.dumps(dict(given)))

    def build(self, given: Mapping[str, Any]) -> Any:
        """What the provider builds of the options."""
        return self.built(self.stated(given))

    def built(self, options: Any, *arguments: Any) -> Any:
        """What the recipe's slot makes of options that are valid."""
        component = self.listed()
        made = self.slot.model_construct(use=component.name, component=component, options=options)
        return made.build(*arguments)

    # --- the provider -------------------------------------------------------------------------

    def test_provider_is_described(self) -> None:
        """A name without blanks and colons, a summary of one line; ``needs`` and ``provides`` are
        sequences of words."""
        provider = self.found()
        assert provider.name, "the provider has no name"
        assert not set(provider.name) & set(": \t\n"), f"{provider.name!r}: no colon, no blank"
        assert "\n" not in provider.summary, "the summary is one line of listings"
        for name in ("needs", "provides"):
            words = getattr(provider, name)
            assert not isinstance(words, str), f'{name} is a sequence of words: ("{words}",)'
            assert all(isinstance(word, str) and word for word in words), words

    def test_listing_stays_light(self) -> None:
        """The plugin's modules import nothing heavy; only for a component found by ``use``."""
        if self.provider is not None:
            pytest.skip("the provider was given, so no entry point leads to it")
        light_to_import(self.listed().distribution)

    def test_built_is_of_its_interface(self, given: Mapping[str, Any]) -> None:
        """``build`` returns what the kind's interface says."""
        try:
            self.build(given)
        except PluginError as error:
            pytest.fail(str(error))

    def test_building_draws_nothing(self, given: Mapping[str, Any]) -> None:
        """Building leaves the global generators of Python, NumPy and torch where they were."""
        with no_global_draws():
            self.build(given)

    # --- its options --------------------------------------------------------------------------

    def test_options_are_described(self) -> None:
        """Every option has a description."""
        fields = self.found().options.model_fields
        bare = [name for name, field in fields.items() if not (field.description or "").strip()]
        assert not bare, f"options without a description: {', '.join(bare)}"

    def test_options_are_frozen(self, given: Mapping[str, Any]) -> None:
        """Options cannot be changed once they are made."""
        options = self.found().options
        assert options.model_config.get("frozen"), f"{options.__name__} is not frozen"
        made = self.stated(given)
        for name in options.model_fields:
            with pytest.raises(ValidationError):
                setattr(made, name, getattr(made, name))

    def test_options_forbid_unknown_keys(self, given: Mapping[str, Any]) -> None:
        """A key that is no option is an error, so that a misspelt one cannot pass unread."""
        with pytest.raises(ValidationError, match="no_such_option"):
            self.stated({**given, "no_such_option": 1})

    def test_options_leave_the_slot_its_keys(self) -> None:
        """No option has the name of a key that belongs to the recipe's slot, such as ``weight``."""
        shadowed = set(self.found().options.model_fields) & set(self.slot.own_keys())
        assert not shadowed, f"options that are keys of the slot: {', '.join(sorted(shadowed))}"

    def test_options_survive_a_recipe(self, given: Mapping[str, Any]) -> None:
        """Options written into a run's resolved recipe and read back are the same."""
        options, made = self.found().options, self.stated(given)
        written = json.dumps(made.model_dump(mode="json", exclude_none=True))
        assert options.model_validate_json(written) == made

    def test_defaults_build(self) -> None:
        """With nothing stated it builds, or the options say what is missing."""
        provider = self.found()
        if provider.parts:
            pytest.skip("a policy of parts needs them")
        try:
            options = provider.options.model_validate_json("{}")
        except ValidationError as error:
            for problem in error.errors():
                assert problem["type"] in ("missing", "value_error"), problem
        else:
            self.built(options)


class LightConformance(Conformance):
    """Adds what is asked of the methods that ``unigrpo check`` builds."""

    def test_building_stays_light(self, given: Mapping[str, Any]) -> None:
        """Building imports nothing heavy: ``unigrpo check`` does it, and loads no torch."""
        if self.provider is not None:
            pytest.skip("the provider was given, so no other process can find it")
        light_to_build(self.slot.kind, self.use, json.dumps(dict(given)))
