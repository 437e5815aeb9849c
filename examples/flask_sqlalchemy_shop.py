"""A Flask shop whose charge and whose answer are committed together.

SHOP_DATABASE names a database of PostgreSQL (which ``wsgi-idempotency upgrade`` has prepared) or
of SQLite. Serve it with::

    gunicorn flask_sqlalchemy_shop:app
"""

import os

from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import func, select
from sqlalchemy.orm import Mapped, mapped_column

from wsgi_idempotency import Policy, by_authorization
from wsgi_idempotency.contrib.flask import Idempotency
from wsgi_idempotency.contrib.flask_sqlalchemy import JoiningSession

LIMIT = 1000

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ.get("SHOP_DATABASE", "sqlite:////tmp/shop.db")
db = SQLAlchemy(app, session_options={"class_": JoiningSession})  # joins
Idempotency(
    app,
    app.config["SQLALCHEMY_DATABASE_URI"],
    scope=by_authorization,
    policy=Policy(transaction=True),
)


class Charge(db.Model):
    __tablename__ = "charges"
    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


with app.app_context():
    db.create_all()
    db.engine.dispose()


@app.post("/charges")
def charge():
    made = Charge(amount=request.form.get("amount", type=int))
    db.session.add(made)
    db.session.commit()
    if db.session.scalar(select(func.sum(Charge.amount))) > LIMIT:
        return {"error": "over the limit"}, 402  # undoes the charge, although it was committed
    return {"id": made.id, "amount": made.amount}, 201


@app.get("/charges")
def charges():
    return [charge.amount for charge in db.session.scalars(select(Charge).order_by(Charge.id))]
