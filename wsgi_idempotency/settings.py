"""The options of the middleware as settings: environment variables, ini files, and the
configuration of a framework.

An option has one name everywhere, in lower case or in upper, behind a prefix: ``wait`` is
``WSGI_IDEMPOTENCY_WAIT`` in the environment, ``IDEMPOTENCY_WAIT`` in Flask and Django,
``idempotency.wait`` in Pyramid. A value that is a text is read as :data:`OPTIONS` says;
any other is taken as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

from wsgi_idempotency import problems, protocol, scope
from wsgi_idempotency.errors import ConfigurationError
from wsgi_idempotency.fingerprint import canonical, exact
from wsgi_idempotency.key import first_of, form_field, header, json_field
from wsgi_idempotency.policy import Policy

#: Seconds in each unit of a duration.
_SECONDS = {
    **dict.fromkeys(("ms", "millisecond", "milliseconds"), 0.001),
    **dict.fromkeys(("", "s", "second", "seconds"), 1.0),
    **dict.fromkeys(("min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
}
_BYTES = {"": 1, "b": 1, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
_FLAGS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}

_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)")

Reader = Callable[[str, str], Any]


def load(name: str, reference: str) -> Any:
    """What ``"module:attribute"`` names; with ``()`` behind it, what calling that gives.

    :param name: of the setting, for the error.
    :raises ConfigurationError: there is no such module or attribute.
    """
    module_name, colon, path = reference.strip().partition(":")
    path, call = (path[:-2], True) if path.endswith("()") else (path, False)
    if not (module_name and colon and path):
        raise ConfigurationError(f"{name} is {reference!r}; use module:name, such as shop:app")
    try:
        found: Any = import_module(module_name)
    except ImportError as exc:
        raise ConfigurationError(
            f"{name} is {reference!r}, and {module_name} can't be imported: {exc}"
        ) from exc
    for attribute in path.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError as exc:
            raise ConfigurationError(
                f"{name} is {reference!r}, and {module_name} has no {path}"
            ) from exc
    return found() if call else found


def _words(name: str, text: str) -> list[str]:
    words = text.replace(",", " ").split()
    if not words:
        raise ConfigurationError(
            f"{name} is {text!r}, which names nothing; name one or leave it out"
        )
    return words


#: Modules of ours that have an ``observe``, imported when they are named: the last two need
#: an extra.
_OBSERVERS = ("logging", "prometheus", "opentelemetry")


def load_observers(name: str, text: str) -> list[Any]:
    """The observers that names stand for, ours and the user's own.

    :param name: of the setting, for the error.
    :raises ConfigurationError: there is no such module or attribute, or it lacks its extra.
    """
    return [
        load(name, f"{__package__}.observers.{word}:observe")
        if word in _OBSERVERS
        else load(name, word)
        for word in _words(name, text)
    ]


def _literally(name: str, text: str) -> str:
    return text


def _amount(units: Mapping[str, float], example: str, name: str, text: str) -> float:
    found = _AMOUNT.fullmatch(text.strip())
    if found is None or found[2].lower() not in units:
        raise ConfigurationError(f"{name} is {text!r}; use one like {example}")
    return float(found[1]) * units[found[2].lower()]


def _size(name: str, text: str) -> int:
    size = _amount(_BYTES, "16 MiB, 512 KiB or 1000000", name, text)
    if not size.is_integer():
        raise ConfigurationError(f"{name} is {text!r}, which is no whole number of bytes")
    return int(size)


def _whole(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text.strip()):
        raise ConfigurationError(f"{name} is {text!r}; use a whole number")
    return int(text)


def _flag(name: str, text: str) -> bool:
    try:
        return _FLAGS[text.strip().lower()]
    except KeyError:
        raise ConfigurationError(f"{name} is {text!r}; use true or false") from None


def _one(
    named: Mapping[str, Any],
    of: Mapping[str, tuple[Callable[[str], Any], str]],
    name: str,
    text: str,
) -> Any:
    """What a text stands for: a name of ours, one of ours made of what stands behind the
    colon, or the user's own as ``module:name``."""
    text = text.strip()
    kind, colon, rest = text.partition(":")
    if text in named:
        return named[text]
    if colon and kind in of:
        make, _ = of[kind]
        return make(rest)
    if colon:
        return load(name, text)
    ours = [*named, *(f"{kind}:{example}" for kind, (_, example) in of.items())]
    raise ConfigurationError(
        f"{name} is {text!r}; use {', '.join(ours)}, or module:name for one of your own"
    )


