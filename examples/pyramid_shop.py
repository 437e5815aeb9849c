"""A Pyramid shop that charges once, however often the client sends the request.

Its settings are in pyramid_shop.ini, which includes the protection; serve it with::

    pserve pyramid_shop.ini

(``pserve`` needs ``pip install waitress``.)
"""

from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPBadRequest
from pyramid.response import Response
from sqlalchemy import create_engine, text


def charge(request):
    try:
        amount = int(request.POST["amount"])
    except (KeyError, ValueError):
        raise HTTPBadRequest("amount must be a number of cents") from None
    with request.registry.engine.begin() as transaction:
        number = transaction.execute(
            text("INSERT INTO charges (amount) VALUES (:amount)"), {"amount": amount}
        ).lastrowid
    return Response(json_body={"id": f"ch_{number}", "amount": amount}, status=201)


def main(global_config, **settings):
    config = Configurator(settings=settings)
    config.registry.engine = create_engine(settings["shop.database"])
    with config.registry.engine.begin() as transaction:
        transaction.execute(
            text("CREATE TABLE IF NOT EXISTS charges (id integer PRIMARY KEY, amount integer)")
        )
    config.add_route("charges", "/charges")
    config.add_view(charge, route_name="charges", request_method="POST")
    return config.make_wsgi_app()
