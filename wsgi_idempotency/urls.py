"""What an application is made of: the middleware in it, and the URLs behind that.

Nothing is called: the wrappers are followed by their attributes, and each framework is
asked for its own URL map. A framework is imported by the application, or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, cast

from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map

from wsgi_idempotency.middleware import IdempotencyMiddleware

#: Where a wrapper keeps what it wraps.
WRAPPED = ("app", "wsgi_app", "application")

#: What stands for a variable part of a path: the first that fits, each where it fits.
CANDIDATES = ("1", "a", "2f1c9a5e-0d3b-4c1a-9f5e-6b7a8c9d0e1f", "2026-01-31", "1.5", "a/b")

#: ``{name}`` or ``{name:regex}``, in which braces may be.
PYRAMID_VARIABLE = r"{(\w+)(?::(?:[^{}]|{[^{}]*})*)?}"


@dataclass(frozen=True)
class Part:
    """An application that wraps no other.

    :param app: the application.
    :param middleware: what protects it; None if nothing does.
    :param outside: the path it is mounted at, as far as the middleware doesn't see it.
    :param inside: the rest of that path.
    """

    app: Any
    middleware: IdempotencyMiddleware | None = None
    outside: str = ""
    inside: str = ""


@dataclass(frozen=True)
class Endpoint:
    """A rule of an application's URL map.

    :param rule: as the framework writes it, behind where the application is mounted.
    :param methods: those it is for; None means any.
    :param name: of what answers there.
    :param paths: PATH_INFOs that it matches, as the middleware sees them; none when no
        value was found for its variable parts.
    """

    rule: str
    methods: frozenset[str] | None
    name: str
    paths: tuple[str, ...]


def parts(app: Any) -> list[Part]:
    """The applications that an application wraps; itself if it wraps none."""
    found: list[Part] = []
    seen: set[tuple[int, int, str]] = set()

    def visit(part: Part) -> None:
        mark = (id(part.app), id(part.middleware), f"{part.outside}:{part.inside}")
        if mark in seen:
            return
        seen.add(mark)
        inner = list(_wrapped(part))
        for one in inner:
            visit(one)
        if not inner:
            found.append(_finished(part))

    visit(Part(app))
    return found


def _wrapped(part: Part) -> Iterator[Part]:
    app = part.app
    if isinstance(app, IdempotencyMiddleware):
        yield replace(part, app=app.app, middleware=part.middleware or app)
    elif isinstance(app, MethodType):
        owner = app.__self__
        # Flask's wsgi_app as the middleware has it: Flask itself, with nothing around any more.
        if kind_of(owner) is None:
            yield replace(part, app=owner)
    elif (kind := kind_of(app)) is not None:
        inside = getattr(app, "wsgi_app", None)
        if kind == "werkzeug" and callable(inside) and getattr(inside, "__self__", None) is not app:
            yield replace(part, app=inside)
    else:
        for name in WRAPPED:
            if callable(inside := getattr(app, name, None)):
                yield replace(part, app=inside)
        mounts = getattr(app, "mounts", None)  # of werkzeug's DispatcherMiddleware
        for path, inside in (mounts if isinstance(mounts, Mapping) else {}).items():
            if part.middleware is None:
                yield replace(part, app=inside, outside=part.outside + path)
            else:
                yield replace(part, app=inside, inside=part.inside + path)


def _finished(part: Part) -> Part:
    app: Any = part.app.__self__ if isinstance(part.app, MethodType) else part.app
    middleware = part.middleware
    if middleware is None and kind_of(app) == "pyramid":
        policy: Any = app.execution_policy
        middleware = getattr(policy, "middleware", None)
    return replace(part, app=app, middleware=middleware)


def middlewares(app: Any) -> list[tuple[str, IdempotencyMiddleware]]:
    """The middlewares in an application, and the path at which each of them is."""
    found: dict[int, tuple[str, IdempotencyMiddleware]] = {}
    for part in parts(app):
        if part.middleware is not None:
            found.setdefault(id(part.middleware), (part.outside, part.middleware))
    return list(found.values())


def kind_of(app: Any) -> str | None:
    """The framework whose URL map an application has; None if it has none we know."""
    if isinstance(getattr(app, "url_map", None), Map):
        return "werkzeug"
    for cls in type(app).__mro__:
        if (found := _KINDS.get(f"{cls.__module__}.{cls.__qualname__}")) is not None:
            return found
    return None


_KINDS = {
    "pyramid.router.Router": "pyramid",
    "django.core.handlers.wsgi.WSGIHandler": "django",
    "bottle.Bottle": "bottle",
    "falcon.app.App": "falcon",
}


def endpoints(part: Part) -> list[Endpoint]:
    """The URL map of an application that :func:`kind_of` knows."""
    of_kind = _ENDPOINTS[cast(str, kind_of(part.app))]
    return [
        replace(
            endpoint,
            rule=part.outside + part.inside + endpoint.rule,
            paths=tuple(part.inside + path for path in endpoint.paths),
        )
        for endpoint in of_kind(part.app, _candidates(part.middleware))
    ]


def _candidates(middleware: IdempotencyMiddleware | None) -> tuple[str, ...]:
    """The fixed parts of its routes may be what an application's rule has a variable for."""
    rules = [] if middleware is None else [route.rule for route in middleware.routes]
    fixed = {part for rule in rules for part in rule.split("/") if part and "<" not in part}
    return (*CANDIDATES, *sorted(fixed))


