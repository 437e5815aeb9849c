"""A Bottle shop whose charge and whose answer are committed together, with plain SQLAlchemy and,
at another URL, with the driver's own connection.

SHOP_DATABASE names a database of PostgreSQL (which ``wsgi-idempotency upgrade`` has prepared) or
of SQLite. Serve it with::

    gunicorn bottle_sqlalchemy_shop:application
"""

import os

import bottle
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from wsgi_idempotency import IdempotencyMiddleware, Policy, by_authorization, current_operation

LIMIT = 1000

database = os.environ.get("SHOP_DATABASE", "sqlite:////tmp/shop.db")
engine = create_engine(database)
app = bottle.Bottle()


class Base(DeclarativeBase):
    pass


class Charge(Base):
    __tablename__ = "charges"
    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


Base.metadata.create_all(engine)
engine.dispose()


def session():
    bind = current_operation.connection if current_operation else engine
    return Session(bind, join_transaction_mode="create_savepoint")  # joins


@app.post("/charges")
def charge():
    with session() as sql:
        made = Charge(amount=int(bottle.request.forms.amount))
        sql.add(made)
        sql.commit()
        if sql.scalar(select(func.sum(Charge.amount))) > LIMIT:
            bottle.abort(402, "over the limit")  # undoes the charge, although it was committed
        bottle.response.status = 201
        return {"id": made.id, "amount": made.amount}


@app.post("/driver/charges")
def charge_with_the_driver():
    driver = current_operation.connection.connection.driver_connection  # psycopg's, or sqlite3's
    driver.execute(f"INSERT INTO charges (amount) VALUES ({int(bottle.request.forms.amount)})")
    if driver.execute("SELECT sum(amount) FROM charges").fetchone()[0] > LIMIT:
        bottle.abort(402, "over the limit")
    bottle.response.status = 201
    return {"amount": int(bottle.request.forms.amount)}


@app.get("/charges")
def charges():
    with session() as sql:
        found = sql.scalars(select(Charge).order_by(Charge.id))
        return {"amounts": [charge.amount for charge in found]}


application = IdempotencyMiddleware(
    app, database, scope=by_authorization, policy=Policy(transaction=True)
)