def _sources(name: str, text: str) -> Any:
    of = {
        "header": (header, "Idempotency-Key"),
        "form_field": (form_field, "idempotency_key"),
        "json_field": (json_field, "data.id"),
    }
    sources = [_one({}, of, name, word) for word in _words(name, text)]
    return sources[0] if len(sources) == 1 else first_of(*sources)


#: Seconds, of a text such as ``15 min``.
duration: Callable[[str, str], float] = partial(
    _amount, _SECONDS, "30 s, 500 ms, 15 min, 24 h or 7 days"
)

#: How the text of each option of a Policy is read.
POLICY: dict[str, Reader] = {
    "methods": _words,
    "key": _sources,
    "required": _flag,
    "max_key_length": _whole,
    "namespace": _literally,
    "fingerprint": partial(_one, {"exact": exact, "canonical": canonical, "none": None}, {}),
    "retention": duration,
    "lease": duration,
    "wait": duration,
    "outcomes": partial(
        _one,
        {
            "store_success": protocol.store_success,
            "store_everything": protocol.store_everything,
            "hold_unknown": protocol.hold_unknown,
        },
        {},
    ),
    "transaction": _flag,
    "isolation_level": _literally,
    "claim_durability": _literally,
    "max_request_bytes": _size,
    "max_response_bytes": _size,
    "max_step_bytes": _size,
    "rebuild": load,
    "replay_headers": _words,
    "on_store_failure": _literally,
}

#: How the text of every option is read.
OPTIONS: dict[str, Reader] = {
    "store": _literally,
    "scope": partial(
        _one,
        {
            "by_authorization": scope.by_authorization,
            "by_remote_user": scope.by_remote_user,
            "everyone": scope.everyone,
        },
        {"header": (scope.by_header, "X-Tenant"), "cookie": (scope.by_cookie, "session")},
    ),
    "policy": partial(_one, {"none": None}, {}),
    "routes": load,
    "on_event": load_observers,
    "render_problem": partial(_one, {"rfc9457": problems.rfc9457, "stripe": problems.stripe}, {}),
    "max_waiting": _whole,
    "secret": _literally,
    **POLICY,
}


def read(
    settings: Mapping[str, object],
    *,
    prefix: str,
    upper: bool = False,
    renamed: Mapping[str, str] | None = None,
    others: Collection[str] = (),
) -> dict[str, Any]:
    """The options that are set, as :class:`IdempotencyMiddleware` takes them.

    :param settings: all of them; those without the prefix are none of ours.
    :param prefix: what the names of ours start with.
    :param upper: whether the names behind the prefix are in upper case.
    :param renamed: the whole names of options that are called otherwise.
    :param others: names with the prefix that mean something else.
    :raises ConfigurationError: a name is unknown or a value makes no sense.
    """
    usual = {option: prefix + (option.upper() if upper else option) for option in OPTIONS}
    names = {**usual, **(renamed or {})}
    called = {usual[option]: name for option, name in names.items()}
    _refuse_unknown(settings, prefix, [*names.values(), *others], called)
    found = {
        option: _value(OPTIONS[option], name, settings[name])
        for option, name in names.items()
        if name in settings
    }
    of_policy = {option: found.pop(option) for option in POLICY if option in found}
    if of_policy and "policy" in found:
        beside = ", ".join(names[option] for option in of_policy)
        raise ConfigurationError(f"{names['policy']} is set beside {beside}; use one or the other")
    if of_policy:
        found["policy"] = Policy(**of_policy)
    return found


def _value(reader: Reader, name: str, value: object) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ConfigurationError(f"{name} is empty; give it a value or leave it out")
    return reader(name, value)


def _refuse_unknown(
    settings: Mapping[str, object], prefix: str, known: Collection[str], called: Mapping[str, str]
) -> None:
    """A misspelt option would otherwise protect less than its author believes."""
    for name in settings:
        if name.startswith(prefix) and name not in known:
            near = called.get(name) or get_close_matches(name, known, 1, 0.0)[0]
            raise ConfigurationError(f"there is no setting {name}; did you mean {near}?")


def need(found: Mapping[str, object], advice: Mapping[str, str]) -> None:
    """:param advice: what to do about each option that has no default.
    :raises ConfigurationError: one of them was given in no way.
    """
    for option, what in advice.items():
        if found.get(option) is None:
            raise ConfigurationError(what)
