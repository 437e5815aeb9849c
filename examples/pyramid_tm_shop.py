"""A Pyramid shop with pyramid_tm and zope.sqlalchemy, whose charge and whose answer are committed
together.

SHOP_DATABASE names a database of PostgreSQL (which ``wsgi-idempotency upgrade`` has prepared) or
of SQLite. Serve it with::

    gunicorn "pyramid_tm_shop:main()"
"""

import os

import zope.sqlalchemy
from pyramid.config import Configurator
from pyramid.response import Response
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from wsgi_idempotency import Policy, current_operation

LIMIT = 1000


class Base(DeclarativeBase):
    pass


class Charge(Base):
    __tablename__ = "charges"
    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


def session(request):
    """As pyramid_tm has it: committed when the view has succeeded, else aborted."""
    bind = current_operation.connection if current_operation else request.registry.engine  # joins
    made = Session(bind, join_transaction_mode="create_savepoint")
    zope.sqlalchemy.register(made, transaction_manager=request.tm)
    return made


def charge(request):
    made = Charge(amount=int(request.POST["amount"]))
    request.session_of_sql.add(made)
    request.session_of_sql.flush()
    if request.session_of_sql.scalar(select(func.sum(Charge.amount))) > LIMIT:
        return Response(json_body={"error": "over the limit"}, status=402)  # the veto aborts
    return Response(json_body={"id": made.id, "amount": made.amount}, status=201)


def charges(request):
    found = request.session_of_sql.scalars(select(Charge).order_by(Charge.id))
    return Response(json_body=[charge.amount for charge in found])


def main(global_config=None, **settings):
    database = os.environ.get("SHOP_DATABASE", "sqlite:////tmp/shop.db")
    config = Configurator(
        settings={
            "tm.commit_veto": "pyramid_tm.default_commit_veto",
            "retry.attempts": 3,
            "idempotency.store": database,
            "idempotency.scope": "by_authorization",
            "idempotency.policy": Policy(transaction=True),
            **settings,
        }
    )
    config.include("pyramid_tm")
    config.include("pyramid_retry")
    config.include("wsgi_idempotency.contrib.pyramid")
    config.registry.engine = create_engine(database)
    Base.metadata.create_all(config.registry.engine)
    config.registry.engine.dispose()
    config.add_request_method(session, "session_of_sql", reify=True)
    config.add_route("charges", "/charges")
    config.add_view(charge, route_name="charges", request_method="POST")
    config.add_view(charges, route_name="charges", request_method="GET")
    return config.make_wsgi_app()