def _paths(make: Callable[[str], str | None], candidates: tuple[str, ...]) -> tuple[str, ...]:
    """What a rule makes of each candidate, without what is none of its paths."""
    made = [make(candidate) for candidate in candidates]
    return tuple(dict.fromkeys(path for path in made if path is not None))


def _fitting(regex: str, candidate: str) -> str:
    """The candidate, or the first other one that fits; the candidate if none does."""
    fits = (one for one in (candidate, *CANDIDATES) if re.fullmatch(regex, one))
    return next(fits, candidate)


def _of_werkzeug(app: Any, candidates: tuple[str, ...]) -> Iterator[Endpoint]:
    for rule in app.url_map.iter_rules():
        if rule.build_only or rule.websocket:
            continue
        adapter = app.url_map.bind("localhost", subdomain=rule.subdomain)
        method = min(rule.methods or {"POST"})

        def make(
            candidate: str, rule: Any = rule, adapter: Any = adapter, method: str = method
        ) -> str | None:
            values = {}
            for name, converter in rule._converters.items():
                items = sorted(getattr(converter, "items", ()))  # of an AnyConverter
                values[name] = items[0] if items else _fitting(converter.regex, candidate)
            path = re.sub(r"<(?:[^<>]*:)?(\w+)>", lambda found: values[found[1]], rule.rule)
            try:
                found, _ = adapter.match(path, method, return_rule=True)
            except HTTPException:  # also a RequestRedirect
                return None
            return path if found is rule else None

        methods = None if rule.methods is None else frozenset(rule.methods)
        yield Endpoint(rule.rule, methods, str(rule.endpoint), _paths(make, candidates))


def _of_pyramid(app: Any, candidates: tuple[str, ...]) -> Iterator[Endpoint]:
    from pyramid.config.views import isexception
    from pyramid.interfaces import IRoutesMapper

    introspector = app.registry.introspector
    views = [view["introspectable"] for view in introspector.get_category("views", ())]
    of_routes = {
        route["introspectable"]["name"]: route["introspectable"]["request_methods"]
        for route in introspector.get_category("routes", ())
    }
    mapper = app.registry.queryUtility(IRoutesMapper)
    for route in mapper.get_routes() if mapper is not None else ():
        names = re.findall(PYRAMID_VARIABLE, route.pattern)
        rest = re.findall(r"\*(\w+)$", route.pattern)

        def make(
            candidate: str, route: Any = route, names: Any = names, rest: Any = rest
        ) -> str | None:
            for one in (candidate, *CANDIDATES):
                path: str = route.generate(dict.fromkeys(names, one) | dict.fromkeys(rest, (one,)))
                if route.match(path) is not None:
                    return path
            return None

        methods = [_given(of_routes[route.name])]
        methods += [
            _given(view["request_methods"]) for view in views if view["route_name"] == route.name
        ]
        allowed = frozenset[str]().union(*(some for some in methods[1:] if some is not None))
        any_view = len(methods) == 1 or None in methods[1:]
        both = methods[0] if any_view else allowed & (methods[0] or allowed)
        yield Endpoint("/" + route.pattern.lstrip("/"), both, route.name, _paths(make, candidates))
    for view in views:
        if view["route_name"] is None and not isexception(view["context"]):
            rule = f"/{view['name']}"
            yield Endpoint(rule, _given(view["request_methods"]), "by traversal", (rule,))


def _given(methods: str | Iterable[str] | None) -> frozenset[str] | None:
    if methods is None:
        return None
    return frozenset([methods] if isinstance(methods, str) else methods)


def _of_django(app: Any, candidates: tuple[str, ...]) -> Iterator[Endpoint]:
    from django.urls import Resolver404, get_resolver

    resolver = get_resolver()

    def walk(patterns: Iterable[Any], before: tuple[Any, ...]) -> Iterator[Endpoint]:
        for one in patterns:
            chain = (*before, one.pattern)
            if hasattr(one, "url_patterns"):
                yield from walk(one.url_patterns, chain)
                continue

            def make(candidate: str, chain: Any = chain, view: Any = one.callback) -> str | None:
                path = "/" + "".join(_django_path(pattern, candidate) for pattern in chain)
                try:
                    return path if resolver.resolve(path).func is view else None
                except Resolver404:
                    return None

            rule = "/" + "".join(str(pattern) for pattern in chain)
            methods = _django_methods(one.callback)
            of = getattr(one.callback, "view_class", one.callback)
            name = getattr(of, "__qualname__", type(of).__qualname__)
            yield Endpoint(rule, methods, name, _paths(make, candidates))

    yield from walk(resolver.url_patterns, ())


def _django_path(pattern: Any, candidate: str) -> str:
    from django.utils.regex_helper import normalize

    if hasattr(pattern, "_route"):  # a RoutePattern, as path() makes one
        return re.sub(
            r"<(?:[^<>:]+:)?(\w+)>",
            lambda found: _fitting(pattern.converters[found[1]].regex, candidate),
            str(pattern),
        )
    if not hasattr(pattern, "_regex"):
        return str(pattern)  # a LocalePrefixPattern
    template, names = next(iter(normalize(str(pattern))), ("", []))
    return cast(str, template % dict.fromkeys(names, candidate))


def _django_methods(view: Any) -> frozenset[str] | None:
    if (actions := getattr(view, "actions", None)) is not None:  # a ViewSet of REST framework
        return frozenset(method.upper() for method in actions)
    if (of_class := getattr(view, "view_class", None)) is None:
        return None  # a function sees any method, and decides for itself
    names = (name for name in of_class.http_method_names if hasattr(of_class, name))
    return frozenset(name.upper() for name in names)


def _of_bottle(app: Any, candidates: tuple[str, ...]) -> Iterator[Endpoint]:
    import bottle

    for route in app.routes:
        methods = None if route.method in ("ANY", "PROXY") else frozenset([route.method])
        names = [name for name, _ in app.router.builder.get(route.rule, ()) if name]

        def make(
            candidate: str, route: Any = route, names: Any = names, methods: Any = methods
        ) -> str | None:
            for one in (candidate, *CANDIDATES):
                method = "POST" if methods is None else route.method
                try:
                    built: str = app.router.build(route.rule, **dict.fromkeys(names, one))
                    path = built.partition("?")[0]
                    found, _ = app.router.match({"PATH_INFO": path, "REQUEST_METHOD": method})
                except (ValueError, bottle.HTTPError):  # a filter that can't take it
                    continue
                if found is route:
                    return path
            return None

        yield Endpoint(route.rule, methods, route.callback.__name__, _paths(make, candidates))


def _of_falcon(app: Any, candidates: tuple[str, ...]) -> Iterator[Endpoint]:
    from falcon.inspect import inspect_routes

    for route in inspect_routes(app):
        methods = frozenset(method.method for method in route.methods if not method.internal)

        def make(candidate: str, template: str = route.path) -> str | None:
            for one in (candidate, *CANDIDATES):
                path = re.sub(r"{[^{}]+}", one, template)
                found = app._router.find(path)
                if found is not None and found[3] == template:
                    return path
            return None

        yield Endpoint(route.path, methods, route.class_name, _paths(make, candidates))


_ENDPOINTS: dict[str, Callable[[Any, tuple[str, ...]], Iterator[Endpoint]]] = {
    "werkzeug": _of_werkzeug,
    "pyramid": _of_pyramid,
    "django": _of_django,
    "bottle": _of_bottle,
    "falcon": _of_falcon,
}
